"""What every row of the layout-parity table is held against: one process, and the promises in figures."""

from __future__ import annotations

import functools

import torch

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from tests.parity.runs import Case, Trace, assemble, parts_of, trace

LOSS_TOLERANCE = 1e-5  # the promise; fp32 sums in another order give about 1e-7
NORM_TOLERANCE = 1e-4  # the promise
GRADIENT_TOLERANCE = 1e-5  # of the largest element of the same parameter's gradient
AT_ONCE = "--micro-batch-size 8"  # the whole batch of `runs.SHAPE`: a sum over micro-batches is the layouts' alone


@functools.cache
def reference(model: str, options: str = "") -> tuple[Trace, dict[str, tuple[int, ...]]]:
    """One process's trace and the full shapes of its parameters; made once for all tests of a session."""
    torch.set_num_threads(1)
    parts = parts_of(Case(model, Layout(), f"{AT_ONCE} {options}"), make_mesh(Layout()))
    shapes = {name: view.full_shape for name, view in parts.engine.weight_views().items()}
    return trace(parts), shapes


def relative(a: list[float], b: list[float]) -> float:
    """Largest relative difference of two lists of equal length."""
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


def check_against_one_process(case: Case, traces: list[Trace], table: list[str], *, of_model: str = "") -> None:
    """Add the row of a case to the table, and fail if its losses, gradient norms or gradients are not those of one
    process, or if its ranks disagree about the loss.

    Args:
        case: what was trained.
        traces: one of each rank.
        table: rows of the layout-parity table so far.
        of_model: options that belong to the model, so that the one process takes them too.
    """
    expected, shapes = reference(case.model, of_model)
    steps = slice(case.num_steps)
    loss = relative(traces[0].losses, expected.losses[steps])
    norm = relative(traces[0].norms, expected.norms[steps])
    shapes = {name: shape for name, shape in shapes.items() if name in expected.gradients}  # frozen ones have none
    assert set().union(*(one.gradients for one in traces)) == set(shapes), f"{case}: gradients of other parameters"
    got, whole = assemble(traces, shapes), assemble([expected], shapes)
    gradient = max(float((got[n] - whole[n]).abs().max() / whole[n].abs().max()) for n in shapes)
    errors = f"{loss:8.1e} {norm:8.1e} {gradient:8.1e}"
    table.append(f"{case.model:12s} {case.layout!s:18s} {errors} {case.num_steps:5d}  {case.options}")
    assert loss < LOSS_TOLERANCE, f"{case}: losses differ by {loss}"
    assert norm < NORM_TOLERANCE, f"{case}: gradient norms differ by {norm}"
    assert gradient < GRADIENT_TOLERANCE, f"{case}: gradients differ by {gradient}"
    assert all(one.losses == traces[0].losses for one in traces), f"{case}: ranks disagree about the loss"
