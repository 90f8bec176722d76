"""Whole runs with a delayed update: saving, stopping and measuring change no loss; others read what they save."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest

from megatron3d.checkpoint.load import tensor_shapes
from megatron3d.train.retention import Retention
from tests.dist.pool import Pool
from tests.runs.harness import MOCK, losses, on_rank, records, run_ok, words

# What a checkpoint of another layout may differ in: see docs/numerics.md, losses of any layout.
OTHER_LAYOUT = 1e-5
SHAPE = f"{MOCK} --lr 1e-2"  # so high that weights one update old give losses that differ by far more
DELAYED = "--offload-delayed-update"
FILES = "--offload-optimizer nvme --offload-dir"
SETTINGS = {
    "one process, host": (1, "--offload-optimizer cpu"),
    "zero 1, files, bf16": (2, f"--zero-stage 1 --overlap-param-gather --bf16 {FILES}"),
    "zero 3, all in files": (2, f"--zero-stage 3 --offload-params nvme {FILES}"),
    "zero 3, all on the host": (2, "--zero-stage 3 --offload-params cpu --offload-optimizer cpu"),
    "fp16 with skipped steps": (1, "--fp16 --initial-loss-scale 4194304 --hysteresis 1 --offload-optimizer cpu"),
    "tied over stages": (2, f"--pipeline-model-parallel-size 2 {FILES}"),
}


def _train(pool: Pool, world_size: int, *options: str | Path, code: int = 0) -> str:
    """Make a run that ends with this code; what its first rank said."""
    ended = pool.run(world_size, on_rank, words(SHAPE, *options))
    assert [one.code for one in ended] == [code] * world_size, ended[0].err
    return ended[0].out


def _options(flags: str, folder: Path) -> list[str | Path]:
    return [DELAYED, flags, folder] if flags.endswith("--offload-dir") else [DELAYED, flags]


def valid_losses(path: Path) -> dict[int, float]:
    """Validation loss by step."""
    return {record["step"]: record["valid_loss"] for record in records(path) if "valid_loss" in record}


@pytest.mark.parametrize(
    "name",  # the place and the stage are in two other rows
    [pytest.param(name, marks=[pytest.mark.slow] if name == "zero 3, all on the host" else []) for name in SETTINGS],
)
def test_a_run_that_saves_measures_stops_and_is_prolonged_has_the_losses_of_one_that_does_nothing_of_it(
    pool: Pool, tmp_path: Path, name: str
) -> None:
    world_size, flags = SETTINGS[name]
    options = _options(flags, tmp_path / "offload")
    quiet, busy = tmp_path / "quiet.jsonl", tmp_path / "busy.jsonl"
    _train(pool, world_size, *options, "--train-iters 9 --metrics-file", quiet)
    looks = words(*options, "--eval-interval 1 --eval-iters 1 --save-interval 2 --save", tmp_path / "save")
    busy_run = [" ".join(map(str, looks)), "--metrics-file", busy]
    _train(pool, world_size, *busy_run, "--train-iters 7 --exit-interval 3", code=75)
    _train(pool, world_size, *busy_run, "--train-iters 7 --exit-interval 6", code=75)
    _train(pool, world_size, *busy_run, "--train-iters 7")  # its last checkpoint is that of an ended run
    _train(pool, world_size, *busy_run, "--train-iters 9")
    assert losses(busy) == losses(quiet)
    assert len(set(losses(quiet))) > 6, "the run does not learn"


@pytest.mark.parametrize("name", ["one process, host", "zero 3, all in files"])
def test_an_evaluation_is_that_of_the_checkpoint_of_its_step(pool: Pool, tmp_path: Path, name: str) -> None:
    """A run without offloading loads the checkpoint and measures: it knows nothing of old weights."""
    world_size, flags = SETTINGS[name]
    measured, again = tmp_path / "measured.jsonl", tmp_path / "again.jsonl"
    looks = "--eval-iters 2 --eval-interval 2 --save-interval 2"
    options = _options(flags, tmp_path / "offload")
    _train(pool, world_size, *options, looks, "--metrics-file", measured, "--save", tmp_path / "save")
    found = valid_losses(measured)
    assert sorted(found) == [2, 4, 6] and len(set(found.values())) == 3
    for step, loss in found.items():
        load = f"--load {tmp_path / 'save'} --ckpt-step {step} --train-iters {step} --eval-iters 2"
        _train(pool, 1, load, "--metrics-file", again)
        assert valid_losses(again)[step] == pytest.approx(loss, rel=OTHER_LAYOUT)
        again.unlink()


def test_a_resume_at_another_layout_takes_the_delay_along(pool: Pool, tmp_path: Path) -> None:
    whole, save = tmp_path / "whole.jsonl", tmp_path / "save"
    _train(pool, 1, f"{DELAYED} --offload-optimizer cpu --metrics-file", whole)
    first = [DELAYED, f"--zero-stage 3 --offload-params nvme {FILES}", tmp_path / "offload"]
    _train(pool, 2, *first, "--exit-interval 3 --save", save, code=75)
    layouts = ["--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2", "--zero-stage 2", ""]
    for number, layout in enumerate(layouts):
        metrics = tmp_path / f"{number}.jsonl"
        rest = f"{DELAYED} --offload-optimizer cpu {layout} --load {save} --metrics-file"
        _train(pool, 2 if layout else 1, rest, metrics)
        found = [record["loss"] for record in records(metrics) if "loss" in record]
        assert found == pytest.approx(losses(whole)[3:], rel=OTHER_LAYOUT), layout


def test_a_run_that_does_not_delay_reads_the_updated_weights_and_the_reverse_begins_to_delay(
    pool: Pool, tmp_path: Path
) -> None:
    delayed, plain = tmp_path / "delayed", tmp_path / "plain"
    host = "--offload-optimizer cpu"
    _train(pool, 1, DELAYED, host, "--train-iters 3 --save", delayed)
    _train(pool, 1, "--train-iters 3 --save", plain)
    names = tensor_shapes(delayed / "iter_0000003")
    old = {name.removeprefix("old_weights/") for name in names if name.startswith("old_weights/")}
    assert old == {name.removeprefix("model/") for name in tensor_shapes(plain / "iter_0000003") if "model/" in name}

    def resumed(load: Path, *options: str) -> tuple[str, float]:
        metrics = tmp_path / "metrics.jsonl"
        said = _train(pool, 1, f"--load {load} --train-iters 4", *options, "--metrics-file", metrics)
        return said, next(record["loss"] for record in records(metrics) if "loss" in record)

    as_saved, undelayed = resumed(delayed, DELAYED, host), resumed(delayed)
    assert "delayed update" not in as_saved[0]
    assert "holds a delayed update that is due; without --offload-delayed-update" in undelayed[0]
    assert as_saved[1] != undelayed[1], "the old weights give the loss of the updated ones"
    begins, usual = resumed(plain, DELAYED, host), resumed(plain)
    assert "no delayed update was due in the checkpoint" in begins[0]
    assert "delayed update" not in usual[0]
    assert begins[1] == usual[1]


@pytest.mark.parametrize(("options", "proved"), [("", [0, 1, 2, 3]), (DELAYED, [0, 0, 1, 2])])
def test_a_finite_step_proves_the_weights_that_it_computed_with(options: str, proved: list[int]) -> None:
    """Else a checkpoint would be pruned behind one whose weights no step has used yet."""
    with mock.patch.object(Retention, "proved") as noted:
        run_ok(f"{SHAPE} --train-iters 4 --offload-optimizer cpu {options}")
    assert [call.args[0] for call in noted.call_args_list] == proved
