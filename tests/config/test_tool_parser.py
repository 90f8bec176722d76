"""Tools name all that is wrong with their words at once, and read right words as argparse does."""

from __future__ import annotations

import argparse

import pytest

from megatron3d.config.tool_parser import ToolParser
from tools import convert_checkpoint, embed_text, generate_text, verify_checkpoint


def fill(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Some options of each kind."""
    parser.add_argument("--load", required=True)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--kind", choices=("a", "b"), default="a")
    parser.add_argument("--many", nargs="*", type=float, default=[])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", nargs="+")
    source.add_argument("--file")
    parser.add_argument("rest", nargs="*")
    return parser


def problems(parser: ToolParser, words: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(words.split())
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "--load x --file f",
        "--load x --text a b --steps 3 --many 1 2.5 --kind=b",
        "one two --load=x --file f",
        "--load x --file f --many -1 -2",
    ],
)
def test_right_words_are_read_as_by_argparse(words: str) -> None:
    plain = fill(argparse.ArgumentParser(allow_abbrev=False)).parse_args(words.split())
    parser = fill(ToolParser())
    assert parser.parse_args(words.split()) == plain
    assert parser.parse_args(words.split()) == plain, "a parser may be used again"


def test_everything_that_is_wrong_is_named_in_one_answer(capsys: pytest.CaptureFixture[str]) -> None:
    said = problems(fill(ToolParser()), "--laod x --steps many --kind=c --many 1 x --fiel f", capsys)
    assert "argument --steps: invalid int value: 'many'" in said
    assert "argument --kind: invalid choice: 'c'" in said
    assert "argument --many: invalid float value: 'x'" in said
    assert "unrecognized argument: --laod; did you mean --load?" in said
    assert "unrecognized argument: --fiel; did you mean --file?" in said
    assert "the following arguments are required: --load" in said
    assert "one of the arguments --text --file is required" in said
    assert said.count("error:") == 1


def test_a_value_that_is_wrong_is_not_called_missing_too(capsys: pytest.CaptureFixture[str]) -> None:
    parser = ToolParser()
    parser.add_argument("--steps", type=int, required=True)
    said = problems(parser, "--steps x", capsys)
    assert "invalid int value: 'x'" in said and "required" not in said


def test_two_of_which_one_is_allowed_and_a_misspelt_option(capsys: pytest.CaptureFixture[str]) -> None:
    said = problems(fill(ToolParser()), "--load x --text a --file f --stepz 3", capsys)
    assert "not allowed with argument" in said and "--stepz; did you mean --steps?" in said


@pytest.mark.parametrize(
    ("parser", "words", "expected"),
    [
        (generate_text.parser, "--promt x", ("--promt; did you mean --prompt?", "required: --load")),
        (embed_text.parser, "--output-file x", ("--output-file", "is required")),
        (
            generate_text.parser,
            "--tokenizer-t x",
            ("--tokenizer-t; did you mean --tokenizer-type?", "required: --load"),
        ),
        (generate_text.parser, "--max-n 3", ("--max-n; did you mean --max-new-tokens?", "required: --load")),
        (convert_checkpoint.parser, "--laod", ("--laod", "required: action")),
        (verify_checkpoint.parser, "--fulll", ("--fulll", "required: ")),
        (convert_checkpoint.parser, "hf-import --hff x", ("--hff; did you mean --hf?", "required: --hf, --save")),
    ],
)
def test_tools_name_the_misspelt_option_beside_the_missing_ones(
    parser: object, words: str, expected: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    said = problems(parser(), words, capsys)  # type: ignore[operator]
    assert all(one in said for one in expected), said
