"""The tokenizer that a Hugging Face directory describes: the ids of transformers for each kind of directory, or a
sentence that says why it cannot be taken."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron3d.data.hf_tokenizer import described_tokenizer, reading_note
from megatron3d.data.tokenizer import build_tokenizer
from megatron3d.errors import DataError, Megatron3dError
from tests.data.corpora import SHARED, needs_shared
from tests.data.hf_directories import (
    END,
    GENERIC,
    KINDS,
    START,
    TEXTS,
    Vocabularies,
    byte_level,
    make,
    vocabularies,  # noqa: F401
    word_pieces,
)
from tests.files.mutations import DEEP, mutated_bytes

transformers = pytest.importorskip("transformers")
_SPECIAL = ("eos", "bos", "pad", "cls", "sep", "mask")
PUBLISHED = Vocabularies(
    SHARED / "tokenizers/gpt2",
    SHARED / "tokenizers/bert-base-uncased/vocab.txt",
    SHARED / "tokenizers/sentencepiece/test_model.model",
)


def theirs_of(directory: Path) -> Any:
    """transformers' tokenizer of a directory, which neither cuts nor pads what it is given."""
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    if theirs.is_fast:
        theirs._tokenizer.no_truncation()
        theirs._tokenizer.no_padding()
    return theirs


def assert_same_ids(directory: Path, texts: Sequence[str]) -> None:
    """Ours gives the ids of transformers for each of `texts`."""
    ours, theirs = described_tokenizer(directory), theirs_of(directory)
    expected = theirs(list(texts), add_special_tokens=False)["input_ids"]
    for text, here, there in zip(texts, ours.encode_batch(texts), expected, strict=True):
        assert here == there, f"{directory.name}: {text[:80]!r}"


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_each_kind_of_directory_are_those_of_transformers(
    kind: str,
    tmp_path: Path,
    vocabularies: Vocabularies,  # noqa: F811
) -> None:
    directory = make(kind, tmp_path / "there", vocabularies)
    assert_same_ids(directory, TEXTS)
    ours, theirs = described_tokenizer(directory), theirs_of(directory)
    assert ours.vocab_size == len(theirs)
    framed = theirs(TEXTS[0])["input_ids"]
    assert [*ours.prefix, *ours.encode(TEXTS[0]), *ours.suffix] == framed
    named = [getattr(theirs, f"{part}_token_id") for part in _SPECIAL]
    # A tokenizer.json alone may still say with which of its special tokens a text ends.
    assert [ours.eod if theirs.eos_token else None, ours.bos, ours.pad, ours.cls, ours.sep, ours.mask] == named


