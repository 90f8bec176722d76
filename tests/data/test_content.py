"""Digests of token files and tokenizers: what they cover, and what counts as the same data."""

from __future__ import annotations

import hashlib
import os
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron3d.config.resume import Effect
from megatron3d.config.sections.data import DataConfig
from megatron3d.config.sections.data_efficiency import CurriculumConfig
from megatron3d.data.content import (
    BLOCK_BYTES,
    NUM_BLOCKS,
    Content,
    block_offsets,
    content_differences,
    content_from_json,
    content_of,
    corpus_digest,
    moved,
    require_same_tokenizer,
)
from megatron3d.data.hf_description import described_files
from megatron3d.errors import ConfigError, DataError

WHOLE = NUM_BLOCKS * BLOCK_BYTES


def write_pair(prefix: Path, *, bin_bytes: bytes = b"tokens", idx_bytes: bytes = b"index") -> Path:
    prefix.with_suffix(".bin").write_bytes(bin_bytes)
    prefix.with_suffix(".idx").write_bytes(idx_bytes)
    return prefix


def of(*words: str | Path, **more: object) -> Content:
    return content_of(DataConfig(data_path=tuple(map(str, words)), **more), vocab_size=100)


@given(st.integers(0, 50 * WHOLE))
def test_blocks_lie_within_the_file_and_hold_its_begin_and_end(size: int) -> None:
    offsets = list(block_offsets(size))
    covered = [(offset, min(offset + BLOCK_BYTES, size)) for offset in offsets]
    assert all(0 <= begin < end <= size for begin, end in covered)
    assert sum(end - begin for begin, end in covered) <= WHOLE
    if size:
        assert covered[0][0] == 0 and covered[-1][1] == size
    if size <= WHOLE:
        assert sum(end - begin for begin, end in covered) == size
    else:
        distances = {later - earlier for earlier, later in pairwise(offsets)}
        assert max(distances) - min(distances) <= 1


def test_the_digest_is_that_of_sizes_and_blocks(tmp_path: Path) -> None:
    """Recomputed here by slices."""
    data = os.urandom(3 * WHOLE + 5)
    write_pair(tmp_path / "a", bin_bytes=data)
    expected = hashlib.sha256(b".idx 5\nindex" + f".bin {len(data)}\n".encode())
    for number in range(NUM_BLOCKS):
        begin = number * (len(data) - BLOCK_BYTES) // (NUM_BLOCKS - 1)
        expected.update(data[begin : begin + BLOCK_BYTES])
    assert corpus_digest(str(tmp_path / "a")) == expected.hexdigest()


