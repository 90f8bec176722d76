"""The launcher's variables: what `torchrun` sets is taken as it is, anything else is refused by name and value."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron3d.comm.launch_variables import parse_launch_variables
from megatron3d.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")


def test_a_process_without_a_launcher_is_the_only_one() -> None:
    assert parse_launch_variables({}) == dict(zip(NAMES, (0, 1, 0, 1, 0)))


@given(local_world=st.integers(1, 8), machines=st.integers(1, 9), restarts=st.integers(0, 3), data=st.data())
def test_what_a_launcher_sets_is_taken(local_world: int, machines: int, restarts: int, data: st.DataObject) -> None:
    local_rank = data.draw(st.integers(0, local_world - 1))
    rank = local_rank + local_world * data.draw(st.integers(0, machines - 1))
    numbers = (rank, local_world * machines, local_rank, local_world, restarts)
    env = {name: str(number) for name, number in zip(NAMES, numbers)} | {"MASTER_PORT": "29500", "HOME": "x"}
    assert parse_launch_variables(env) == dict(zip(NAMES, numbers))


@pytest.mark.parametrize("name", NAMES)
@given(text=st.text(max_size=30).filter(lambda text: not (text.isascii() and text.isdecimal())))
def test_what_is_no_number_is_named(name: str, text: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_launch_variables({name: text})
    assert f"{name}={text} is not a whole number from " in str(refusal.value)


@pytest.mark.parametrize("text", ["", "-1", "1.0", " 1", "1_0", "٣", "9" * 5000, "4294967296", "0x1"])
def test_spellings_that_python_or_nobody_takes_for_a_rank_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a whole number from 0 to 2147483647"):
        parse_launch_variables({"RANK": text})


@pytest.mark.parametrize(
    ("env", "messages"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, ["RANK=2 is not below WORLD_SIZE=2"]),
        ({"WORLD_SIZE": "0"}, ["WORLD_SIZE=0 is not a whole number from 1"]),
        ({"WORLD_SIZE": "4", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, ["LOCAL_RANK=2 is not below LOCAL_WORLD_"]),
        ({"LOCAL_WORLD_SIZE": "2"}, ["LOCAL_WORLD_SIZE=2 is more than WORLD_SIZE=1"]),
        ({"WORLD_SIZE": "2", "MASTER_PORT": "abc"}, ["MASTER_PORT=abc is not a whole number from 1 to 65535"]),
        ({"WORLD_SIZE": "2", "MASTER_PORT": "65536"}, ["MASTER_PORT=65536"]),
        ({"RANK": "a", "WORLD_SIZE": "b", "LOCAL_RANK": "c"}, ["RANK=a", "WORLD_SIZE=b", "LOCAL_RANK=c"]),
    ],
)
def test_contradictions_are_refused_all_at_once(env: dict[str, str], messages: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_launch_variables(env)
    for message in [*messages, "start with torchrun"]:
        assert message in str(refusal.value)


def test_a_port_that_nobody_uses_may_be_anything() -> None:
    assert parse_launch_variables({"MASTER_PORT": "tcp://10.0.0.1:29500"})["WORLD_SIZE"] == 1


def test_a_script_ends_with_a_sentence_and_code_2() -> None:
    options = "--num-layers 1 --hidden-size 32 --num-attention-heads 2 --seq-length 16 --micro-batch-size 1 --mock-data"
    ran = subprocess.run(
        [sys.executable, ROOT / "pretrain_gpt.py", *options.split()],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "RANK": "abc"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ran.returncode == 2 and "Traceback" not in ran.stderr
    assert ran.stderr.startswith(
        "error: the launcher's environment variables cannot be used: RANK=abc is not a whole number"
    )
