"""The example scripts' command lines are configurations that check out at their world sizes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from megatron3d.config.check import check
from megatron3d.config.cli import parse_args

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
WORLD_SIZES = {"laptop.sh": 4, "gpt3_1.3b_node.sh": 8, "gpt3_175b_slurm.sh": 1024}


def flags_of(script: str) -> list[str]:
    """The words after `pretrain_gpt.py`, with shell variables by name."""
    text = script.replace("\\\n", " ")
    line = next(line for line in text.splitlines() if "pretrain_gpt.py" in line and not line.startswith("#"))
    words = line.split("pretrain_gpt.py", 1)[1].split("||")[0].replace('"$@"', "")
    return shlex.split(re.sub(r"\$(\w+)", r"\1", words))


def test_every_example_is_checked() -> None:
    assert {path.name for path in EXAMPLES.glob("*.sh")} == set(WORLD_SIZES)


@pytest.mark.parametrize("name", WORLD_SIZES)
def test_example_has_no_configuration_problem(name: str) -> None:
    config = parse_args(flags_of((EXAMPLES / name).read_text()), program="test", description="")
    assert check(config, WORLD_SIZES[name]) == []
