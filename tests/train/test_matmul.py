"""Which library multiplies: chosen once by rank 0, kept in the checkpoint, forced by a flag; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.config.check import resolve
from megatron3d.config.cli import parse_args
from megatron3d.config.run import RunConfig
from megatron3d.config.sections.checkpoint import CheckpointConfig
from megatron3d.errors import ConfigError
from megatron3d.train import matmul
from megatron3d.train.matmul import LibraryRates, stored_choice, with_matmul
from tests.dist.pool import Pool
from tests.runs.harness import MOCK, losses, run_ok

CPU = torch.device("cpu")
# Large enough to be measured: a product of 2 x 128 x 256 x 1024 operations.
WIDER = MOCK.replace("--hidden-size 32", "--hidden-size 256").replace("--seq-length 16", "--seq-length 128")
BEFORE = Path(__file__).parents[1] / "checkpoint" / "written_before" / "gpt"


def config_of(flags: str) -> RunConfig:
    return resolve(parse_args(flags.split(), program="test", description="test"), 1)


def chosen(flags: str, device: torch.device = CPU) -> RunConfig:
    return with_matmul(config_of(flags), make_mesh(Layout()), device)


@pytest.mark.parametrize(
    ("rates", "choice"),
    [(LibraryRates(100, 240), "onednn"), (LibraryRates(158, 129), "mkl"), (LibraryRates(100, 125), "mkl")],
)
def test_onednn_is_chosen_where_it_is_clearly_faster_and_both_rates_are_printed(
    rates: LibraryRates, choice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with mock.patch.object(matmul, "measure", return_value=rates) as measured:
        config = chosen(WIDER)
    assert measured.call_args.args == (128, 256, 1024)
    assert config.train.matmul == choice and config.as_given["train", "matmul"] == "auto"
    line = f"(mkl) {rates.mkl} GFLOP/s, oneDNN {rates.onednn}: {choice} is used; --matmul mkl or --matmul onednn"
    assert line in capsys.readouterr().out


def test_a_real_measurement_gives_both_rates() -> None:
    rates = matmul.measure(128, 128, 512)
    assert rates.mkl > 0.1 and rates.onednn > 0.1


def test_nothing_is_measured_where_it_is_forced_or_would_not_matter() -> None:
    with mock.patch.object(matmul, "measure", side_effect=AssertionError):
        assert chosen(f"{WIDER} --matmul mkl").train.matmul == "mkl"
        assert chosen(f"{WIDER} --matmul onednn").train.matmul == "onednn"
        assert chosen(f"{WIDER} --bf16").train.matmul == "auto"
        assert chosen(WIDER.replace("--device cpu", ""), torch.device("meta")).train.matmul == "auto"
        assert chosen(MOCK).train.matmul == "mkl"  # too small to be measured


def test_onednn_is_refused_where_it_is_not() -> None:
    with pytest.raises(ConfigError, match="--matmul onednn is for products in fp32, not --bf16"):
        config_of(f"{MOCK} --matmul onednn --bf16")
    with pytest.raises(ConfigError, match="--matmul onednn is for products on a CPU, and --device is cuda"):
        config_of(f"{MOCK} --matmul onednn --device cuda")
    with pytest.raises(ConfigError, match="the device is meta; give --device cpu"):
        chosen(f"{MOCK} --matmul onednn", torch.device("meta"))
    with (
        mock.patch.object(matmul, "has_onednn", return_value=False),
        pytest.raises(ConfigError, match="--matmul onednn needs a torch that is built with oneDNN"),
    ):
        chosen(f"{MOCK} --matmul onednn")


def test_without_onednn_auto_is_torchs_own_library() -> None:
    with (
        mock.patch.object(matmul, "has_onednn", return_value=False),
        mock.patch.object(matmul, "measure", side_effect=AssertionError),
    ):
        assert chosen(WIDER).train.matmul == "mkl"


def choice_on_rank(rank: int, world_size: int) -> str:
    """Body of a worker: each rank would measure something else."""
    config = resolve(parse_args(MOCK.split(), program="test", description="test"), world_size)
    with mock.patch.object(matmul, "_measured_choice", return_value="mkl" if rank else "onednn"):
        return with_matmul(config, make_mesh(Layout(dp=world_size)), CPU).train.matmul


def test_all_ranks_take_what_the_first_has_measured(pool: Pool) -> None:
    assert pool.run(2, choice_on_rank) == ["onednn", "onednn"]


def test_a_resume_takes_the_stored_choice_and_gives_the_same_bits(tmp_path: Path) -> None:
    """The first start measures that oneDNN is faster, the second would measure that it is not. The libraries add the
    terms of sums as long as these in different orders."""

    def train(name: str, measured: str, *options: str | Path) -> list[str]:
        where = ("--metrics-file", tmp_path / f"{name}.jsonl", "--save", tmp_path / name)
        with mock.patch.object(matmul, "_measured_choice", return_value=measured):
            return run_ok(MOCK, "--ffn-hidden-size 512", *options, *where).log

    train("whole", "onednn")
    train("own", "mkl")
    train("stopped", "onednn", "--train-iters 3 --lr-decay-iters 6")
    stored = json.loads((tmp_path / "stopped" / "iter_0000003" / "run.json").read_text())
    assert stored["train"]["matmul"] == "onednn" and stored["as_given"]["train"]["matmul"] == "auto"
    train("stopped", "mkl", "--lr-decay-iters 6")
    whole, resumed, other = (losses(tmp_path / f"{name}.jsonl") for name in ("whole", "stopped", "own"))
    assert resumed == whole
    assert other != whole, "the libraries round alike here, so that nothing is shown"
    log = train("stopped", "mkl", "--lr-decay-iters 6 --train-iters 7 --matmul mkl")
    assert any("--matmul: checkpoint onednn, this run mkl" in line for line in log)


def test_a_run_of_an_earlier_version_goes_on_with_torchs_own_library() -> None:
    assert stored_choice(CheckpointConfig(load=str(BEFORE))) == "mkl"
    assert stored_choice(CheckpointConfig(load=str(BEFORE), finetune=True)) is None
    assert stored_choice(CheckpointConfig()) is None
