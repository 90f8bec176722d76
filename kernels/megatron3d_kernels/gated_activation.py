"""Gated activations: act(gate) * up, elementwise, in one pass over memory.

    swiglu: gate * sigmoid(gate) * up      geglu: gate * Phi(gate) * up (exact erf)      reglu: max(gate, 0) * up

Source: Shazeer, "GLU Variants Improve Transformer" (2020), equations 5 and 6. Only gate and up are saved, in their own
dtype; backward computes act(gate) again: d_up = d_y * act(gate), d_gate = d_y * up * act'(gate). F is the last
dimension. `gate_up` holds both in one tensor of width 2F, as one matrix product gives them: first gate, then up. The
gradient of that product's bias is the sum of theirs over all rows; the backward can make it in the same pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from megatron3d_kernels.activation import with_bias_gradient
from megatron3d_kernels.launch import KernelError, as_rows, block_of, compute_dtype, jit, launch, row_programs, tl
from megatron3d_kernels.selection import DEFAULT_SELECTION, Kernel, Selection

GATED_ACTIVATIONS = ("swiglu", "geglu", "reglu")
MAX_BLOCK = 1024
SUM_PROGRAMS = 1024
"""Programs where sums over rows are wanted, each of which adds up its rows before one torch sum over programs. A fixed
number, not the device's, keeps the order of summation the same on every GPU."""


@dataclass(frozen=True)
class GatedActivation:
    """One implementation. Outputs are given, so that halves of one tensor can be filled; None means not needed.

    forward(gate, up, y, kind) fills y; backward(grad_y, gate, up, grad_gate, grad_up, kind) fills the gradients;
    backward_with_sums(grad_y, gate_up, grad_gate_up, kind) does so for halves, and returns the sums [2F] over all rows.
    """

    forward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, str], None]
    backward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, str], None]
    backward_with_sums: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, str], torch.Tensor]


def gated_activation(
    gate: torch.Tensor, up: torch.Tensor, kind: str, *, selection: Selection = DEFAULT_SELECTION
) -> torch.Tensor:
    """act(gate) * up for gate and up [..., F] of one dtype; fp32 inside, the result in their dtype.

    Raises KernelError for an unknown `kind`, or where gate and up differ in shape or dtype.
    """
    _check_kind(kind)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise KernelError(
            f"gated_activation needs gate and up alike, but they are {tuple(gate.shape)} {gate.dtype} and "
            f"{tuple(up.shape)} {up.dtype}."
        )
    if selection.is_fused(GATED_ACTIVATION.name):
        return _formula(gate, up, kind)
    return _Gated.apply(gate, up, kind, selection.pick(GATED_ACTIVATION, gate))


def fused_gated_activation(
    gate_up: torch.Tensor,
    kind: str,
    *,
    bias: torch.Tensor | None = None,
    selection: Selection = DEFAULT_SELECTION,
) -> torch.Tensor:
    """act(gate) * up for gate_up [..., 2F] with gate = gate_up[..., :F] and up = gate_up[..., F:]; result [..., F].

    The halves are read where they lie and the gradient is written as one [..., 2F] tensor: no split, no concatenation.
    `bias` [2F] is one that the product has added already; its gradient is made here, and not there.

    Raises KernelError for an unknown `kind` or an odd last dimension.
    """
    _check_kind(kind)
    if gate_up.shape[-1] % 2:
        raise KernelError(f"gate_up has an odd last dimension, {gate_up.shape[-1]}; it holds gate and up, 2F in all.")
    if selection.is_fused(GATED_ACTIVATION.name):
        gate, up = with_bias_gradient(gate_up, bias).chunk(2, dim=-1)
        return _formula(gate, up, kind)
    return _FusedGated.apply(gate_up, bias, kind, selection.pick(GATED_ACTIVATION, gate_up))


def swiglu(gate_up: torch.Tensor, *, selection: Selection = DEFAULT_SELECTION) -> torch.Tensor:
    """silu(gate) * up for gate_up [..., 2F], gate first; result [..., F]. See `fused_gated_activation`."""
    return fused_gated_activation(gate_up, "swiglu", selection=selection)


def _check_kind(kind: str) -> None:
    """Refuse a kind that does not exist."""
    if kind not in GATED_ACTIVATIONS:
        raise KernelError(f"The gated activation {kind!r} does not exist; use one of {', '.join(GATED_ACTIVATIONS)}.")


class _Gated(torch.autograd.Function):
    """Gate and up as two tensors."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, kind: str, kernel: GatedActivation) -> torch.Tensor:
        """Save the inputs only."""
        ctx.save_for_backward(gate, up)
        ctx.kind, ctx.kernel = kind, kernel
        y = gate.new_empty(gate.shape)
        kernel.forward(gate, up, y, kind)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Compute only the gradients that are asked for."""
        gate, up = ctx.saved_tensors
        grad_gate = gate.new_empty(gate.shape) if ctx.needs_input_grad[0] else None
        grad_up = up.new_empty(up.shape) if ctx.needs_input_grad[1] else None
        ctx.kernel.backward(grad_y, gate, up, grad_gate, grad_up, ctx.kind)
        return grad_gate, grad_up, None, None


