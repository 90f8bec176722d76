"""All files that a command names and that are missing are reported together, and beside every other mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron3d.config.cli import read_command
from megatron3d.errors import CheckpointError, ConfigError, DataError
from megatron3d.train.settle import settle_run
from tests.data.corpora import write_documents

SHAPE = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --micro-batch-size 2 --lr 1e-3 "
    "--train-iters 5 --device cpu"
)


def answer(words: str, kind: type[Exception]) -> list[str]:
    """The sentences that a command is refused with."""
    command = read_command(
        f"{SHAPE} {words}".split(), program="pretrain_gpt.py", description="t", log=lambda line: None
    )
    with pytest.raises(kind) as raised:
        settle_run(command, 1)
    return str(raised.value).split("\n")


GPT2 = "--tokenizer-type GPT2BPETokenizer --vocab-file no/vocab.json --merge-file no/merges.txt"
MISSING = [
    "--vocab-file no/vocab.json cannot be found",
    "--merge-file no/merges.txt cannot be found",
    "The data path no/a needs no/a.bin and no/a.idx",
    "The data path no/b needs no/b.bin and no/b.idx",
    "--load no/model is not a directory",
]


@pytest.mark.parametrize(("more", "kind"), [("", DataError), ("--hidden-size 33 --bf16 --fp16", ConfigError)])
def test_all_missing_files_are_reported_at_once_and_beside_other_mistakes(more: str, kind: type[Exception]) -> None:
    sentences = answer(f"{GPT2} --data-path 0.5 no/a 0.5 no/b --load no/model {more}", kind)
    for expected in MISSING:
        assert [sentence for sentence in sentences if sentence.startswith(expected)], expected
    assert len(sentences) == len(MISSING) + (2 if more else 0)


@pytest.mark.parametrize(
    ("words", "kind", "sentence"),
    [
        ("--mock-data --vocab-size 9 --load no/model", CheckpointError, "--load no/model is not a directory"),
        ("--mock-data --tokenizer-type Bogus", ConfigError, "--tokenizer-type Bogus is not known; the kinds are GPT2"),
        ("--mock-data --tokenizer-type HFTokenizer --tokenizer-model no/x", DataError, "--tokenizer-model no/x cannot"),
        ("--mock-data --vocab-file no/vocab.txt", DataError, "--vocab-file no/vocab.txt cannot be found"),
        ("--data-args-path no/args --vocab-size 9", DataError, "--data-args-path no/args cannot be found"),
    ],
)
def test_one_missing_file_is_one_sentence(words: str, kind: type[Exception], sentence: str) -> None:
    (found,) = answer(words, kind)
    assert found.startswith(sentence)


def test_a_file_whose_option_is_misspelt_is_one_sentence_and_a_missing_one_beside_it_another() -> None:
    unknown = "--tokenizer-mdel y is unknown; did you mean --tokenizer-model?"
    assert answer("--mock-data --tokenizer-type HFTokenizer --tokenizer-mdel y", ConfigError) == [unknown]
    both = answer("--mock-data --tokenizer-type HFTokenizer --tokenizer-model no/x --tokenizer-mdel y", ConfigError)
    assert both[0] == unknown and both[1].startswith("--tokenizer-model no/x cannot be found") and len(both) == 2


def test_files_that_are_not_used_may_be_missing_and_a_first_start_has_nothing_to_load(tmp_path: Path) -> None:
    write_documents(tmp_path / "a", [[1, 2]])
    words = f"{SHAPE} --data-path {tmp_path}/a --vocab-size 9 --tokenizer-type NullTokenizer --vocab-file no/vocab"
    words += f" --save {tmp_path}/save --load {tmp_path}/save"
    command = read_command(words.split(), program="pretrain_gpt.py", description="t", log=lambda line: None)
    assert settle_run(command, 1)[0].model.vocab_size == 10
