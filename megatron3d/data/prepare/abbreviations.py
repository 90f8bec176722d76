"""What a sentence splitter must know of each language: which words end in a dot that ends no sentence.

Words are in lower case, without their last dot. The languages are those of NLTK's Punkt models (which Megatron-LM's
`--lang` names), and more; a language without words here is split by script and punctuation alone.
"""

# ruff: noqa: RUF001 (letters of other alphabets that look like Latin ones are meant)
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from megatron3d.errors import ConfigError


@dataclass(frozen=True)
class LanguageRules:
    """The dots of one language.

    never: no sentence ends here (a name or more of the phrase follows). numbered: none ends before a number.
    maybe: one ends if the next word is among `starters`, words that begin a sentence more often than they are a name.
    ordinal_dots: a dot after a number of one or two digits, or a Roman one, makes it an ordinal.
    semicolon_asks: a semicolon is a question mark.
    """

    never: frozenset[str] = frozenset()
    numbered: frozenset[str] = frozenset()
    maybe: frozenset[str] = frozenset()
    starters: frozenset[str] = frozenset()
    ordinal_dots: bool = False
    semicolon_asks: bool = False


def _rules(
    never: str = "", numbered: str = "", maybe: str = "", starters: str = "", dots: bool = False
) -> LanguageRules:
    sets = (frozenset(words.split()) for words in (never, numbered, maybe, starters))
    return LanguageRules(*sets, ordinal_dots=dots)


