"""The interpreter in real processes: whatever the schedule, losses and gradients are those of one process, bit by bit.

The reference runs the same toy stages one after another in one autograd graph, without schedule, messages or split.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import Axis, Mesh, make_mesh
from megatron3d.comm.meter import Meter
from megatron3d.params.grads import GradSink
from megatron3d.pipeline.lower import lower
from megatron3d.pipeline.orders.named import build_schedule
from megatron3d.pipeline.run import Backward, Wire, run
from megatron3d.pipeline.schedule import Op, Schedule, Step, check
from megatron3d.tensor.context import LayerContext
from megatron3d.tensor.linear import linear
from tests.dist.pool import Pool

B, H = 2, 6  # of a hidden tensor
LOSS_FACTOR = 0.125


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Micro:
    """One micro-batch: what the first stage starts from, and what the last one compares with."""

    x: Tensor
    target: Tensor


def shape_of(mb: int) -> tuple[int, int, int]:
    """The shape of a micro-batch's hidden tensors; neighbours differ in length."""
    return 4 + mb % 3, B, H


def micros_of(number: int) -> list[Micro]:
    return [Micro(random(*shape_of(mb), seed=1000 + mb), random(*shape_of(mb), seed=2000 + mb)) for mb in range(number)]


class ToyStage(nn.Module):
    """A linear layer, whose gradient can be deferred, and a scale, whose gradient comes from autograd."""

    def __init__(self, stage: int, num_stages: int, axis: Axis, sink: GradSink) -> None:
        super().__init__()
        self.context = LayerContext(axis, False, sink)
        self.is_first, self.is_last = stage == 0, stage == num_stages - 1
        self.weight = nn.Parameter(random(H, H, seed=stage))
        self.scale = nn.Parameter(random(H, seed=100 + stage))

    def forward(self, x: Tensor | None, micro: Micro) -> Tensor:
        assert (x is None) == self.is_first, "only the first stage starts from the micro-batch"
        start = micro.x if x is None else x
        y = linear(start, self.weight, None, context=self.context, input_type="local").tanh() * self.scale
        return LOSS_FACTOR * (y - micro.target).square().sum() if self.is_last else y + start


def one_process(num_stages: int, num_microbatches: int) -> tuple[list[Tensor], dict[int, list[Tensor]]]:
    """Losses by micro-batch and gradients by stage, from one graph for each micro-batch."""
    sink, axis = GradSink(), axis_of_one()
    stages = [ToyStage(stage, num_stages, axis, sink) for stage in range(num_stages)]
    losses = []
    for micro in micros_of(num_microbatches):
        y = None
        for stage in stages:
            y = stage(y, micro)
        y.backward()
        losses.append(y.detach())
    return losses, {number: [one.weight.grad, one.scale.grad] for number, one in enumerate(stages)}


def axis_of_one() -> Axis:
    """An axis of one rank, which exists also where torch.distributed has more."""
    return Axis("tp", 1, 0, (0,), None, Meter())


def wire_of(mesh: Mesh, schedule: Schedule) -> Wire:
    shapes = [shape_of(mb) for mb in range(schedule.num_microbatches)]
    return Wire(mesh.pp, shapes, torch.float32, torch.device("cpu"))


def own_stages(schedule: Schedule, rank: int, sink: GradSink) -> dict[int, ToyStage]:
    axis = axis_of_one()
    mine = [stage for stage, place in enumerate(schedule.stage_to_rank) if place == rank]
    return {stage: ToyStage(stage, schedule.num_stages, axis, sink) for stage in mine}


def check_training(mesh: Mesh, schedule: Schedule) -> None:
    """Run a training schedule on this rank and compare with one process."""
    sink, rank = GradSink(), mesh.pp.rank
    stages = own_stages(schedule, rank, sink)
    reduced: dict[int, list[Tensor]] = {}

    def reduce(stage: int) -> None:
        assert stage not in reduced, f"stage {stage} was reduced twice"
        reduced[stage] = [stages[stage].weight.grad.clone(), stages[stage].scale.grad.clone()]

    backward = Backward(sink, reduce)
    micros = micros_of(schedule.num_microbatches)
    results = run(schedule, lower(schedule)[rank], stages, micros, wire=wire_of(mesh, schedule), backward=backward)
    losses, grads = one_process(schedule.num_stages, schedule.num_microbatches)
    has_loss = schedule.num_stages - 1 in stages
    assert len(results) == (schedule.num_microbatches if has_loss else 0)
    assert all(torch.equal(found, loss) and not found.requires_grad for found, loss in zip(results, losses))
    assert set(reduced) == set(stages), "each stage of this rank is reduced, no other"
    for stage, found in reduced.items():
        for here, there in zip(found, grads[stage], strict=True):
            assert torch.equal(here, there), f"{schedule.name}: gradient of stage {stage} on rank {rank}"
        assert torch.equal(stages[stage].weight.grad, grads[stage][0]), "a gradient came after the reduction"


