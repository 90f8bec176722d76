"""Every optimizer trains, comes to the same losses at every layout, and resumes from a checkpoint of any other.

Four steps of the tiny models in fp32, against one process, which takes ten. The updates themselves are compared with
formulas in `tests/zero/test_full_parameters.py`; here the model's gradients differ in their last bits between layouts,
as real ones do.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pytest
import torch

from megatron3d.checkpoint.index import read_index
from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import Mesh, make_mesh
from megatron3d.errors import MisfitError
from megatron3d.optim.schedule import settings_from_config
from megatron3d.train import state
from megatron3d.train.setup import TrainingSetup
from megatron3d.train.step import Rates
from tests.dist.pool import Pool
from tests.parity.compare import AT_ONCE, LOSS_TOLERANCE, relative
from tests.parity.runs import Case, parts_of, trace

NUM_STEPS = 10
LAYOUT_STEPS, HALF = 4, 2
SP = "--sequence-parallel"


@dataclass(frozen=True)
class Choice:
    """An optimizer, a rate that suits it, and the loss that ten steps of a Llama must come below (4.63 before)."""

    options: str
    lr: float
    below: float


CHOICES = {
    "adam": Choice("--optimizer adam", 2e-3, 4.15),
    "adamw": Choice("--optimizer adamw", 2e-3, 4.15),
    "adam-l2": Choice("--optimizer adam --no-decoupled-weight-decay", 2e-3, 4.25),
    "adam-bf16": Choice("--optimizer adam --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16", 2e-3, 4.15),
    "sgd": Choice("--optimizer sgd", 0.1, 4.15),
    "lion": Choice("--optimizer lion", 2e-3, 4.05),
    "lion-bf16": Choice("--optimizer lion --exp-avg-dtype bf16", 2e-3, 4.05),
    "lamb": Choice("--optimizer lamb", 5e-2, 4.2),
    "adafactor": Choice("--optimizer adafactor", 5e-2, 4.2),
    "muon": Choice("--optimizer muon", 2e-3, 4.15),
    "muon-moonlight": Choice("--optimizer muon --muon-nesterov --muon-extra-scale-factor 0.2", 4e-3, 3.85),
    "muon-lion": Choice("--optimizer muon --muon-scalar-optimizer lion --exp-avg-dtype bf16", 2e-3, 4.05),
}

CASES = [
    (name, Case(model, layout, options))
    for layout, options, model, names in [
        (Layout(dp=2), "--zero-stage 1", "gpt2", ("adam-l2", "adam-bf16", "lion-bf16", "muon-lion")),
        (Layout(tp=2), SP, "llama", ("lion", "lamb", "adafactor", "muon")),
        (Layout(dp=2), "--zero-stage 3", "gpt2-words", ("lamb", "adafactor", "muon-moonlight")),
        (Layout(tp=2, dp=2), f"{SP} --zero-stage 2", "llama", ("lamb", "adafactor", "muon", "adam-bf16")),
        (Layout(tp=4), "", "gpt2", ("adafactor", "muon")),
        (Layout(tp=2, dp=2), f"{SP} --zero-stage 3", "bert", ("lamb", "adafactor", "muon")),
        (Layout(pp=2, dp=2), "--zero-stage 1", "gpt2", ("lamb", "muon-lion")),
        (Layout(dp=4, zero_shard=2), "--zero-stage 3 --zero-shard-size 2", "gpt2", ("lamb", "muon")),
        (Layout(tp=2, pp=2), SP, "llama", ("adafactor", "muon")),
    ]
    for name in names
]
# Their axes are cut with these optimizers in other rows, one by one.
SLOW = (Layout(tp=4), Layout(pp=2, dp=2), Layout(dp=4, zero_shard=2))


def _size_and_slowness(case: tuple[str, Case]) -> tuple[int, bool]:
    return case[1].layout.world_size, case[1].layout in SLOW or case[1].model == "bert"


BATCHES = [
    pytest.param(
        size,
        list(group),
        id=f"world{size}{'-slow' if is_slow else ''}",
        marks=[pytest.mark.slow] if is_slow else [],
    )
    for (size, is_slow), group in groupby(sorted(CASES, key=_size_and_slowness), key=_size_and_slowness)
]


def build(name: str, case: Case, mesh: Mesh, extra: str = "") -> TrainingSetup:
    # Large micro-batches: what an optimizer is given are their sums, which other tables are about.
    micro = f"--micro-batch-size {min(4, 8 // case.layout.dp)}" if case.layout.world_size > 1 else AT_ONCE
    return parts_of(Case(case.model, case.layout, f"{case.options} {micro} {CHOICES[name].options} {extra}"), mesh)


def train(name: str, parts: TrainingSetup, steps: range) -> list[float]:
    """Losses of some steps."""
    rates = Rates(lr=CHOICES[name].lr, weight_decay=0.1)
    return trace(parts, num_steps=len(steps), first_step=steps.start, rates=rates).losses


@functools.cache
def reference(name: str, model: str) -> list[float]:
    torch.set_num_threads(1)
    case = Case(model, Layout())
    return train(name, build(name, case, make_mesh(Layout())), range(NUM_STEPS))


def _losses(rank: int, world_size: int, cases: list[tuple[str, Case]]) -> list[list[float]]:
    return [train(name, build(name, case, make_mesh(case.layout)), range(LAYOUT_STEPS)) for name, case in cases]


@pytest.mark.parametrize("name", CHOICES)
def test_ten_steps_lower_the_loss(name: str) -> None:
    losses = reference(name, "llama")
    assert losses[0] == pytest.approx(4.627, abs=1e-3) and losses[-1] < CHOICES[name].below, losses


@pytest.mark.parametrize(("size", "cases"), BATCHES)
def test_losses_equal_those_of_one_process(pool: Pool, size: int, cases: list[tuple[str, Case]]) -> None:
    everyone = pool.run(size, _losses, cases)
    for number, (name, case) in enumerate(cases):
        for losses in everyone:
            error = relative(losses[number], reference(name, case.model)[:LAYOUT_STEPS])
            assert error < LOSS_TOLERANCE, f"{name} at {case}: {error}"


RESUMED = ("adam-bf16", "lion-bf16", "lamb", "adafactor", "muon", "muon-lion")
SAVED_AT = Case("llama", Layout(tp=2, dp=2), f"{SP} --zero-stage 2")


def _save_halfway(rank: int, world_size: int, directory: str) -> None:
    for name in RESUMED:
        parts = build(name, SAVED_AT, make_mesh(SAVED_AT.layout), f"--save {directory}/{name}")
        train(name, parts, range(HALF))
        schedule = settings_from_config(parts.config.optim, parts.config.train)
        state.save(parts, state.Progress(HALF, HALF * 8, HALF, HALF * 8), schedule)


def _resume(rank: int, world_size: int, directory: str, case: Case) -> dict[str, list[float]]:
    losses = {}
    for name in RESUMED:
        parts = build(name, case, make_mesh(case.layout), f"--load {directory}/{name}")
        assert state.restore(parts).progress.step == HALF
        losses[name] = train(name, parts, range(HALF, LAYOUT_STEPS))
    return losses


def test_every_optimizer_goes_on_from_a_checkpoint_of_another_layout(pool: Pool, tmp_path: Path) -> None:
    pool.run(4, _save_halfway, str(tmp_path))
    for name, losses in _resume(0, 1, str(tmp_path), Case("llama", Layout())).items():
        assert relative(losses, reference(name, "llama")[HALF:LAYOUT_STEPS]) < LOSS_TOLERANCE, name
    for found in pool.run(2, _resume, str(tmp_path), Case("llama", Layout(dp=2), "--zero-stage 3")):
        for name, losses in found.items():
            assert relative(losses, reference(name, "llama")[HALF:LAYOUT_STEPS]) < LOSS_TOLERANCE, name


def test_moments_of_another_dtype_are_converted_and_another_optimizer_is_refused(tmp_path: Path) -> None:
    case = Case("gpt2", Layout())
    parts = build("adam-bf16", case, make_mesh(Layout()), f"--save {tmp_path}")
    train("adam-bf16", parts, range(HALF))
    saved = state.save(parts, state.Progress(HALF, HALF * 8, HALF, HALF * 8), settings_from_config(
        parts.config.optim, parts.config.train
    ))  # fmt: skip
    stored = read_index(saved).tensors
    assert {stored[f"exp_avg_sq/{n}"].dtype for n in parts.engine.weight_views()} == {torch.bfloat16}
    wider = build("adamw", case, make_mesh(Layout()), f"--load {tmp_path}")
    state.restore(wider)
    for name, view in wider.engine.state_views(wider.optimizer, "exp_avg_sq").items():
        kept = parts.engine.state_views(parts.optimizer, "exp_avg_sq")[name].data
        assert view.data.dtype == torch.float32 and torch.equal(view.data, kept.float())
    for other in ("lamb", "muon", "lion"):
        with pytest.raises(MisfitError, match=rf"--optimizer adam and this run asks for {other}"):
            state.restore(build(other, case, make_mesh(Layout()), f"--load {tmp_path}"))
