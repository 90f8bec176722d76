"""Weights remembered, averaged and recalled in a training whose gathers and updates are still under way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.data.loader import GlobalBatches
from megatron3d.models.gpt import build_gpt_stage
from megatron3d.tasks.glue import weights
from megatron3d.tasks.glue.average import WeightAverage, with_averages
from megatron3d.train.setup import TrainingSetup, build_parts
from megatron3d.train.step import train_step
from tests.dist.poison import Detector
from tests.dist.pool import Pool
from tests.parity.runs import RATES, Case, config_of, data_of
from tests.runs.harness import losses, records
from tests.tasks.small import QUIET, bert, tuned, write_hf, write_task

OVERLAP = "--zero-stage 1 --overlap-param-gather"
DELAYED = "--offload-optimizer cpu --offload-delayed-update"


def recalled_wrongly(rank: int, world_size: int, options: str) -> tuple[list[str], list[str]]:
    """Body of a worker: the moments at which the weights are not those that were put there, and the races seen."""
    mesh = make_mesh(Layout(dp=world_size))
    with Detector(seed=rank) as detector:
        config = config_of(Case("gpt2", mesh.layout, options))
        parts = build_parts(config, mesh, torch.device("cpu"), with_averages(build_gpt_stage))
        return _wrong(parts), detector.problems


def _wrong(parts: TrainingSetup) -> list[str]:
    config, readers = parts.config, parts.mesh.batch
    data, size = data_of(config), config.train.global_batch_size
    average, start, wrong = WeightAverage(parts, 0.9), weights.remember(parts), []

    def check(when: str, wanted: dict[str, Tensor]) -> None:
        parts.engine.finish_publish()
        found = weights.remember(parts)
        if any(not torch.equal(found[name], wanted[name]) for name in wanted):
            wrong.append(when)

    with GlobalBatches(data.reader(data.train), num_workers=0) as batches:
        batch = batches.read(0, size, readers.rank, readers.size)
        train_step(parts, batch, RATES, step=0)
        weights.restore(parts, start)
        check("recalled after a step", start)
        train_step(parts, batch, RATES, step=1)
        average.add()
        own = weights.remember(parts)
        with parts.engine.updated_weights(), average.in_place():
            check("averaged", average.means())
        check("after the average", own)
        with parts.engine.updated_weights(), average.in_place():
            pass
        weights.restore(parts, start)
        check("recalled after the average", start)
        train_step(parts, batch, RATES, step=2)
        parts.engine.finish_publish()
    assert any(not torch.equal(one, start[name]) for name, one in own.items()), "nothing was learned"
    return wrong


@pytest.mark.parametrize("options", [OVERLAP, f"{OVERLAP} --bf16", f"{OVERLAP} {DELAYED}"])
def test_recalled_weights_are_those_put_there_though_gathers_are_under_way(pool: Pool, options: str) -> None:
    for wrong, problems in pool.run(2, recalled_wrongly, options):
        assert not wrong and not problems


@pytest.mark.parametrize("average", ["", "--ema-decay 0.8"])
def test_measuring_changes_no_step_of_a_delayed_update_and_predicts_with_what_it_saved(
    tmp_path: Path, average: str
) -> None:
    hf, sts = write_hf(tmp_path / "hf", bert()), write_task("sts-b", tmp_path / "STS-B")
    usual = f"--epochs 3 --lr 5e-3 --max-seq-length 24 --global-batch-size 4 {QUIET}"
    arguments = ("--task sts-b", "--data-dir", sts, "--hf", hf, usual, DELAYED, "--metrics-file")
    tuned(*arguments, tmp_path / "seldom.jsonl")
    during = ("--save", tmp_path / "save", "--predict", tmp_path / "during")
    found = tuned(*arguments, tmp_path / "often.jsonl", f"--eval-interval 2 {average}", *during)
    seldom, often = tmp_path / "seldom.jsonl", tmp_path / "often.jsonl"
    assert losses(often) == losses(seldom)
    by_step = {one["step"]: one["valid_loss"] for one in records(often) if "valid_loss" in one}
    assert len(by_step) == len(set(by_step.values())) == 12
    again = f"--epochs 0 --max-seq-length 24 --global-batch-size 4 {QUIET}"
    after = tuned(
        "--task sts-b", "--data-dir", sts, "--load", tmp_path / "save", again, "--predict", tmp_path / "after"
    )
    assert (after["metrics"], after["loss"]) == (found["metrics"], found["loss"])
    predictions = [(tmp_path / name / "STS-B.tsv").read_text() for name in ("during", "after")]
    assert predictions[0] == predictions[1]