def check_forward(mesh: Mesh, schedule: Schedule) -> None:
    """Run a schedule without backwards: the same losses, and no graph."""
    sink, rank = GradSink(), mesh.pp.rank
    stages = own_stages(schedule, rank, sink)
    micros = micros_of(schedule.num_microbatches)
    results = run(schedule, lower(schedule)[rank], stages, micros, wire=wire_of(mesh, schedule))
    losses, _ = one_process(schedule.num_stages, schedule.num_microbatches)
    assert len(results) == (schedule.num_microbatches if schedule.num_stages - 1 in stages else 0)
    assert all(torch.equal(found, loss) for found, loss in zip(results, losses))
    assert not any(found.requires_grad for found in results)
    assert all(stage.weight.grad is None for stage in stages.values())


def _check_named_orders(rank: int, world_size: int) -> None:
    mesh = make_mesh(Layout(pp=world_size))
    for name, num_microbatches in product(("gpipe", "1f1b"), range(1, 9)):
        check_training(mesh, build_schedule(name, num_ranks=world_size, num_microbatches=num_microbatches))
    for num_microbatches, virtual in product(range(1, 9), (1, 2)):
        schedule = build_schedule(
            "forward-only", num_ranks=world_size, num_microbatches=num_microbatches, virtual=virtual
        )
        check_forward(mesh, schedule)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_named_orders_give_the_bits_of_one_process_with_one_to_eight_microbatches(pool: Pool, num_ranks: int) -> None:
    if num_ranks == 1:
        _check_named_orders(0, 1)
    else:
        pool.run(num_ranks, _check_named_orders)


def steps(text: str) -> tuple[Step, ...]:
    """Steps from words such as `F0.1`: op, stage and micro-batch."""
    return tuple(Step(Op(word[0]), *map(int, word[1:].split("."))) for word in text.split())


def by_hand(name: str, places: tuple[int, ...], num_microbatches: int, *rows: str) -> Schedule:
    schedule = Schedule(name, len(places), num_microbatches, tuple(map(steps, rows)), places)
    check(schedule)
    return schedule


INTERLEAVED = by_hand(
    "interleaved",
    (0, 1, 0, 1),
    2,
    "F0.0 F0.1 F2.0 F2.1 B2.0 B2.1 B0.0 B0.1",
    "F1.0 F1.1 F3.0 B3.0 F3.1 B3.1 B1.0 B1.1",
)
V_SHAPED = by_hand(
    "v-shaped",
    (0, 1, 1, 0),
    2,
    "F0.0 F0.1 F3.0 B3.0 F3.1 B3.1 B0.0 B0.1",
    "F1.0 F2.0 F1.1 F2.1 B2.0 B1.0 B2.1 B1.1",
)
SPLIT = by_hand(
    "split backward",
    (0, 1),
    3,
    "F0.0 F0.1 I0.0 F0.2 I0.1 W0.0 I0.2 W0.1 W0.2",
    "F1.0 I1.0 F1.1 I1.1 F1.2 I1.2 W1.0 W1.1 W1.2",
)
V_SPLIT = by_hand(
    "v-shaped with split and whole backwards",
    (0, 1, 1, 0),
    2,
    "F0.0 F0.1 F3.0 I3.0 F3.1 I3.1 W3.0 W3.1 B0.0 I0.1 W0.1",
    "F1.0 F2.0 F1.1 F2.1 I2.0 I1.0 I2.1 W2.0 B1.1 W1.0 W2.1",
)
ONE_RANK_BY_HAND = by_hand(
    "three stages on one rank",
    (0, 0, 0),
    2,
    "F0.0 F1.0 F0.1 F2.0 I2.0 F1.1 F2.1 I1.0 B0.0 I2.1 W1.0 W2.0 W2.1 B1.1 B0.1",
)


def _check_by_hand(rank: int, world_size: int, schedules: list[Schedule]) -> None:
    mesh = make_mesh(Layout(pp=world_size))
    for schedule in schedules:
        check_training(mesh, schedule)


def test_several_stages_on_a_rank_and_split_backwards_give_the_bits_of_one_process(pool: Pool) -> None:
    # V_SPLIT adds the weight gradients of stage 1 in the order 1, 0: of two terms the order changes no bit.
    pool.run(2, _check_by_hand, [INTERLEAVED, V_SHAPED, SPLIT, V_SPLIT])


