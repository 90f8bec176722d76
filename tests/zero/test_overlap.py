"""--overlap-param-gather: from the start of the gathers to the first layer that reads their results, nothing waits."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from megatron3d.comm.collectives import Pending
from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.data.loader import GlobalBatches
from megatron3d.train import step as steps
from megatron3d.zero import buffers
from tests.dist.pool import Pool
from tests.parity.runs import RATES, Case, data_of, parts_of


class Recorded:
    """A gather under way that notes the first wait for it."""

    def __init__(self, pending: Pending, events: list[str], name: str) -> None:
        self._pending, self._events, self._name = pending, events, name

    def wait(self) -> torch.Tensor:
        self._events.append(f"wait {self._name}")
        return self._pending.wait()


def order_of_events(rank: int, world_size: int, options: str) -> list[str]:
    """Starts of gathers, waits for them, and the beginnings of the loop over micro-batches and of layers, in two
    steps."""
    mesh = make_mesh(Layout(dp=world_size))
    parts = parts_of(Case("gpt2", mesh.layout, options), mesh)
    names = {unit.weights._alias.data_ptr(): name for name, unit in parts.engine.units.items()}
    events: list[str] = []
    start, run = buffers.start_all_gather_into, steps.run

    def started(gathered: torch.Tensor, *arguments: Any) -> Recorded:
        events.append(f"gather {names[gathered.data_ptr()]}")
        return Recorded(start(gathered, *arguments), events, names[gathered.data_ptr()])

    def running(*arguments: Any, **more: Any) -> Any:
        events.append("forward")
        return run(*arguments, **more)

    for stage in parts.model.stages.values():
        for number, layer in stage.layers.items():
            layer.register_forward_pre_hook(lambda *_, number=number: events.append(f"layer {number}"))
    data = data_of(parts.config)
    with (
        mock.patch.object(buffers, "start_all_gather_into", started),
        mock.patch.object(steps, "run", running),
        GlobalBatches(data.reader(data.train), num_workers=0) as batches,
    ):
        for step in range(2):
            steps.train_step(parts, batches.read(8 * step, 8, mesh.batch.rank, mesh.batch.size), RATES, step=step)
        parts.engine.finish_publish()
    return events


def test_gathers_are_waited_for_layer_by_layer_in_the_next_forward(pool: Pool) -> None:
    for events in pool.run(2, order_of_events, "--zero-stage 1 --overlap-param-gather"):
        first = events.index("forward")
        second = events.index("forward", first + 1)
        update, forward = events[first + 1 : second], events[second + 1 :]
        gathers = [one.removeprefix("gather ") for one in update if one.startswith("gather")]
        assert len(gathers) > 3
        assert update[-len(gathers) :] == [f"gather {name}" for name in gathers]  # started together, nothing waits
        # A layer begins when its own weights are there, and others are still on their way.
        before_first_layer = forward[: forward.index("layer 0")]
        assert "wait layers.0" in before_first_layer and "wait layers.3" not in before_first_layer, before_first_layer
        assert "wait layers.3" in forward[: forward.index("layer 3")]


def test_without_the_option_the_step_waits_for_its_gathers(pool: Pool) -> None:
    for events in pool.run(2, order_of_events, "--zero-stage 1"):
        first = events.index("forward")
        update = events[first + 1 : events.index("forward", first + 1)]
        assert update[-1].startswith("wait")
