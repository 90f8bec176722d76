"""Activations of the MLP that have one input, in one pass over memory each way.

    gelu: x * Phi(x) (exact erf)    gelu_tanh: its approximation, which GPT-2 was trained with
    relu: max(x, 0)                 squared_relu: max(x, 0)^2           silu: x / (1 + exp(-x))

Only x is kept. The gradient of the bias that the product before has added is the sum of the gradient over all rows; the
backward makes it in the same pass. Gated activations, with two inputs, are in `gated_activation.py`.

Source: Hendrycks and Gimpel 2016 (GELU); So et al., "Primer" (2021), section 3 (squared ReLU).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from megatron3d_kernels.launch import KernelError, as_rows, block_of, jit, launch, row_programs, tl
from megatron3d_kernels.selection import DEFAULT_SELECTION, Kernel, Selection

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "squared_relu", "silu")
MAX_BLOCK = 1024
SUM_PROGRAMS = 1024
"""Programs where sums over rows are wanted, each of which adds up its rows before one torch sum over programs. A fixed
number, not the device's, keeps the order of summation the same on every GPU."""


@dataclass(frozen=True)
class Activation:
    """One implementation: forward(x, kind) is the activation; backward(grad_y, x, kind, whether sums are wanted) is the
    gradient of x, and the sums [F] of it over all rows."""

    forward: Callable[[torch.Tensor, str], torch.Tensor]
    backward: Callable[[torch.Tensor, torch.Tensor, str, bool], tuple[torch.Tensor, torch.Tensor | None]]


def activation(
    x: torch.Tensor, kind: str, *, bias: torch.Tensor | None = None, selection: Selection = DEFAULT_SELECTION
) -> torch.Tensor:
    """Apply the activation `kind` to x [..., F]; fp32 inside, the result in the dtype of x.

    `bias` [F] is one that the product before has added already; its gradient is made here, and not there.

    Raises KernelError for a kind that is not in ACTIVATIONS.
    """
    if kind not in ACTIVATIONS:
        raise KernelError(f"The activation {kind!r} does not exist; use one of {', '.join(ACTIVATIONS)}.")
    if selection.is_fused(ACTIVATION.name):
        x = with_bias_gradient(x, bias)
        return F.relu(x).square() if kind == "squared_relu" else _reference_forward(x, kind)
    return _Activation.apply(x, bias, kind, selection.pick(ACTIVATION, x))


def with_bias_gradient(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., F], which holds a bias [F] already, as a function of that bias too: for a compiler, which makes its
    gradient in the pass that makes that of x."""
    return x if bias is None else x + (bias - bias.detach()).to(x.dtype)


class _Activation(torch.autograd.Function):
    """Saves the input only."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, kind: str, kernel: Activation) -> torch.Tensor:
        """The bias is in x."""
        ctx.save_for_backward(x)
        ctx.kind, ctx.kernel = kind, kernel
        return kernel.forward(x, kind)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient of x is that of the product's output, whose sum is the bias's."""
        (x,) = ctx.saved_tensors
        return *ctx.kernel.backward(grad_y, x, ctx.kind, ctx.needs_input_grad[1]), None, None


def _reference_forward(x: torch.Tensor, kind: str) -> torch.Tensor:
    """torch's own functions."""
    if kind in ("gelu", "gelu_tanh"):
        return F.gelu(x, approximate=_approximation(kind))
    if kind == "silu":
        return F.silu(x)
    return F.relu(x) if kind == "relu" else F.relu(x).square_()