def test_several_stages_in_one_process_hand_over_without_messages() -> None:
    _check_by_hand(0, 1, [ONE_RANK_BY_HAND])


def _messages(rank: int, world_size: int) -> dict[tuple[str, str], tuple[int, int]]:
    mesh = make_mesh(Layout(pp=world_size))
    check_training(mesh, build_schedule("1f1b", num_ranks=world_size, num_microbatches=5))
    return mesh.meter.read()


def test_each_boundary_carries_one_hidden_tensor_each_way_for_every_microbatch(pool: Pool) -> None:
    size = sum(math.prod(shape_of(mb)) for mb in range(5)) * 4
    for rank, counted in enumerate(pool.run(3, _messages)):
        neighbours = 2 if rank == 1 else 1
        expected = (5 * neighbours, neighbours * size)
        assert counted == {("pp", "send"): expected, ("pp", "receive"): expected}


def run_alone(schedule: Schedule, num_micros: int, *, actions: Any = None, trains: bool = True) -> list[Tensor]:
    """Run a schedule of one rank in this process."""
    mesh, sink = make_mesh(Layout()), GradSink()
    backward = Backward(sink, lambda stage: None) if trains else None
    row = lower(schedule)[0] if actions is None else actions
    stages = own_stages(schedule, 0, sink)
    return run(schedule, row, stages, micros_of(num_micros), wire=wire_of(mesh, schedule), backward=backward)


@pytest.mark.parametrize("num_micros", [0, 2, 4])
def test_another_number_of_microbatches_than_the_schedules_is_refused(num_micros: int) -> None:
    schedule = build_schedule("1f1b", num_ranks=1, num_microbatches=3)
    with pytest.raises(ValueError, match=f"{num_micros} micro-batches for a schedule of 3"):
        run_alone(schedule, num_micros)


def test_another_number_of_shapes_than_of_microbatches_is_refused() -> None:
    schedule, sink = build_schedule("1f1b", num_ranks=1, num_microbatches=3), GradSink()
    mesh, stages = make_mesh(Layout()), own_stages(schedule, 0, sink)
    wire = Wire(mesh.pp, [shape_of(0)] * 2, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="2 shapes of messages for 3 micro-batches"):
        run(schedule, lower(schedule)[0], stages, micros_of(3), wire=wire)


def test_a_row_without_its_last_backward_is_found_out() -> None:
    schedule = build_schedule("gpipe", num_ranks=1, num_microbatches=2)
    row = [action for action in lower(schedule)[0] if action != Step(Op.B, 0, 1)]
    with pytest.raises(AssertionError, match=r"left work undone: \[\(0, 1\)\]"):
        run_alone(schedule, 2, actions=row)


def test_weight_gradients_that_were_put_aside_and_never_computed_are_found_out() -> None:
    row = [action for action in lower(ONE_RANK_BY_HAND)[0] if action != Step(Op.W, 2, 1)]
    with pytest.raises(AssertionError, match=r"left work undone: \[\(2, 1\)\]"):
        run_alone(ONE_RANK_BY_HAND, 2, actions=row)


def test_a_schedule_without_backwards_run_for_training_is_found_out() -> None:
    with pytest.raises(AssertionError, match="left work undone"):
        run_alone(build_schedule("forward-only", num_ranks=1, num_microbatches=2), 2)


def test_the_caller_s_gradient_mode_comes_back() -> None:
    schedule = build_schedule("forward-only", num_ranks=1, num_microbatches=1)
    run_alone(schedule, 1, trains=False)
    assert torch.is_grad_enabled()
    with torch.no_grad():
        run_alone(build_schedule("1f1b", num_ranks=1, num_microbatches=1), 1)
        assert not torch.is_grad_enabled()


def test_weight_gradients_are_computed_in_their_own_steps_and_not_with_the_input_gradients() -> None:
    schedule = by_hand("deferred", (0,), 2, "F0.0 I0.0 F0.1 I0.1 W0.1 W0.0")
    sink, events = GradSink(), []
    stage = ToyStage(0, 1, axis_of_one(), sink)
    stage.register_forward_pre_hook(lambda module, args: events.append("forward"))
    sink.bind(stage.weight, torch.zeros_like(stage.weight), lambda: events.append("weight"))
    backward = Backward(sink, lambda number: events.append("reduce"))
    run(
        schedule,
        lower(schedule)[0],
        {0: stage},
        micros_of(2),
        wire=wire_of(make_mesh(Layout()), schedule),
        backward=backward,
    )
    assert events == ["forward", "forward", "weight", "weight", "reduce"]