def multilingual(each: int | None = None) -> list[str]:
    """The texts of all languages, or the beginning of each text and `each` paragraphs a language."""
    found: list[str] = []
    seen: dict[str, int] = {}
    for name in ("udhr", "xquad-contexts"):
        with gzip.open(SHARED / f"multilingual/{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            for line in lines:
                document = json.loads(line)
                seen[document["lang"]] = seen.get(document["lang"], 0) + 1
                if each is None or seen[document["lang"]] <= each:
                    found.append(document["text"] if each is None else document["text"][:1500])
    assert len(seen) > 119
    return found


@needs_shared
@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_published_vocabularies_are_those_of_transformers_in_every_script(kind: str, tmp_path: Path) -> None:
    assert_same_ids(make(kind, tmp_path / "there", PUBLISHED), multilingual(each=3))


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_all_multilingual_text_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    assert_same_ids(make(kind, tmp_path / "there", PUBLISHED), multilingual())


def directory_of(folder: Path, *sources: Path, config: dict[str, Any] | None = None, model: str = "llama") -> Path:
    """A directory with copies of files, what tokenizer_config.json says, and a kind of model."""
    folder.mkdir(parents=True)
    for source in sources:
        shutil.copy(source, folder / source.name)
    (folder / "config.json").write_text(json.dumps({"model_type": model}))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


REFUSED: dict[str, tuple[str, dict[str, Any] | None, str, str]] = {
    "MeCab": (
        *("bert", {"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "mecab"}, "bert"),
        "BertJapaneseTokenizer with word_tokenizer_type 'mecab', which cuts texts in Python code",
    ),
    "code of its own": (
        *("bert", {"auto_map": {"AutoTokenizer": ["mine.Tokenizer", None]}}, "bert"),
        r"is code of its own \(auto_map names \['mine.Tokenizer', None\]\), which is never run",
    ),
    "a class that needs more than its files": (
        *("gpt2", {"tokenizer_class": "RobertaTokenizer"}, "gpt2"),
        r"has a RobertaTokenizer and no tokenizer\.json; .* write tokenizer\.json with transformers",
    ),
    "no class": ("spm", None, "llama", "neither tokenizer_config.json nor config.json names the class"),
    "files of another class": (
        *("spm", {"tokenizer_class": "GPT2Tokenizer"}, "llama"),
        "has a GPT2Tokenizer and no vocab.json and no merges.txt",
    ),
    "an id that cannot be": (
        *("gpt2", {"added_tokens_decoder": {"9000": {"content": "<x>"}}}, "gpt2"),
        "added token '<x>' has the id 9000, and after the vocabulary it would be",
    ),
    "a value of another type": (
        *("bert", {"do_lower_case": "yes"}, "bert"),
        "tokenizer_config.json: do_lower_case is 'yes' and must be true or false",
    ),
    "a class of another type": ("bert", {"tokenizer_class": 3}, "bert", "tokenizer_class is 3 and must be the name"),
    "no token": ("gpt2", {"eos_token": {"name": "x"}}, "gpt2", "{'name': 'x'} is no description of a token"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_taken_is_refused_with_the_reason(
    name: str,
    tmp_path: Path,
    vocabularies: Vocabularies,  # noqa: F811
) -> None:
    kind, config, model, sentence = REFUSED[name]
    gpt2 = (vocabularies.gpt2 / "vocab.json", vocabularies.gpt2 / "merges.txt")
    sources = {"bert": (vocabularies.bert,), "gpt2": gpt2, "spm": (vocabularies.sentencepiece,)}[kind]
    directory = directory_of(tmp_path / "there", *sources, config=config, model=model)
    if kind == "spm":
        (directory / "spm.model").rename(directory / "tokenizer.model")
    with pytest.raises(DataError, match=sentence):
        described_tokenizer(directory)


DAMAGED: dict[str, Callable[[Path], object]] = {
    "tokenizer_config.json": lambda folder: (folder / "tokenizer_config.json").write_text("[" * 100_000),
    "special_tokens_map.json": lambda folder: (folder / "special_tokens_map.json").write_text("[]"),
    "added_tokens.json": lambda folder: (folder / "added_tokens.json").write_text('{"a": "b"}'),
    "generation_config.json": lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": "</s>"}'),
    "tokenizer.json": lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff{"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named(name: str, tmp_path: Path, vocabularies: Vocabularies) -> None:  # noqa: F811
    directory = directory_of(tmp_path / "there", vocabularies.bert, model="bert")
    DAMAGED[name](directory)
    with pytest.raises(DataError, match=rf"{directory}/{name}"):
        described_tokenizer(directory)


@pytest.mark.parametrize(
    ("values", "setting"),
    [
        ({"lowercase": False}, "do_lower_case false, and a BertTokenizer takes true"),
        ({"strip_accents": False}, "strip_accents false, and a BertTokenizer takes true"),
        ({"handle_chinese_chars": False}, "tokenize_chinese_chars false, and a BertTokenizer takes true"),
    ],
)
def test_a_tokenizer_json_against_what_its_class_would_take_is_refused_until_the_setting_is_written(
    values: dict[str, bool],
    setting: str,
    tmp_path: Path,
    vocabularies: Vocabularies,  # noqa: F811
) -> None:
    directory = directory_of(tmp_path / "there", model="bert")
    library = word_pieces(vocabularies.bert, **values)
    library.save(str(directory / "tokenizer.json"))
    with pytest.raises(DataError, match=setting):
        described_tokenizer(directory)
    name, value = setting.split(",")[0].split()
    (directory / "tokenizer_config.json").write_text(json.dumps({name: value == "true"}))
    assert_same_ids(directory, TEXTS)
    assert described_tokenizer(directory).encode_batch(TEXTS) == [
        library.encode(text, add_special_tokens=False).ids for text in TEXTS
    ]


def test_a_tokenizer_json_counts_whatever_class_is_named_beside_it(tmp_path: Path) -> None:
    """transformers 5 rebuilds a GPT2Tokenizer without the file's pre-tokenizer: numbers are cut as no model learned."""
    library = byte_level(digits=True)
    directory = directory_of(tmp_path / "there", config={"tokenizer_class": "GPT2Tokenizer"})
    library.save(str(directory / "tokenizer.json"))
    ids = described_tokenizer(directory).encode("1898 people")
    assert ids == library.encode("1898 people").ids and len(ids) > len(byte_level().encode("1898 people").ids)


def test_ends_are_those_of_the_generation_config_then_of_the_config_then_the_end_token(tmp_path: Path) -> None:
    directory = directory_of(tmp_path / "there", config=GENERIC)
    byte_level().save(str(directory / "tokenizer.json"))
    assert (described_tokenizer(directory).eod, described_tokenizer(directory).ends) == (0, (0,))
    (directory / "config.json").write_text('{"eos_token_id": 7}')
    assert described_tokenizer(directory).ends == (7,)
    (directory / "generation_config.json").write_text('{"eos_token_id": [1, 0]}')
    assert (described_tokenizer(directory).eod, described_tokenizer(directory).ends) == (0, (1, 0))


def test_an_end_is_taken_by_its_name_only_where_there_is_one(tmp_path: Path) -> None:
    library = byte_level()
    library.save(str(tmp_path / "one.json"))
    assert build_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "one.json")).eod == 0
    library.add_special_tokens(["</s>"])
    library.save(str(tmp_path / "two.json"))
    assert build_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "two.json")).eod is None


def test_a_file_of_the_directory_stands_for_it(tmp_path: Path, vocabularies: Vocabularies) -> None:  # noqa: F811
    directory = directory_of(tmp_path / "there", vocabularies.bert, config={"strip_accents": False}, model="bert")
    named = build_tokenizer("HuggingFaceTokenizer", vocab_file=str(directory / "vocab.txt"))
    assert named.encode_batch(TEXTS) == described_tokenizer(directory).encode_batch(TEXTS)


@needs_shared
def test_a_unigram_model_that_a_class_reads_as_bpe_is_said(tmp_path: Path, vocabularies: Vocabularies) -> None:  # noqa: F811
    directory = make("sentencepiece", tmp_path / "unigram", PUBLISHED)
    assert "is a unigram model" in (reading_note(directory) or "")
    assert reading_note(make("sentencepiece", tmp_path / "bpe", vocabularies)) is None


def test_special_tokens_of_a_text_are_found_as_transformers_finds_them(tmp_path: Path) -> None:
    """A model that was trained on chats must get the id of their tokens, not those of their letters."""
    directory = directory_of(tmp_path / "there", config=GENERIC)
    byte_level().save(str(directory / "tokenizer.json"))
    assert described_tokenizer(directory).encode(f"{START}there{END}")[0::2][:1] == [1]
    (directory / "tokenizer_config.json").write_text(json.dumps(GENERIC | {"split_special_tokens": True}))
    assert_same_ids(directory, TEXTS)
    assert 1 not in described_tokenizer(directory).encode(START)


# --- damaged ---


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", b"[1]", "it holds a list and must hold an object"),
        ("tokenizer_config.json", DEEP.encode(), "it is nested too deep"),
        ("tokenizer_config.json", b'{"do_lower_case": "false"}', "do_lower_case is 'false' and must be true or false"),
        ("tokenizer_config.json", b'{"eos_token": 7}', "7 is no description of a token"),
        ("tokenizer_config.json", b'{"extra_special_tokens": "ab"}', "extra_special_tokens holds a string and must"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"%s": "a"}}' % (b"9" * 5000), "token ids as its keys"),
        ("added_tokens.json", b'{"a": true}', "'a' has the id True"),
        ("generation_config.json", b'{"eos_token_id": [1, true]}', r"eos_token_id is \[1, True\]"),
        ("vocab.txt", "[UNK]\nfür\n".encode("latin-1"), r"there/vocab\.txt cannot be read \(it is not UTF-8"),
        ("tokenizer.json", b'{"a": "\xff"}', r"there/tokenizer\.json cannot be read as a tokenizer\.json"),
    ],
)
def test_a_damaged_description_is_refused_with_the_file_and_the_reason(
    tmp_path: Path,
    vocabularies: Vocabularies,  # noqa: F811
    name: str,
    content: bytes,
    message: str,
) -> None:
    directory = directory_of(tmp_path / "there", vocabularies.bert, model="bert")
    (directory / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as refusal:
        described_tokenizer(directory)
    assert str(directory) in str(refusal.value)


_WORDS = {
    "tokenizer_config.json": {
        **{"tokenizer_class": "BertTokenizer", "do_lower_case": True, "unk_token": "[UNK]", "cls_token": "[CLS]"},
        "extra_special_tokens": ["<e>"],
        "added_tokens_decoder": {"5": {"content": "<f>", "normalized": False, "special": True}},
    },
    "added_tokens.json": {"<g>": 5},
    "special_tokens_map.json": {"eos_token": {"content": "<g>", "lstrip": False}},
    "config.json": {"model_type": "bert", "eos_token_id": [1, 2]},
    "vocab.json": {"a": 0, "b": 1, "ab": 2},
}


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_directory_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    for old in tmp_path.iterdir():
        old.unlink()
    (tmp_path / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\na\n##b\n")
    (tmp_path / "merges.txt").write_text("a b\n")
    which = data.draw(st.sampled_from([*_WORDS]))
    for name, document in _WORDS.items():
        if name == which or data.draw(st.booleans()):
            whole = json.dumps(document).encode()
            (tmp_path / name).write_bytes(data.draw(mutated_bytes(document)) if name == which else whole)
    if which == "vocab.json":
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    try:
        tokenizer = described_tokenizer(tmp_path)
        tokenizer.decode(tokenizer.encode("ab? ba <f>"))
    except Megatron3dError:
        return