def _reference_backward(
    grad_y: torch.Tensor, x: torch.Tensor, kind: str, wants_sums: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The operators of torch's autograd."""
    if kind in ("gelu", "gelu_tanh"):
        grad_x = torch.ops.aten.gelu_backward(grad_y, x, approximate=_approximation(kind))
    elif kind == "silu":
        grad_x = torch.ops.aten.silu_backward(grad_y, x)
    elif kind == "relu":
        grad_x = torch.ops.aten.threshold_backward(grad_y, x, 0)
    else:
        grad_x = F.relu(x).mul_(grad_y).mul_(2)
    return grad_x, as_rows(grad_x).sum(0) if wants_sums else None


def _approximation(kind: str) -> str:
    """torch's name for it."""
    return "tanh" if kind == "gelu_tanh" else "none"


def _triton_forward(x: torch.Tensor, kind: str) -> torch.Tensor:
    """One program per row and block of columns."""
    rows = as_rows(x)
    num_rows, num_columns = rows.shape
    block = block_of(num_columns, limit=MAX_BLOCK)
    y = x.new_empty(x.shape)
    grid = (num_rows, -(-num_columns // block))
    constants = {"KIND": kind, "BLOCK": block, "num_warps": 4}
    launch(_forward_kernel, grid, rows, y, rows.stride(0), num_columns, device=x.device, **constants)
    return y


def _triton_backward(
    grad_y: torch.Tensor, x: torch.Tensor, kind: str, wants_sums: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One program per block of columns and row, or some of the rows where sums are wanted."""
    rows, grad_rows = as_rows(x), as_rows(grad_y)
    num_rows, num_columns = rows.shape
    block = block_of(num_columns, limit=MAX_BLOCK)
    blocks = -(-num_columns // block)
    programs = row_programs(num_rows, blocks, SUM_PROGRAMS) if wants_sums else num_rows
    grad_x = x.new_empty(x.shape)
    sums = torch.empty((programs, num_columns) if wants_sums else 1, dtype=torch.float32, device=x.device)
    arguments = (grad_rows, rows, grad_x, sums, grad_rows.stride(0), rows.stride(0), num_rows, num_columns, programs)
    constants = {"KIND": kind, "NEED_SUMS": wants_sums, "BLOCK": block, "num_warps": 4}
    launch(_backward_kernel, (programs, blocks), *arguments, device=x.device, **constants)
    return grad_x, sums.sum(0) if wants_sums else None


@jit
def _value_and_slope(x: tl.tensor, KIND: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The activation of an fp32 block and its derivative."""
    if KIND == "gelu":
        # Phi and phi, the distribution and density of the normal law: 1 / sqrt(2) and 1 / sqrt(2 pi).
        integral = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = x * integral
        slope = integral + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif KIND == "gelu_tanh":
        # (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), with u = sqrt(2 / pi) (x + 0.044715 x^3).
        inner = 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)
        integral = 1.0 / (1.0 + tl.exp(-inner))
        value = x * integral
        # exp(-inner) may be inf; then `integral` and with it the slope is 0, their limit.
        slope = integral + x * integral * (1.0 - integral) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif KIND == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-x))
        value = x * sigmoid
        slope = sigmoid * (1.0 + x * (1.0 - sigmoid))
    elif KIND == "relu":
        # Compared so that NaN, which is not below zero either, stays visible.
        value = tl.where(x <= 0.0, 0.0, x)
        slope = tl.where(x <= 0.0, 0.0, 1.0)
    else:
        positive = tl.where(x <= 0.0, 0.0, x)
        value = positive * positive
        slope = 2.0 * positive
    return value, slope


@jit
def _forward_kernel(
    x_ptr: tl.tensor,
    y_ptr: tl.tensor,
    x_stride: tl.tensor,
    num_columns: tl.tensor,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One block of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    value, _ = _value_and_slope(x, KIND)
    tl.store(y_ptr + row * num_columns + columns, value.to(y_ptr.dtype.element_ty), mask=inside)


@jit
def _backward_kernel(
    grad_y_ptr: tl.tensor,
    x_ptr: tl.tensor,
    grad_x_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    grad_y_stride: tl.tensor,
    x_stride: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    num_programs: tl.tensor,
    KIND: tl.constexpr,
    NEED_SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The gradient of one block of columns, in rows program, program + num_programs, ..."""
    program = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for row_index in range(program, num_rows, num_programs):
        row = tl.cast(row_index, tl.int64)
        x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
        grad_y = tl.load(grad_y_ptr + row * grad_y_stride + columns, mask=inside, other=0.0).to(tl.float32)
        _, slope = _value_and_slope(x, KIND)
        grad_x = (grad_y * slope).to(grad_x_ptr.dtype.element_ty)
        tl.store(grad_x_ptr + row * num_columns + columns, grad_x, mask=inside)
        total += grad_x.to(tl.float32)
    if NEED_SUMS:
        tl.store(sums_ptr + program.to(tl.int64) * num_columns + columns, total, mask=inside)


ACTIVATION = Kernel(
    name="activation",
    reference=Activation(_reference_forward, _reference_backward),
    triton=Activation(_triton_forward, _triton_backward),
)
