"""Which tokenizer a Hugging Face directory describes: the one place that answers, for training and all tools alike.

A `tokenizer.json` is the whole description of how texts are cut, and is taken as it stands. Without one, the class that
the directory names is built from its vocabulary (`hf_classes.py`). On top come what `tokenizer_config.json` and its
kin say: settings that win over `tokenizer.json` in every version of transformers, added tokens, special tokens, and
what is put before and behind a text. What cannot be taken so is refused: nothing is guessed from the names of files.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, normalizers, pre_tokenizers

from megatron3d.data.hf_classes import bert_normalizer, build_by_class, is_unigram_read_as_bpe
from megatron3d.data.hf_description import VOCABULARY_FILES, Description, read_description
from megatron3d.data.hf_sentencepiece import SENTENCEPIECE_CLASS, run_by_sentencepiece
from megatron3d.data.library_errors import as_data_error
from megatron3d.data.tokenizer_interface import LibraryTokenizer, SpecialIds, Tokenizer
from megatron3d.errors import DataError

# Classes whose work is done in Python, so that no file of the directory describes it whole.
_PYTHON_CLASSES = frozenset(
    [
        "BartphoTokenizer",
        "BertJapaneseTokenizer",
        "BertweetTokenizer",
        "BioGptTokenizer",
        "BlenderbotSmallTokenizer",
        "ByT5Tokenizer",
        "CanineTokenizer",
        "CharacterTokenizer",
        "CpmAntTokenizer",
        "CpmTokenizer",
        "CTRLTokenizer",
        "EsmTokenizer",
        "FlaubertTokenizer",
        "FSMTTokenizer",
        "GPTNeoXJapaneseTokenizer",
        "GPTSw3Tokenizer",
        "JumanppTokenizer",
        "LukeTokenizer",
        "MecabTokenizer",
        "MLukeTokenizer",
        "MyT5Tokenizer",
        "PhobertTokenizer",
        "ProphetNetTokenizer",
        "RoCBertTokenizer",
        "TapasTokenizer",
        "TransfoXLTokenizer",
        "XLMTokenizer",
    ]
)
_ENDS_BY_NAME = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<EOD>")
_PROBES = ("a", "1", ".", "中")


def has_vocabulary(directory: Path) -> bool:
    """Whether a file of a tokenizer's vocabulary is in `directory`."""
    return any((directory / name).is_file() for name in VOCABULARY_FILES)


def described_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer that a directory describes, or a file in the form of `tokenizer.json` with what lies beside it.

    Ids are those that transformers gives for the directory without special tokens; `prefix` and `suffix` are the
    special tokens that it adds.

    Raises:
        DataError: the directory has no tokenizer, its tokenizer runs code that is not here, its files contradict each
            other, or one is damaged; the sentence says which and what to do.
    """
    directory = path if path.is_dir() else path.parent
    description = read_description(directory)
    _refuse_code(description)
    file = directory / "tokenizer.json" if path.is_dir() else path
    if file.is_file():
        library = _from_file(file)
        _apply_settings(library, description, file)
    elif description.tokenizer_class == SENTENCEPIECE_CLASS:
        return run_by_sentencepiece(description)
    elif has_vocabulary(directory):
        library = build_by_class(description)
    else:
        raise DataError(
            f"{path} describes no tokenizer: it has none of {', '.join(VOCABULARY_FILES)}; "
            "give a directory that has one with --tokenizer-model"
        )
    with as_data_error(f"the tokens that {directory} adds to its vocabulary cannot be added", "repair its files"):
        _add_tokens(library, description)
    library.encode_special_tokens = description.flag("split_special_tokens", False)
    special = _special_ids(library, description)
    # A tokenizer.json says itself what stands around a text, and add_bos_token beside it counts for nothing.
    prefix, suffix = _frame(library) if file.is_file() else _frame_of_class(special, description)
    return LibraryTokenizer(library, replace(special, prefix=prefix, suffix=suffix))


def reading_note(directory: Path) -> str | None:
    """What a user should know of how a directory's tokenizer is read; None where there is one way to read it."""
    description = read_description(directory)
    if (directory / "tokenizer.json").is_file() or not is_unigram_read_as_bpe(description):
        return None
    return (
        f"{directory / 'tokenizer.model'} is a unigram model, and the LlamaTokenizer of transformers 5, whose ids "
        "these are, merges its pieces as BPE and leaves out what it has no piece for; if the model was trained with "
        "sentencepiece itself (as transformers 4 did), use --tokenizer-type Llama2Tokenizer --tokenizer-model FILE"
    )


def _refuse_code(description: Description) -> None:
    name, auto_map = description.tokenizer_class, description.settings.get("auto_map")
    own_code = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    remedy = (
        "import the weights alone (hf-import --no-tokenizer) and give token ids (--tokenizer-type NullTokenizer), or "
        "name another tokenizer"
    )
    if own_code:
        raise DataError(
            f"{description.directory}: the tokenizer is code of its own (auto_map names {own_code!r}), which is never "
            f"run; {remedy}"
        )
    if name in _PYTHON_CLASSES:
        cut = description.settings.get("word_tokenizer_type")
        detail = f" with word_tokenizer_type {cut!r}" if cut else ""
        raise DataError(
            f"{description.directory}: the tokenizer is a {name}{detail}, which cuts texts in Python code of "
            f"transformers, and no file describes it; {remedy}"
        )