@pytest.mark.parametrize("place", [0, 100, WHOLE // 2, WHOLE - 1])
def test_any_changed_byte_of_a_small_file_is_seen(tmp_path: Path, place: int) -> None:
    data = bytearray(WHOLE)
    before = corpus_digest(str(write_pair(tmp_path / "a", bin_bytes=bytes(data))))
    data[place] = 1
    assert corpus_digest(str(write_pair(tmp_path / "a", bin_bytes=bytes(data)))) != before


def test_a_file_of_another_length_is_another_one_whatever_its_blocks(tmp_path: Path) -> None:
    sizes = (5 * WHOLE, 5 * WHOLE + 2)
    assert len({corpus_digest(str(write_pair(tmp_path / "a", bin_bytes=bytes(size)))) for size in sizes}) == 2


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write_pair(tmp_path / "a").with_suffix(".bin").unlink()
    with pytest.raises(DataError, match=r"a\.bin cannot be read"):
        corpus_digest(str(tmp_path / "a"))


def test_content_is_stored_and_read_back(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n")
    found = of(
        "0.25", write_pair(tmp_path / "a"), "0.75", write_pair(tmp_path / "b"),
        tokenizer_type="BertWordPieceCase", vocab_file=str(tmp_path / "vocab.txt"),
    )  # fmt: skip
    assert content_from_json(found.to_json()) == found
    assert [one.share for one in found.corpora["all"]] == ["1/4", "3/4"]


def test_share_and_content_make_a_blend_and_places_do_not(tmp_path: Path) -> None:
    a, b = write_pair(tmp_path / "a"), write_pair(tmp_path / "b", bin_bytes=b"other")
    same = write_pair(tmp_path / "same")
    saved = of("1", a, "3", b)
    assert content_differences(saved, of("0.25", same, "0.75", b)) == []
    assert moved(saved, of("0.25", same, "0.75", b)) == [f"{a} has moved to {same}, with the same content"]
    assert content_differences(saved, of("3", b, "1", a)) == [], "the order of corpora says nothing"
    reweighted = [of("3", a, "1", b), of("1", b, "3", a), of(a, b)]
    replaced = [of(a), of("1", a, "3", a), of("1", a, "3", b, "1", a)]
    for effect, others in ((Effect.REPORTED, reweighted), (Effect.SAMPLES, replaced)):
        for other in others:
            (found,) = content_differences(saved, other)
            assert (found.effect, found.option) == (effect, "the data of --data-path")
    for other in (of("3", b, "1", a), *reweighted, *replaced):
        (found,) = content_differences(saved, other, continues=False)
        assert found.effect is Effect.SAMPLES, "Megatron-LM's order does not continue a corpus"
    assert content_differences(of(a), of("0.5", same)) == [], "the weight of a single corpus says nothing"


def test_an_index_made_anew_is_another_curriculum_and_a_moved_one_is_not(tmp_path: Path) -> None:
    for name, order in (("a", b"0123"), ("same", b"0123"), ("other", b"1023")):
        (tmp_path / name / "rarity").mkdir(parents=True)
        (tmp_path / name / "rarity" / "order.u32").write_bytes(order)
        (tmp_path / name / "rarity" / "value.f32").write_bytes(b"5678")
    corpus = write_pair(tmp_path / "corpus")

    def with_index(name: str) -> Content:
        curriculum = CurriculumConfig(curriculum_metric=("rarity",), curriculum_index=(str(tmp_path / name),))
        return content_of(DataConfig(data_path=(str(corpus),)), vocab_size=100, curriculum=curriculum)

    saved = content_from_json(with_index("a").to_json())
    assert saved == with_index("a")
    assert content_differences(saved, with_index("same")) == []
    assert moved(saved, with_index("same")) == [
        f"{tmp_path}/a/rarity has moved to {tmp_path}/same/rarity, with the same content"
    ]
    (found,) = content_differences(saved, with_index("other"))
    assert (found.effect, found.option) == (Effect.SAMPLES, "the indexes of --curriculum-metric")
    assert content_differences(of(corpus), with_index("a")) == [], "a version that stored none says nothing"


def test_a_file_of_words_means_its_words(tmp_path: Path) -> None:
    a = write_pair(tmp_path / "a")
    (tmp_path / "words").write_text(f"{a}")
    assert content_of(DataConfig(data_args_path=str(tmp_path / "words")), vocab_size=1) == of(a)


def test_kinds_of_one_tokenizer_model_are_the_same_and_its_settings_count(tmp_path: Path) -> None:
    (tmp_path / "m.model").write_bytes(b"model")
    (tmp_path / "tokenizer.json").write_text("{}")
    model = {"tokenizer_model": str(tmp_path / "m.model")}
    llama, plain = (of(tokenizer_type=kind, **model) for kind in ("Llama2Tokenizer", "SentencePieceTokenizer"))
    assert content_differences(llama, plain) == []
    hugging = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(tmp_path)}
    before = of(**hugging)
    assert content_differences(before, of(**{**hugging, "tokenizer_model": str(tmp_path / "tokenizer.json")})) == []
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "a"}')
    (found,) = content_differences(before, of(**hugging))
    assert (found.effect, found.option) == (Effect.SAMPLES, "the tokenizer")


@pytest.mark.parametrize("name", ["vocab.txt", "added_tokens.json", "tokenizer_config.json", "config.json"])
def test_all_that_makes_the_ids_of_a_described_tokenizer_counts(tmp_path: Path, name: str) -> None:
    """A directory without a tokenizer.json: its copy is the same, and one more byte in any of its files is not."""
    there, copied = tmp_path / "there", tmp_path / "copied"
    there.mkdir()
    (there / "vocab.txt").write_text("[UNK]\na\n")
    (there / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    (there / "added_tokens.json").write_text('{"b": 2}')
    (there / "config.json").write_text('{"model_type": "bert", "hidden_size": 8}')
    copied.mkdir()
    for file, content in described_files(there).items():
        (copied / file).write_bytes(content)
    before, same = (
        of(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder)) for folder in (there, copied)
    )
    assert content_differences(before, same) == [] and len(moved(before, same)) == 4
    named = of(tokenizer_type="HuggingFaceTokenizer", vocab_file=str(there / "vocab.txt"))
    assert content_differences(before, named) == []
    changed = {"vocab.txt": "[UNK]\nc\n", "config.json": '{"model_type": "gpt2"}'}.get(name, "{}")
    (there / name).write_text(changed)
    (found,) = content_differences(before, of(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(there)))
    assert (found.effect, found.option) == (Effect.SAMPLES, "the tokenizer")


def test_a_described_tokenizer_that_is_gone_is_named(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("another one's")
    with pytest.raises(DataError, match="gone of the tokenizer cannot be read"):
        of(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "gone"))


def test_a_tokenizer_of_other_content_is_refused_by_name(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).write_text(name)
    options = {"tokenizer_type": "BertWordPieceCase"}
    saved = of(vocab_file=str(tmp_path / "old"), **options)
    new = DataConfig(vocab_file=str(tmp_path / "new"), **options)
    with pytest.raises(ConfigError, match=r"new \(digest .*--override-tokenizer"):
        require_same_tokenizer(saved, new, 100, source=tmp_path)
    (tmp_path / "new").write_text("old")
    require_same_tokenizer(saved, new, 100, source=tmp_path)
    require_same_tokenizer(None, new, 100, source=tmp_path)
