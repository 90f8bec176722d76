"""Ring, exchange of heads and both together against attention of one process that holds the whole sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from megatron3d_kernels import rectangles
from torch import Tensor

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import Axis, Mesh, make_mesh
from megatron3d.comm.replay import Replay
from megatron3d.comm.ring import Hop, start_hop
from megatron3d.nn.context import ring
from megatron3d.nn.context.between import rectangles_between
from megatron3d.nn.context.cut import ContextCut, Runs, positions_of
from megatron3d.nn.context.exchange import ExchangeAxes, exchanged_attention
from megatron3d.nn.context.plan import plan_exchange
from tests.dist.pool import Pool

LENGTH, SAMPLES, HEAD = 48, 2, 8
PACKED = ((7, 20, 1, 20), (30, 2, 16))  # lengths of the documents of each sample
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Case:
    """`kind` of exchange over a `cut`; `packed` samples have several documents each."""

    kind: str
    cut: str
    heads: int = 4
    groups: int = 2
    packed: bool = False
    is_causal: bool = True
    dtype: torch.dtype = torch.float64


def _documents(packed: bool) -> list[np.ndarray | None]:
    if not packed:
        return [None]
    return [np.repeat(np.arange(len(lengths)), lengths) for lengths in PACKED]


def _inputs(case: Case) -> list[Tensor]:
    """Queries, keys, values and the gradient of the output, of the whole samples."""
    generator = torch.Generator().manual_seed(5)
    heads = (case.heads, case.groups, case.groups, case.heads)
    wide = [torch.randn(SAMPLES, n, LENGTH, HEAD, generator=generator, dtype=torch.float64) for n in heads]
    return [x.to(case.dtype) for x in wide]


def _one_process(case: Case) -> list[Tensor]:
    """The output and the three gradients, in fp64."""
    q, k, v, grad = (x.double() for x in _inputs(case))
    cut = ContextCut("contiguous", LENGTH, 1)
    runs = [cut.runs(documents)[0] for documents in _documents(case.packed)]
    plan = [rectangles_between(one, one, is_causal=case.is_causal) for one in runs]
    leaves = [x.requires_grad_() for x in (q, k, v)]
    y = rectangles.reference(q, k, v, plan)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def _own(x_BNSD: Tensor, runs: Sequence[Runs], rank: int) -> Tensor:
    """What stands at this rank's positions."""
    each = [torch.from_numpy(positions_of(of_ranks[rank])) for of_ranks in runs] * (SAMPLES // len(runs))
    return torch.stack([x[:, index] for x, index in zip(x_BNSD, each)])


def _axes(case: Case, mesh: Mesh) -> ExchangeAxes:
    return {
        "p2p": ExchangeAxes(mesh.alone, mesh.cp),
        "a2a": ExchangeAxes(mesh.cp, mesh.alone),
        "a2a+p2p": ExchangeAxes(mesh.cp_heads, mesh.cp_ring),
    }[case.kind]


def _ranks(rank: int, world_size: int, cases: Sequence[Case]) -> list[tuple[float, Any]]:
    """For each case the largest error, relative to the largest value, and what was communicated."""
    mesh = make_mesh(Layout(cp=world_size, cp_heads=max(1, world_size // 2)))
    found = []
    for case in cases:
        axes = _axes(case, mesh)
        runs = [ContextCut(case.cut, LENGTH, world_size).runs(one) for one in _documents(case.packed)]
        plan = plan_exchange(runs, rank=rank, group_size=axes.heads.size, is_causal=case.is_causal)
        q, k, v, grad = (_own(x, runs, rank).requires_grad_() for x in _inputs(case))
        mesh.meter.reset()
        y = exchanged_attention(q, k, v, plan, axes, replay=Replay())
        results = [y.detach(), *torch.autograd.grad(y, (q, k, v), grad)]
        expected = [_own(x, runs, rank) for x in _one_process(case)]
        assert all(x.dtype == case.dtype for x in results)
        error = max(float((x - e).abs().max() / e.abs().max()) for x, e in zip(results, expected))
        found.append((error, mesh.meter.read()))
    return found


CASES = {
    2: [
        Case("p2p", "contiguous", is_causal=False),
        Case("p2p", "zigzag", groups=1, dtype=torch.bfloat16),
        Case("a2a", "zigzag", groups=1, dtype=torch.bfloat16),
        Case("a2a", "contiguous", packed=True, dtype=torch.float32),
    ],
    4: [
        Case("p2p", "zigzag"),
        Case("p2p", "contiguous", groups=1, dtype=torch.float32),
        Case("p2p", "balanced", packed=True, dtype=torch.bfloat16),
        Case("p2p", "balanced", packed=True, is_causal=False),
        Case("a2a", "zigzag", heads=8, groups=8),
        Case("a2a", "balanced", groups=1, packed=True, is_causal=False, dtype=torch.float32),
        Case("a2a", "balanced", heads=8, groups=2, packed=True),
        Case("a2a+p2p", "zigzag", dtype=torch.float32),
        Case("a2a+p2p", "contiguous", groups=1, is_causal=False),
        Case("a2a+p2p", "balanced", heads=8, groups=4, packed=True, dtype=torch.bfloat16),
    ],
}


def _expected_communication(case: Case, world_size: int) -> dict[tuple[str, str], tuple[int, int]]:
    """Calls and bytes of a forward and a backward, by the formulas of `docs/long_context.md`."""
    heads_axis, ring_axis, ranks = {
        "p2p": ("alone", "cp", 1),
        "a2a": ("cp", "alone", world_size),
        "a2a+p2p": ("cp_heads", "cp_ring", world_size // 2),
    }[case.kind]
    ring_size, item = world_size // ranks, case.dtype.itemsize
    positions = SAMPLES * LENGTH // world_size
    heads, groups = case.heads // ranks, max(1, case.groups // ranks)
    expected = {}
    if ranks > 1:
        there, back = heads + 2 * groups, heads
        expected[heads_axis, "all_to_all"] = 4, 2 * ranks * positions * (there + back) * HEAD * item
    if ring_size > 1:
        of_keys, hops = 2 * positions * ranks * groups * HEAD, ring_size - 1
        counted = 3 * hops, hops * of_keys * (2 * item + max(4, item))
        expected |= {(ring_axis, "send"): counted, (ring_axis, "receive"): counted}
    return expected


@pytest.mark.parametrize("world_size", CASES)
def test_every_kind_equals_one_process_and_communicates_what_its_formula_says(pool: Pool, world_size: int) -> None:
    for rank, found in enumerate(pool.run(world_size, _ranks, CASES[world_size])):
        for case, (error, communicated) in zip(CASES[world_size], found, strict=True):
            assert error < TOLERANCE[case.dtype], f"rank {rank}: {case}: {error:.1e}"
            assert communicated == _expected_communication(case, world_size), f"rank {rank}: {case}"


def _without_log_sum(out: Tensor, log_sum: Tensor, other: Tensor, other_log_sum: Tensor) -> None:
    out += other


def _forgetful_ranks(rank: int, world_size: int) -> float:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rectangles, "merge_", _without_log_sum)
        return _ranks(rank, world_size, [Case("p2p", "contiguous", dtype=torch.float32)])[0][0]


def test_a_ring_that_forgets_the_log_sum_exp_is_found_out(pool: Pool) -> None:
    errors = pool.run(2, _forgetful_ranks)
    assert errors[1] > 0.1, "the later half attends to the keys of both ranks"


class _RecordedHop:
    def __init__(self, hop: Hop, name: str, events: list[str]) -> None:
        self.hop, self.name, self.events = hop, name, events

    def wait(self) -> Tensor:
        self.events.append(f"await {self.name}")
        return self.hop.wait()


def _events(rank: int, world_size: int) -> tuple[list[str], int]:
    """What a forward and a backward do one after another, and how many buffers messages arrive in."""
    events: list[str] = []
    buffers: list[Tensor] = []  # kept, so that no two have the same address one after the other

    def start(leaving: Tensor, arriving: Tensor, axis: Axis, *, tag: int) -> _RecordedHop:
        name = ("keys", "gradients")[tag]
        events.append(f"send {name}")
        buffers.append(arriving)
        return _RecordedHop(start_hop(leaving, arriving, axis, tag=tag), name, events)

    def recorded(half: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            events.append("attend")
            return half(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ring, "start_hop", start)
        patch.setattr(rectangles, "forward", recorded(rectangles.forward))
        patch.setattr(rectangles, "backward", recorded(rectangles.backward))
        _ranks(rank, world_size, [Case("p2p", "zigzag")])
    return events, len({buffer.data_ptr() for buffer in buffers})


def test_the_next_keys_are_sent_before_attention_to_the_present_ones_and_awaited_after_it(pool: Pool) -> None:
    step = ["send keys", "attend", "await keys"]
    forward = [*step, *step, *step, "attend"]
    backward = [
        *("send keys", "attend", "await keys"),
        *("send keys", "attend", "send gradients", "await keys"),
        *("send keys", "attend", "await gradients", "send gradients", "await keys"),
        *("attend", "await gradients", "send gradients", "await gradients"),
    ]
    # In each direction, two buffers for arriving keys; in the backward also two for arriving gradients.
    assert pool.run(4, _events) == [(forward + backward, 2 + 4)] * 4
