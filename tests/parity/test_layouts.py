"""The promise: the layout changes speed and memory, never the result.

Every case trains 20 steps in fp32 without dropout and is compared with one process: every loss, every gradient norm,
and every element of the first step's gradients.
"""

from __future__ import annotations

import functools
from itertools import groupby

import pytest
import torch

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from tests.dist.pool import Pool
from tests.parity.runs import MODELS, Case, Trace, assemble, parts_of, trace, trace_cases

LOSS_TOLERANCE = 1e-5  # the promise; fp32 sums in another order give about 1e-7
NORM_TOLERANCE = 1e-4  # the promise
GRADIENT_TOLERANCE = 1e-5  # of the largest element of the same parameter's gradient

SP = "--sequence-parallel"
ZERO1 = "--zero-stage 1"
GPIPE = "--pipeline-schedule gpipe"

LAYOUTS = [
    (Layout(tp=2), ""),
    (Layout(tp=2), SP),
    (Layout(pp=2), ""),
    (Layout(pp=2), GPIPE),
    (Layout(dp=2), ""),
    (Layout(dp=2), ZERO1),
    (Layout(tp=4), SP),
    (Layout(pp=4), ""),
    (Layout(dp=4), ZERO1),
    (Layout(tp=2, pp=2), SP),
    (Layout(tp=2, dp=2), f"{SP} {ZERO1}"),
    (Layout(pp=2, dp=2), ZERO1),
    (Layout(tp=2, pp=2, dp=2), ""),
    (Layout(tp=2, pp=2, dp=2), f"{SP} {ZERO1}"),
    (Layout(tp=4, pp=2), SP),
    (Layout(pp=4, dp=2), ZERO1),  # 4 micro-batches for 4 stages
    (Layout(pp=2, dp=4), f"{ZERO1} --no-overlap-grad-reduce"),  # 2 micro-batches
    (Layout(tp=2, dp=4), SP),
    (Layout(dp=8), ZERO1),
]


def cases() -> list[Case]:
    """GPT-2-like tied and Llama-like untied everywhere; the other two where the embedding's ends matter, which are two
    stages whatever else is cut. Other orders than 1F1B are in test_schedules.py."""
    everywhere = [Case(m, layout, options) for layout, options in LAYOUTS for m in ("gpt2", "llama")]
    ends = [
        Case(m, layout, o)
        for layout, o in LAYOUTS
        if layout.pp > 1 and layout.tp < 4
        for m in ("gpt2-untied", "llama-tied")
    ]
    uneven = [
        Case("gpt2", Layout(pp=2), "--decoder-first-pipeline-num-layers 1"),
        Case("llama", Layout(tp=2, pp=2), f"--decoder-last-pipeline-num-layers 1 {SP}"),
    ]
    return sorted(everywhere + ends + uneven, key=lambda case: case.layout.world_size)


BATCHES = [
    pytest.param(size, layout, list(group), id=f"world{size}-{layout}".replace(" ", ""))
    for (size, layout), group in groupby(
        sorted(cases(), key=lambda c: (c.layout.world_size, str(c.layout))),
        key=lambda c: (c.layout.world_size, str(c.layout)),
    )
]


@functools.cache
def reference(model: str) -> tuple[Trace, dict[str, tuple[int, ...]]]:
    """One process's trace and the full shapes of its parameters."""
    torch.set_num_threads(1)
    parts = parts_of(Case(model, Layout()), make_mesh(Layout()))
    shapes = {name: view.full_shape for name, view in parts.engine.weight_views().items()}
    return trace(parts), shapes


def relative(a: list[float], b: list[float]) -> float:
    """Largest relative difference of two lists of equal length."""
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


@pytest.mark.parity
@pytest.mark.parametrize(("world_size", "layout", "batch"), BATCHES)
def test_layout_gives_the_losses_norms_and_gradients_of_one_process(
    pool: Pool, parity_table: list[str], world_size: int, layout: str, batch: list[Case]
) -> None:
    by_rank = pool.run(world_size, trace_cases, batch, timeout_s=240)
    for number, case in enumerate(batch):
        expected, shapes = reference(case.model)
        traces = [traces_of_rank[number] for traces_of_rank in by_rank]
        loss = relative(traces[0].losses, expected.losses)
        norm = relative(traces[0].norms, expected.norms)
        got = assemble(traces, shapes)
        whole = assemble([expected], shapes)
        gradient = max(float((got[n] - whole[n]).abs().max() / whole[n].abs().max()) for n in shapes)
        parity_table.append(f"{case.model:12s} {layout:18s} {loss:8.1e} {norm:8.1e} {gradient:8.1e}  {case.options}")
        assert loss < LOSS_TOLERANCE, f"{case}: losses differ by {loss}"
        assert norm < NORM_TOLERANCE, f"{case}: gradient norms differ by {norm}"
        assert gradient < GRADIENT_TOLERANCE, f"{case}: gradients differ by {gradient}"
        assert all(one.losses == traces[0].losses for one in traces), f"{case}: ranks disagree about the loss"


@pytest.mark.parametrize("model", MODELS)
def test_one_process_learns(model: str) -> None:
    losses = reference(model)[0].losses
    assert losses[-1] < losses[0] - 0.1, f"the reference that layouts are compared with does not learn: {losses}"
