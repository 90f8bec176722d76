"""Sentences by rules: real cases in many languages, and that nothing but white space is lost."""

# ruff: noqa: RUF001 (punctuation and letters of other scripts are meant)
from __future__ import annotations

import gzip
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron3d.data.prepare.abbreviations import LanguageRules, language_rules
from megatron3d.data.prepare.sentences import split_sentences
from megatron3d.errors import ConfigError
from tests.data.corpora import SHARED, needs_shared

# Each | is a place where a sentence ends and the next begins.
CASES = [
    ("english", "Mr. Smith paid $3.50 for it.|Dr. Who did not."),
    ("english", '"Really?" he asked.|"Yes!"|She left (at 5 p.m. sharp).|Then all was over.'),
    (
        "english",
        "J. R. R. Tolkien lived in the U.S. for years.|J. A. Smith did not.|He lived in the U.K.|He died there.",
    ),
    ("english", "See Fig. 3 and pp. 12-14.|Is it No. 5?|No.|He went, e.g. London and Ph.D. Smith, vs. Jones."),
    ("english", "It was known.[3]|Later it was not.[12][13]|Visit www.example.org now or read v1.2.3 of it."),
    (
        "english",
        "The end...|But not yet... and so on.|What?!|Really!!!|Acme Inc. made it.|It grew at Acme Inc.|The end.",
    ),
    ("english", "1. First item here.|It goes on."),
    ("german", "Am 3. Oktober kam Dr. Müller z. B. nach Berlin.|Das war im Jahr 1990.|Danach, d.h. später, floh er."),
    ("german", "Ludwig XIV. König war er.|„Komm!“ rief er.|»Nein.«|Er ging bzw. lief."),
    ("french", "M. Dupont est là.|« Venez ! » dit-il.|Il part.|« Non ! »|Elle reste."),
    ("spanish", "¿Qué pasa?|¡Nada!|El Sr. López llegó a EE.UU. en mayo.|¿Y tú?"),
    ("italian", "Il sig. Rossi abita a Roma.|Perché?|Non lo so, ecc. ecc. ma va bene."),
    ("portuguese", "A Sra. Silva mora aqui.|Onde?|Na pág. 5 do livro."),
    ("dutch", "Hij woont bijv. in Utrecht.|Mr. Jansen ook.|Waarom?"),
    ("polish", "Prof. Nowak urodził się 5. Maja.|Potem, tj. później, wyjechał."),
    ("czech", "Narodil se 5. Května v Praze.|Např. Karel IV. Byl král."),
    ("russian", "Это А. С. Пушкин.|Он родился в 1799 г. в Москве.|Кто?|Поэт и т.д. конечно."),
    ("greek", "Τι είναι αυτό;|Ο κ. Παππάς ήρθε.|Καλά."),
    ("english", "He came; She left; all was done."),
    ("turkish", "Dr. Yılmaz 3. Sınıfta ders verdi.|Sonra gitti."),
    ("chinese", "你好。|他说：「我来了。你呢？」|然后走了！|真的吗？|是的。"),
    ("chinese", "圆周率是3.14。|网址是example.org！|好"),
    ("japanese", "「行きます。」と言った。|そうですか？|はい。"),
    ("korean", "안녕하세요.|잘 지내요?|네!"),
    ("hindi", "यह एक वाक्य है।|यह दूसरा है॥|डॉ. शर्मा आए।|क्या?"),
    ("bengali", "আমি ভাত খাই।|তুমি কি খাও?"),
    ("arabic", "كيف حالك؟|أنا بخير.|شكرا لك!"),
    ("urdu", "یہ ایک جملہ ہے۔|یہ دوسرا ہے۔"),
    ("hebrew", "שלום.|מה שלומך?|טוב!"),
    ("vietnamese", "TS. Nam đến rồi.|Thật không?|Vâng."),
    ("other", "Ni hao.|Ça va?|Да."),
    ("other", "ሰላም።|እንዴት ነህ፧|ደህና።"),
    ("other", "Բարև։|Ինչպես ես։"),
]


@pytest.mark.parametrize(("language", "text"), CASES)
def test_sentences_end_where_a_reader_sees_it(language: str, text: str) -> None:
    glue = "" if language in ("chinese", "japanese") else " "
    assert split_sentences(text.replace("|", glue), language_rules(language)) == text.split("|")


def test_blank_lines_end_sentences_and_lines_of_a_book_do_not() -> None:
    rules = language_rules("english")
    wrapped = "A title\n\nThe first sentence goes\nover two lines. The second\r\nalso.\n\n\n  The end"
    assert split_sentences(wrapped, rules) == [
        "A title",
        "The first sentence goes\nover two lines.",
        "The second\nalso.",
        "The end",
    ]
    paragraphs = "= Title =\n" + "A long paragraph " * 7 + "\nanother one"
    assert split_sentences(paragraphs, rules) == ["= Title =", ("A long paragraph " * 7).strip(), "another one"]


def test_kept_line_ends_stay_with_the_sentence_before() -> None:
    text = "One. Two.\n\nThree\n"
    assert split_sentences(text, language_rules("english"), keep_newlines=True) == ["One.", "Two.\n\n", "Three\n"]


@pytest.mark.parametrize("text", ["", " ", "\n\n \t\n"])
def test_no_text_has_no_sentence(text: str) -> None:
    assert split_sentences(text, language_rules("english")) == []


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(st.sampled_from("aB1 .!?…\n\"'”«»()[]。」「।؟;と\u2028\u00a0é王")) | st.text(),
    language=st.sampled_from(["english", "german", "greek", "chinese", "other"]),
)
def test_nothing_but_white_space_is_lost(text: str, language: str) -> None:
    for keep_newlines in (False, True):
        sentences = split_sentences(text, language_rules(language), keep_newlines=keep_newlines)
        assert "".join("".join(sentences).split()) == "".join(text.split())
        assert all(sentence.strip() for sentence in sentences)
        assert keep_newlines or all(sentence == sentence.strip() for sentence in sentences)


def test_a_language_is_known_by_name_and_code() -> None:
    assert language_rules("German") is language_rules("de") and language_rules("de").ordinal_dots
    assert language_rules("ja") == language_rules("other") == LanguageRules()


def test_unknown_language_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="--lang klingon is not known; the languages are arabic, bengali,"):
        language_rules("klingon")


@needs_shared
def test_translations_of_one_text_have_about_as_many_sentences() -> None:
    """240 paragraphs in 12 languages; Thai, which has no full stops, is cut at its few line ends and marks only."""
    counts: Counter[str] = Counter()
    with gzip.open(SHARED / "multilingual/xquad-contexts.jsonl.gz") as lines:
        for line in lines:
            paragraph = json.loads(line)
            counts[paragraph["lang"]] += len(split_sentences(paragraph["text"], language_rules(paragraph["lang"])))
    thai = counts.pop("th")
    assert thai < 400
    assert max(counts.values()) < 1.1 * counts["en"] and min(counts.values()) > 0.95 * counts["en"]