class _FusedGated(torch.autograd.Function):
    """Gate and up as the halves of one tensor."""

    @staticmethod
    def forward(
        ctx: Any, gate_up: torch.Tensor, bias: torch.Tensor | None, kind: str, kernel: GatedActivation
    ) -> torch.Tensor:
        """Save the input only."""
        ctx.save_for_backward(gate_up)
        ctx.kind, ctx.kernel = kind, kernel
        gate, up = gate_up.chunk(2, dim=-1)
        y = gate.new_empty(gate.shape)
        kernel.forward(gate, up, y, kind)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Fill the two halves of one gradient."""
        (gate_up,) = ctx.saved_tensors
        grad_gate_up = gate_up.new_empty(gate_up.shape)
        if ctx.needs_input_grad[1]:
            sums = ctx.kernel.backward_with_sums(grad_y, gate_up, grad_gate_up, ctx.kind)
            return grad_gate_up, sums, None, None
        halves = (*gate_up.chunk(2, dim=-1), *grad_gate_up.chunk(2, dim=-1))
        ctx.kernel.backward(grad_y, *halves, ctx.kind)
        return grad_gate_up, None, None, None


def _act(gate: torch.Tensor, kind: str) -> torch.Tensor:
    """act(gate) in the dtype of gate, which is a compute dtype."""
    if kind == "swiglu":
        return F.silu(gate)
    return F.gelu(gate) if kind == "geglu" else F.relu(gate)


def _act_backward(grad: torch.Tensor, gate: torch.Tensor, kind: str) -> torch.Tensor:
    """grad * act'(gate), by the operators torch's autograd itself uses."""
    if kind == "swiglu":
        return torch.ops.aten.silu_backward(grad, gate)
    if kind == "geglu":
        return torch.ops.aten.gelu_backward(grad, gate)
    return torch.ops.aten.threshold_backward(grad, gate, 0)


def _formula(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    """The definition, for a compiler that fuses it with what is around it and makes its backward."""
    return (_act(gate.to(compute_dtype(gate.dtype)), kind) * up).to(gate.dtype)


def _reference_forward(gate: torch.Tensor, up: torch.Tensor, y: torch.Tensor, kind: str) -> None:
    """Plain torch; the product is rounded once, as it is written."""
    torch.mul(_act(gate.to(compute_dtype(gate.dtype)), kind), up, out=y)


def _reference_backward(
    grad_y: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    grad_gate: torch.Tensor | None,
    grad_up: torch.Tensor | None,
    kind: str,
) -> None:
    """Plain torch."""
    dtype = compute_dtype(gate.dtype)
    wide_gate, wide_grad = gate.to(dtype), grad_y.to(dtype)
    if grad_up is not None:
        grad_up.copy_(_act(wide_gate, kind).mul_(wide_grad))
    if grad_gate is not None:
        grad_gate.copy_(_act_backward(wide_grad * up, wide_gate, kind))


def _reference_backward_with_sums(
    grad_y: torch.Tensor, gate_up: torch.Tensor, grad_gate_up: torch.Tensor, kind: str
) -> torch.Tensor:
    """Plain torch."""
    (gate, up), (grad_gate, grad_up) = gate_up.chunk(2, dim=-1), grad_gate_up.chunk(2, dim=-1)
    _reference_backward(grad_y, gate, up, grad_gate, grad_up, kind)
    return as_rows(grad_gate_up).sum(0)


def _triton_forward(gate: torch.Tensor, up: torch.Tensor, y: torch.Tensor, kind: str) -> None:
    """One program per row and block of columns."""
    gate_rows, up_rows = as_rows(gate), as_rows(up)
    num_rows, num_columns = gate_rows.shape
    block = block_of(num_columns, limit=MAX_BLOCK)
    strides = (gate_rows.stride(0), up_rows.stride(0))
    constants = {"KIND": kind, "BLOCK": block, "num_warps": 4}
    arguments = (gate_rows, up_rows, y, *strides, num_columns)
    launch(_forward_kernel, (num_rows, -(-num_columns // block)), *arguments, device=gate.device, **constants)


def _triton_backward(
    grad_y: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    grad_gate: torch.Tensor | None,
    grad_up: torch.Tensor | None,
    kind: str,
) -> None:
    """One program per row and block of columns; a gradient nobody needs is neither computed nor written."""
    grad_rows, gate_rows, up_rows = as_rows(grad_y), as_rows(gate), as_rows(up)
    out_gate = gate_rows if grad_gate is None else as_rows(grad_gate)
    out_up = up_rows if grad_up is None else as_rows(grad_up)
    tensors = (grad_rows, gate_rows, up_rows, out_gate, out_up)
    num_rows, num_columns = gate_rows.shape
    block = block_of(num_columns, limit=MAX_BLOCK)
    needs = {"NEED_GATE": grad_gate is not None, "NEED_UP": grad_up is not None, "NEED_SUMS": False}
    constants = {"KIND": kind, **needs, "BLOCK": block, "num_warps": 4}
    arguments = (*tensors, grad_rows, *(tensor.stride(0) for tensor in tensors), num_rows, num_columns, num_rows)
    launch(_backward_kernel, (num_rows, -(-num_columns // block)), *arguments, device=gate.device, **constants)


def _triton_backward_with_sums(
    grad_y: torch.Tensor, gate_up: torch.Tensor, grad_gate_up: torch.Tensor, kind: str
) -> torch.Tensor:
    """One program per block of columns and some of the rows."""
    grad_rows, (gate_rows, up_rows) = as_rows(grad_y), (as_rows(half) for half in gate_up.chunk(2, dim=-1))
    out_gate, out_up = (as_rows(half) for half in grad_gate_up.chunk(2, dim=-1))
    tensors = (grad_rows, gate_rows, up_rows, out_gate, out_up)
    num_rows, num_columns = gate_rows.shape
    block = block_of(num_columns, limit=MAX_BLOCK)
    blocks = -(-num_columns // block)
    programs = row_programs(num_rows, blocks, SUM_PROGRAMS)
    sums = torch.empty(programs, 2 * num_columns, dtype=torch.float32, device=gate_up.device)
    constants = {"KIND": kind, "NEED_GATE": True, "NEED_UP": True, "NEED_SUMS": True, "BLOCK": block, "num_warps": 4}
    arguments = (*tensors, sums, *(tensor.stride(0) for tensor in tensors), num_rows, num_columns, programs)
    launch(_backward_kernel, (programs, blocks), *arguments, device=gate_up.device, **constants)
    return sums.sum(0)


@jit
def _act_and_slope(gate: tl.tensor, KIND: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """act(gate) and act'(gate) of an fp32 block."""
    if KIND == "swiglu":
        # exp of a large positive number is inf, and 1 / (1 + inf) is the right limit, 0.
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        value = gate * sigmoid
        slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
    elif KIND == "geglu":
        # Phi and phi, the distribution and density of the normal law: 1 / sqrt(2) and 1 / sqrt(2 pi).
        phi_integral = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        value = gate * phi_integral
        slope = phi_integral + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    else:
        # Compared so that NaN, which is not below zero either, stays visible.
        slope = tl.where(gate <= 0.0, 0.0, 1.0)
        value = tl.where(gate <= 0.0, 0.0, gate)
    return value, slope


