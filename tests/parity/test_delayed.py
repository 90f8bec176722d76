"""A delayed update against one that is put off by hand, without a thread, and against whatever may race it."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.train.setup import TrainingSetup
from megatron3d.zero.unit import FlatUnit
from tests.dist.pool import Pool
from tests.parity.runs import Case, parts_of, trace

NUM_STEPS = 5
DELAYED = "--offload-delayed-update --offload-optimizer nvme --offload-dir DIR"
NUM_RACES = 20
SLOWEST_S = 2e-3


def put_off_updates(parts: TrainingSetup) -> None:
    """Make each update after the backward of the step that follows it."""
    engine, units = parts.engine, parts.engine.units.values()
    finish_reduce, step = engine.finish_reduce, engine.step
    waiting: list[Tensor] = []

    def finish_and_update() -> None:
        finish_reduce()
        if waiting:
            arrived = [unit.own_grads.clone() for unit in units]
            _give(units, waiting)
            step(parts.optimizer)
            _give(units, arrived)

    def put_off(optimizer: torch.optim.Optimizer, *, writes_copies: bool) -> None:
        waiting[:] = [unit.own_grads.clone() for unit in units]

    engine.finish_reduce, engine.step = finish_and_update, put_off


def _give(units: Iterable[FlatUnit], gradients: list[Tensor]) -> None:
    for unit, gradient in zip(units, gradients, strict=True):
        unit.own_grads.copy_(gradient)


def delayed_and_by_hand(rank: int, world_size: int, options: str, directory: str) -> list[list[float]]:
    """Body of a worker: losses of a delayed run, of one whose updates are put off by hand, and of an ordinary one."""
    mesh = make_mesh(Layout(dp=world_size))
    all_options = [f"{options} {DELAYED}".replace("DIR", directory), options, options]
    delayed, by_hand, ordinary = (parts_of(Case("gpt2", mesh.layout, each), mesh) for each in all_options)
    put_off_updates(by_hand)
    return [trace(parts, num_steps=NUM_STEPS).losses for parts in (delayed, by_hand, ordinary)]


@pytest.mark.parametrize(("world_size", "options"), [(1, ""), (2, "--zero-stage 2")])
def test_a_delayed_update_uses_weights_that_are_one_update_old(
    pool: Pool, tmp_path: Path, world_size: int, options: str
) -> None:
    delayed, by_hand, ordinary = pool.run(world_size, delayed_and_by_hand, options, str(tmp_path))[0]
    assert delayed == by_hand
    assert delayed[:1] == ordinary[:1] and delayed[1] != ordinary[1]


@contextmanager
def _restless_threads() -> Iterator[None]:
    """Let threads take turns as often as Python can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _dawdling(parts: TrainingSetup, generator: random.Random) -> TrainingSetup:
    """Let the thread of the update sleep before it steps each unit, for as long as chance has it, often not at all."""
    naps = (0.0, 0.0, SLOWEST_S / 8, SLOWEST_S)
    parts.optimizer.register_step_pre_hook(lambda *_: time.sleep(generator.choice(naps)))
    return parts


def test_twenty_delayed_runs_whose_threads_race_have_the_losses_of_one_without_a_thread() -> None:
    mesh = make_mesh(Layout())
    by_hand = parts_of(Case("gpt2", mesh.layout), mesh)
    put_off_updates(by_hand)
    expected = trace(by_hand, num_steps=NUM_STEPS)
    case = Case("gpt2", mesh.layout, "--offload-optimizer cpu --offload-delayed-update")
    with _restless_threads():
        for number in range(NUM_RACES):
            found = trace(_dawdling(parts_of(case, mesh), random.Random(number)), num_steps=NUM_STEPS)
            assert (found.losses, found.norms) == (expected.losses, expected.norms), f"run {number}"


def test_old_weights_are_the_same_from_within_an_evaluation_and_however_often_they_are_exchanged() -> None:
    """A stop within an evaluation saves there; blocks that are nested exchange once."""
    mesh = make_mesh(Layout())
    parts = parts_of(Case("gpt2", mesh.layout, "--bf16 --offload-optimizer cpu --offload-delayed-update"), mesh)
    engine = parts.engine
    trace(parts, num_steps=3)
    assert engine.is_update_due
    before = _old_weights(parts)
    with engine.updated_weights():
        shown = _layers(parts)
        with engine.updated_weights():
            assert _layers(parts) == shown and _old_weights(parts) == before
        assert _layers(parts) == shown
    assert _layers(parts) == before != shown
    engine.finish_update()
    assert not engine.is_update_due and not _old_weights(parts)
    assert _layers(parts) == shown


def _old_weights(parts: TrainingSetup) -> dict[str, list[float]]:
    with parts.engine.states_opened(parts.optimizer, writes=False):
        return {name: view.data.tolist() for name, view in parts.engine.old_weight_views().items()}


def _layers(parts: TrainingSetup) -> dict[str, list[float]]:
    """What the layers of one process hold, without the padding of the vocabulary, by name."""
    parts.engine.finish_publish()
    return {
        slot.spec.name: unit.view(slot, span, unit.weights.full[span.slice]).data.tolist()
        for unit in parts.engine.units.values()
        for slot, span in unit.held_slots()
    }