def _from_file(file: Path) -> tokenizers.Tokenizer:
    with as_data_error(f"{file} cannot be read as a tokenizer.json", "copy or fetch it again"):
        library = tokenizers.Tokenizer.from_file(str(file))
    library.no_truncation()
    library.no_padding()
    return library


def _apply_settings(library: tokenizers.Tokenizer, description: Description, file: Path) -> None:
    """Settings of tokenizer_config.json that a class puts over its tokenizer.json, whatever that says.

    Raises:
        DataError: the setting is left out, and the class would take another value than the file has.
    """
    here: dict[str, tuple[object, object]] = {}  # setting -> of the file, of the class
    normalizer, cut = library.normalizer, library.pre_tokenizer
    if description.tokenizer_class == "BertTokenizer" and isinstance(normalizer, normalizers.BertNormalizer):
        wanted = bert_normalizer(description)
        here = {
            "do_lower_case": (normalizer.lowercase, wanted.lowercase),
            "strip_accents": (_strips(normalizer, wanted.lowercase), _strips(wanted, wanted.lowercase)),
            "tokenize_chinese_chars": (normalizer.handle_chinese_chars, wanted.handle_chinese_chars),
        }
        library.normalizer = wanted
    elif description.tokenizer_class == "GPT2Tokenizer" and isinstance(cut, pre_tokenizers.ByteLevel):
        adds_space = description.flag("add_prefix_space", False)
        here = {"add_prefix_space": (cut.add_prefix_space, adds_space)}
        cut.add_prefix_space = adds_space
        library.pre_tokenizer = cut
    for name, (of_file, of_class) in here.items():
        if of_file != of_class and name not in description.settings:
            raise DataError(
                f"{file} says {name} {str(of_file).lower()}, and a {description.tokenizer_class} takes "
                f"{str(of_class).lower()} where tokenizer_config.json leaves {name} out, so the directory describes "
                f'two tokenizers; write "{name}": {str(of_file).lower()} into tokenizer_config.json to take what the '
                "file says"
            )


def _strips(normalizer: normalizers.BertNormalizer, lowercase: bool) -> bool:
    """Whether accents go: where nothing is said, with the case."""
    return lowercase if normalizer.strip_accents is None else normalizer.strip_accents


def _add_tokens(library: tokenizers.Tokenizer, description: Description) -> None:
    """The tokens that the description has beyond the vocabulary, and the special ones within it.

    Raises:
        DataError: a token cannot have the id that the description gives it.
    """
    known = {token.content for token in library.get_added_tokens_decoder().values()}

    def add(token: AddedToken) -> None:
        if token.content not in known:
            known.add(token.content)
            library.add_special_tokens([token]) if token.special else library.add_tokens([token])

    for id, token in sorted(description.numbered.items()):
        add(token)
        if library.token_to_id(token.content) != id:
            raise DataError(
                f"{description.directory}: the added token {token.content!r} has the id {id}, and after the vocabulary "
                f"it would be {library.token_to_id(token.content)}; the files are of two tokenizers, put those of one "
                "there"
            )
    for token in (*description.named.values(), *description.extra):
        add(token)
    for name in description.implied.values():
        if library.token_to_id(name) is not None:
            add(AddedToken(name, special=True, normalized=False))


def _special_ids(library: tokenizers.Tokenizer, description: Description) -> SpecialIds:
    def id_of(part: str) -> int | None:
        name = description.name_of(part)
        return None if name is None else library.token_to_id(name)

    eod = id_of("eos_token")
    if eod is None:
        eod = description.ends[0] if description.ends else _end_by_name(library)
    return SpecialIds(
        eod=eod,
        bos=id_of("bos_token"),
        pad=id_of("pad_token"),
        cls=id_of("cls_token"),
        sep=id_of("sep_token"),
        mask=id_of("mask_token"),
        ends=description.ends,
    )


def _end_by_name(library: tokenizers.Tokenizer) -> int | None:
    """The end of a text where `tokenizer.json` alone speaks: its special token of such a name, if it has just one."""
    special = {token.content: id for id, token in library.get_added_tokens_decoder().items() if token.special}
    found = [special[name] for name in _ENDS_BY_NAME if name in special]
    return found[0] if len(found) == 1 else None


def _frame_of_class(special: SpecialIds, description: Description) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that a class puts before and behind a text."""
    first, last = special.bos, special.eod
    if description.tokenizer_class == "BertTokenizer":
        first, last = special.cls, special.sep
    else:
        first = first if description.flag("add_bos_token", False) else None
        last = last if description.flag("add_eos_token", False) else None
    return (() if first is None else (first,)), (() if last is None else (last,))


def _frame(library: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that the post-processor puts before and behind a text."""
    for probe in _PROBES:
        try:
            with as_data_error(f"{probe!r} cannot be encoded", "try another"):
                plain, framed = library.encode(probe, add_special_tokens=False).ids, library.encode(probe).ids
        except DataError:
            continue  # it has neither this character nor an id for unknown ones; a text with it is refused then
        for first in range(len(framed)):
            if plain and framed[first : first + len(plain)] == plain:
                return tuple(framed[:first]), tuple(framed[first + len(plain) :])
    return (), ()