_RULES: Mapping[str, LanguageRules] = MappingProxyType(
    {
        "english": _rules(
            never="""mr mrs ms dr prof st gen col capt cmdr lt sgt maj adm rev hon sen rep gov pres supt messrs mme
            mlle fr mt ft vs v cf e.g i.e viz approx ca c al esp incl hrsg""",
            numbered="no nos p pp fig figs vol vols ch chap sec art eq nr op cap para r",
            maybe="""inc ltd co corp llc plc bros jr sr esq etc dept univ assn ave blvd rd sq jan feb mar apr jun jul
            aug sep sept oct nov dec mon tue tues wed thu thur thurs fri sat sun a.m p.m u.s u.k u.n ph.d b.c
            a.d ed eds
            est min max ibid""",
            starters="""the a an this that these those he she it we they you i his her its our their my your in on at
            by for from with as if when while after before but and or so yet however there here then thus what who
            how why where not no one some many most all each both such since because although though during between
            under over to of let do does did is are was were have has had can could will would may might should""",
        ),
        "german": _rules(
            never="""dr prof hr fr frl dipl ing st bzw z.b d.h u.a v.a i.d.r o.ä vgl evtl ggf inkl exkl sog gen geb
            gest ca bspw insb insbes mio mrd tel str vs zzgl abzgl u z d h b a o v i s.o s.u""",
            numbered="nr s bd abs art abb kap tab bzgl ziff §",
            maybe="usw etc uvm co jh jhd jan feb mär apr jun jul aug sep sept okt nov dez n.chr v.chr",
            starters="""der die das ein eine er sie es wir ihr ich du man dies diese dieser dieses in im am an auf bei
            mit nach von vor zu zum zur für aus durch um als wenn weil da doch aber und oder so dann auch nur nicht
            wie was wer wo warum hier dort seit während trotz zwischen sein seine ihre""",
            dots=True,
        ),
        "french": _rules(
            never="m mm mme mmes mlle mlles dr pr me mgr st ste cf p.ex c.-à-d env av apr bd boul",
            numbered="no n° p pp fig vol chap art t éd",
            maybe="etc jr janv févr avr juil sept oct nov déc cie j.-c",
            starters="""le la les l' un une des il elle ils elles on nous vous je tu ce cet cette ces en dans sur par
            pour avec sans mais et ou donc or ni car si quand comme après avant depuis à au aux de du d' c' son sa ses
            leur leurs qui que où pourquoi""",
        ),
        "spanish": _rules(
            never="""sr sra srta srs sres dr dra d dª da prof profa gral lic ing arq st sto sta ud uds vd vds
            p.ej av avda""",
            numbered="núm num no nº p pág págs fig vol cap art t ed",
            maybe="etc ee.uu jr cía a.c d.c s.a ene feb mar abr may jun jul ago sep sept oct nov dic",
            starters="""el la los las un una unos unas él ella ellos ellas yo tú nosotros en de por para con sin sobre
            desde hasta pero y o si cuando como después antes según su sus este esta estos estas ese esa que quien
            donde no se lo al del también luego entonces""",
        ),
        "italian": _rules(
            never="sig sigg sig.ra sig.na dott dott.ssa prof prof.ssa avv ing arch on gen col st ss p.es cfr ca",
            numbered="n nn p pp pag pagg fig vol cap art t ed",
            maybe="ecc etc a.c d.c s.p.a jr gen feb mar apr mag giu lug ago set ott nov dic",
            starters="""il lo la i gli le l' un uno una egli ella essi esse io tu noi voi in di da a con su per
            tra fra
            ma e o se quando come dopo prima nel nella del della al alla questo questa questi queste quello quella suo
            sua che chi dove non si""",
        ),
        "portuguese": _rules(
            never="sr sra srs sras dr dra drs prof profa d dona eng exmo exma st sto sta gen cel cap av p.ex",
            numbered="núm n nº p pág págs fig vol cap art t ed",
            maybe="etc a.c d.c s.a jr jan fev mar abr mai jun jul ago set out nov dez",
            starters="""o a os as um uma uns umas ele ela eles elas eu tu nós em de por para com sem sobre mas e ou se
            quando como depois antes no na nos nas do da dos das ao seu sua seus suas este esta esse essa que
            quem onde
            não também""",
        ),
        "dutch": _rules(
            never="""dhr mevr mw dr drs prof ir ing mr st ds bijv b.v d.w.z o.a m.a.w t.o.v i.p.v ca resp incl
            excl vgl""",
            numbered="nr nrs p pp blz fig dl hfst art",
            maybe="enz etc jr sr n.v v.chr n.chr jan feb mrt apr jun jul aug sep sept okt nov dec",
            starters="""de het een hij zij ze wij we ik jij je u deze dit die dat in op bij met na van voor te aan om
            als toen maar en of dus ook niet hoe wat wie waar waarom hier daar er zijn haar hun tijdens""",
        ),
        "swedish": _rules(
            never="dr prof hr fr st bl.a t.ex d.v.s dvs m.a.o s.k f.d jfr ca kl resp inkl exkl ung",
            numbered="nr s sid fig kap bd",
            maybe="etc osv m.m m.fl f.kr e.kr jan feb mar apr jun jul aug sept okt nov dec",
            starters="""den det de en ett han hon vi ni jag du man detta denna dessa i på av för med till från om när
            men och eller så efter under vid som hur vad vem var inte där här""",
        ),
        "danish": _rules(
            never="dr prof hr fr st bl.a f.eks dvs d.v.s m.a.o s.k jf ca kl evt inkl ekskl pga vha",
            numbered="nr s fig kap bd",
            maybe="etc osv m.m m.fl mv f.kr e.kr jan feb mar apr jun jul aug sep sept okt nov dec",
            starters="""den det de en et han hun vi i jeg du man dette denne disse på af for med til fra om når men og
            eller så efter under ved som hvordan hvad hvem hvor ikke der her""",
            dots=True,
        ),
        "norwegian": _rules(
            never="dr prof hr fr st bl.a f.eks dvs d.v.s m.a.o s.k jf ca kl evt inkl ekskl pga vha",
            numbered="nr s fig kap bd",
            maybe="etc osv m.m m.fl mv f.kr e.kr jan feb mar apr jun jul aug sep sept okt nov des",
            starters="""den det de en et ei han hun vi jeg du man dette denne disse i på av for med til fra om når men
            og eller så etter under ved som hvordan hva hvem hvor ikke der her""",
            dots=True,
        ),
        "finnish": _rules(
            never="tri prof hra rva nti ns esim mm ks vrt n ts eli toim",
            numbered="nro s ss",
            maybe="jne yms ym eaa jaa ekr jkr",
            starters="""hän se he ne me te minä sinä tämä nämä tuo kun jos mutta ja tai myös ei on kuitenkin
            sitten siksi""",
            dots=True,
        ),
        "estonian": _rules(
            never="dr prof hr pr prl s.t n.ö nt vt ca st sh",
            numbered="nr lk joon",
            maybe="jne jms jt e.m.a m.a.j",
            starters="ta tema see need nad me te ma sa kui aga ja või ka ei on siis seejärel samuti",
            dots=True,
        ),
        "polish": _rules(
            never="p pan pani dr prof mgr inż hab ks św gen płk kpt ul al tj np m.in tzw tzn ok por zob wg im red",
            numbered="nr s str rys t tab rozdz art ust",
            maybe="itd itp etc in p.n.e n.e r w",
            starters="""on ona ono oni one to ten ta te ja ty my wy w na z do od po przez dla przy o a i ale
            lecz gdy jeśli
            kiedy jak co kto gdzie nie po jednak także również jego jej ich""",
            dots=True,
        ),
        "czech": _rules(
            never="""p pan pí dr prof doc mgr ing bc judr mudr phdr sv gen plk kpt ul tj např tzv tzn popř resp
            srov viz""",
            numbered="č s str obr tab kap odst",
            maybe="atd apod aj etc př.n.l n.l",
            starters="""on ona ono oni to ten ta ti já ty my vy v ve na z ze do od po pro při o a i ale když
            jestliže jak co
            kdo kde ne však také jeho její jejich podle""",
            dots=True,
        ),
        "slovene": _rules(
            never="g ga gdč dr prof mag inž sv gen npr tj t.i oz tzv prim cca ul",
            numbered="št str sl pogl čl",
            maybe="itd ipd idr etc pr.n.št n.št",
            starters="""on ona ono oni to ta ti jaz v na z s do od po za pri o in a ampak ko če kako kaj kdo
            kje ne tudi""",
            dots=True,
        ),
        "turkish": _rules(
            never="dr doç prof av sn bkz örn st mah cad sok müh gen alb yrd",
            numbered="no s sf şek cilt",
            maybe="vb vs vd m.ö m.s a.ş ltd şti",
            starters="bu şu o bir ben sen biz siz onlar ve ama fakat ancak çünkü eğer daha sonra ne kim nasıl neden",
            dots=True,
        ),
        "russian": _rules(
            never="г гр гос проф акад доц инж им ул пр просп т.е т.к т.н т.о напр см ср св о-в р ок д кв тел",
            numbered="с стр рис табл гл т п ст №",
            maybe="т.д т.п др пр гг вв в н.э до.н.э руб коп тыс млн млрд",
            starters="""он она оно они это этот эта эти я ты мы вы в на с по из от для при о а и но если когда
            как что кто
            где не также однако после его её их так затем""",
        ),
        "greek": replace(
            _rules(
                never="κ κα κος δρ καθ αγ βλ πρβλ λ.χ π.χ δηλ περ",
                numbered="αρ σ σελ εικ τ κεφ",
                maybe="κ.λπ κλπ κ.ά κ.α π.χ. μ.χ",
                starters="""ο η το οι τα ένας μια ένα αυτός αυτή αυτό εγώ σε με για από στο στη και αλλά αν όταν
            πως τι ποιος δεν""",
            ),
            semicolon_asks=True,
        ),
        "romanian": _rules(
            never="dl dna dr prof ing av sf d-l d-na str bd ex cca aprox",
            numbered="nr p pag fig vol cap art",
            maybe="etc ș.a ş.a î.hr d.hr",
            starters="""el ea ei ele eu tu noi voi un o în la de din pe cu pentru dar și sau dacă când cum ce
            cine unde nu""",
        ),
        "hungarian": _rules(
            never="dr prof id ifj özv st pl ún kb vö ill ld",
            numbered="sz o old köt fej",
            maybe="stb i.e i.sz",
            starters="a az egy ez ő ők én te mi ti és de ha mert hogy mit ki hol nem is majd azonban",
            dots=True,
        ),
        "vietnamese": _rules(never="ts ths gs pgs tp ông bà", maybe="v.v", numbered="số tr"),
        "hindi": _rules(never="डॉ श्री प्रो पं मि"),
    }
)
_BY_SCRIPT_ALONE = (
    "arabic",
    "bengali",
    "chinese",
    "hebrew",
    "japanese",
    "korean",
    "persian",
    "thai",
    "ukrainian",
    "urdu",
    "other",
)
_CODE_ORDER = "en de fr es it pt nl sv da no fi et pl cs sl tr ru el ro hu vi hi ar bn zh he ja ko fa th uk ur"
_CODES: Mapping[str, str] = MappingProxyType(
    dict(
        zip(
            _CODE_ORDER.split(),
            [*_RULES, *_BY_SCRIPT_ALONE],
        )
    )
)


def language_rules(name: str) -> LanguageRules:
    """The rules of a language by its English name or ISO 639-1 code; `other` has none.

    Raises: ConfigError for a name that is not known.
    """
    key = _CODES.get(name.lower(), name.lower())
    if key in _RULES:
        return _RULES[key]
    if key in _BY_SCRIPT_ALONE:
        return LanguageRules()
    known = ", ".join(sorted([*_RULES, *_BY_SCRIPT_ALONE]))
    raise ConfigError(f"--lang {name} is not known; the languages are {known}. Use other for script alone.")