@jit
def _forward_kernel(
    gate_ptr: tl.tensor,
    up_ptr: tl.tensor,
    y_ptr: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    num_columns: tl.tensor,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """y = act(gate) * up for one block of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    value, _ = _act_and_slope(gate, KIND)
    tl.store(y_ptr + row * num_columns + columns, (value * up).to(y_ptr.dtype.element_ty), mask=inside)


@jit
def _backward_kernel(
    grad_y_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    up_ptr: tl.tensor,
    grad_gate_ptr: tl.tensor,
    grad_up_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    grad_y_stride: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    grad_gate_stride: tl.tensor,
    grad_up_stride: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    num_programs: tl.tensor,
    KIND: tl.constexpr,
    NEED_GATE: tl.constexpr,
    NEED_UP: tl.constexpr,
    NEED_SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Both gradients of one block of columns, in rows program, program + num_programs, ..."""
    program = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    gate_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    up_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    for row_index in range(program, num_rows, num_programs):
        row = tl.cast(row_index, tl.int64)
        grad_y = tl.load(grad_y_ptr + row * grad_y_stride + columns, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
        value, slope = _act_and_slope(gate, KIND)
        if NEED_GATE:
            up = tl.load(up_ptr + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
            grad_gate = (grad_y * up * slope).to(grad_gate_ptr.dtype.element_ty)
            tl.store(grad_gate_ptr + row * grad_gate_stride + columns, grad_gate, mask=inside)
            gate_sum += grad_gate.to(tl.float32)
        if NEED_UP:
            grad_up = (grad_y * value).to(grad_up_ptr.dtype.element_ty)
            tl.store(grad_up_ptr + row * grad_up_stride + columns, grad_up, mask=inside)
            up_sum += grad_up.to(tl.float32)
    if NEED_SUMS:
        sums_row = sums_ptr + program.to(tl.int64) * (2 * num_columns) + columns
        tl.store(sums_row, gate_sum, mask=inside)
        tl.store(sums_row + num_columns, up_sum, mask=inside)


GATED_ACTIVATION = Kernel(
    name="gated_activation",
    reference=GatedActivation(_reference_forward, _reference_backward, _reference_backward_with_sums),
    triton=GatedActivation(_triton_forward, _triton_backward, _triton_backward_with_sums),
)
