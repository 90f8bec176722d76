"""A norm of the residual stream beside the stream itself, and of the sum that makes it; statistics in fp32.

    forked_norm    x                     gives  x          and  norm(x)
    added_norm     residual, branch      gives  s          and  norm(s),  s = residual + dropout(branch + bias)

The stream is used twice, by the norm and by the next sum, so its gradient is a sum of two. Behind one autograd function
the norm's backward adds them: with g the gradient of norm's input by its own formula (`layer_norm.py`, `rms_norm.py`),

    dresidual = g + ds        dbranch = dresidual, dropped where the branch was        dbias = sum of dbranch over rows

One kernel each way: forward reads x (or residual and branch) and writes norm(x) (and s), backward reads s, ds and the
gradient of norm(s) and writes dresidual (and dbranch where something is dropped). Nothing of a mask is kept: the
backward makes it again of the keys (`dropout.py`). s is rounded to its dtype before it is normalised, since that is
what the backward reads.

A copy of x that the next product is added to in place (`products.add_linear`) is written with norm(x), whose kernel has
x at hand: one write, where a sum of its own reads two tensors and writes one. torch's out-of-place `addmm` would copy
x by itself, reading it again.

The reference is the composition of the functions that `layer_norm.py`, `rms_norm.py` and `dropout.py` have. H is the
last dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megatron3d_kernels.dropout import DROPOUT, RowDropout, kept_columns, kept_scale, least_kept
from megatron3d_kernels.launch import as_rows, jit, launch, num_warps_for, tl, whole_row_block
from megatron3d_kernels.layer_norm import LAYER_NORM
from megatron3d_kernels.rms_norm import RMS_NORM
from megatron3d_kernels.selection import DEFAULT_SELECTION, Kernel, Selection

BACKWARD_PROGRAMS = 512
"""Programs of the backward kernel, each of which sums the parameter gradients of its rows; half as many where rows are
wide, since these keep as many bytes on their way. A fixed number, not the device's, keeps the order of summation."""
_WIDE_ROW = 2048
_LEAST_BLOCK = 4  # columns that share one output of dropout's generator

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class RowNorm:
    """A LayerNorm, or an RMSNorm without a bias, of rows of H.

    Attributes:
        weight: [H].
        bias: [H] or None.
        eps: added to the variance or the mean of squares.
        is_rms: whether it is an RMSNorm.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float
    is_rms: bool


def forked_norm(
    x: torch.Tensor,
    norm: RowNorm,
    *,
    copies: bool = False,
    bias: torch.Tensor | None = None,
    selection: Selection = DEFAULT_SELECTION,
) -> Pair:
    """x [..., H] for the residual connection, and norm(x).

    Args:
        x: the residual stream.
        norm: of it.
        copies: whether the first result may be written to in place, and x stays.
        bias: [H], added to the copy; it gets no gradient here.
    """
    assert copies or bias is None, "a bias is added to a copy"
    return selection.pick(RESIDUAL_NORM, x)(x, None, bias, norm, None, copies)


def writes_copies(x: torch.Tensor, *, selection: Selection = DEFAULT_SELECTION) -> bool:
    """Whether `forked_norm` of such a tensor makes a copy in passing, so that products should be added to it."""
    return selection.pick(RESIDUAL_NORM, x) is RESIDUAL_NORM.triton


def added_norm(
    residual: torch.Tensor,
    branch: torch.Tensor,
    norm: RowNorm,
    *,
    bias: torch.Tensor | None = None,
    dropping: RowDropout | None = None,
    selection: Selection = DEFAULT_SELECTION,
) -> Pair:
    """s = residual + dropout(branch + bias) and norm(s), both [..., H] in the dtype of the residual.

    Args:
        residual: [..., H].
        branch: what is added, of the same shape and dtype.
        norm: of the sum.
        bias: [H], added to the branch before anything is dropped.
        dropping: which elements of the branch are dropped; None drops nothing.
    """
    return selection.pick(RESIDUAL_NORM, residual)(residual, branch, bias, norm, dropping, False)


def _reference(
    residual: torch.Tensor,
    branch: torch.Tensor | None,
    branch_bias: torch.Tensor | None,
    norm: RowNorm,
    dropping: RowDropout | None,
    copies: bool,
) -> Pair:
    """The references of its parts, one after another."""
    x = residual
    if copies:
        residual = x.clone() if branch_bias is None else x + branch_bias.detach()
    if branch is not None:
        branch = branch if branch_bias is None else branch + branch_bias
        x = residual + branch if dropping is None else DROPOUT.reference.drop(branch, dropping, residual)
    first = residual if copies else x
    if norm.is_rms:
        return first, RMS_NORM.reference(x, norm.weight, norm.eps)
    return first, LAYER_NORM.reference(x, norm.weight, norm.bias, norm.eps)


def _triton(
    residual: torch.Tensor,
    branch: torch.Tensor | None,
    branch_bias: torch.Tensor | None,
    norm: RowNorm,
    dropping: RowDropout | None,
    copies: bool,
) -> Pair:
    """The Triton kernels behind one autograd function."""
    form = _Form(norm.eps, norm.is_rms, dropping, copies)
    branch_bias = branch_bias.detach() if copies and branch_bias is not None else branch_bias
    return _ResidualNorm.apply(residual, branch, branch_bias, norm.weight, norm.bias, form)


@dataclass(frozen=True)
class _Form:
    """What of an operation is no tensor that has a gradient."""

    eps: float
    is_rms: bool
    dropping: RowDropout | None
    copies: bool


def _numbers(probability: float | None) -> tuple[int, float]:
    """The least bits of what is kept and its scale; without dropout values that nobody reads."""
    return (0, 0.0) if probability is None else (least_kept(probability), kept_scale(probability))


class _ResidualNorm(torch.autograd.Function):
    """Saves the norm's input, its weight and one or two fp32 numbers per row."""

    @staticmethod
    def forward(
        ctx: Any,
        residual: torch.Tensor,
        branch: torch.Tensor | None,
        branch_bias: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        form: _Form,
    ) -> Pair:
        """One program per row."""
        rows, weight = as_rows(residual), weight.contiguous()
        num_rows, num_columns = rows.shape
        block = max(whole_row_block("residual_norm", num_columns), _LEAST_BLOCK)
        branch_rows = rows if branch is None else as_rows(branch)
        is_new = branch is not None or form.copies
        summed = residual.new_empty(residual.shape) if is_new else residual
        normed = residual.new_empty(residual.shape)
        inverse_std = torch.empty(num_rows, dtype=torch.float32, device=residual.device)
        mean = inverse_std if form.is_rms else torch.empty_like(inverse_std)
        dropping = form.dropping
        keys = weight if dropping is None else dropping.keys.contiguous()
        probability = None if dropping is None else dropping.probability
        added = weight if branch_bias is None else branch_bias.contiguous()
        shift = weight if bias is None else bias.contiguous()
        tensors = (rows, branch_rows, added, keys, weight, shift, summed, normed, mean, inverse_std)
        sizes = (rows.stride(0), branch_rows.stride(0), num_columns, form.eps, *_numbers(probability))
        constants = {
            "IS_RMS": form.is_rms,
            "HAS_BRANCH": branch is not None,
            "COPIES": form.copies,
            "HAS_BRANCH_BIAS": branch_bias is not None,
            "DROPS": dropping is not None,
            "HAS_BIAS": bias is not None,
            "BLOCK": block,
            "num_warps": num_warps_for(block),
        }
        launch(_forward_kernel, (num_rows,), *tensors, *sizes, device=residual.device, **constants)
        # No tensor but by `save_for_backward`, which recomputation sees.
        kept_keys = None if dropping is None else keys
        normalised = residual if branch is None else summed
        ctx.save_for_backward(normalised, weight, None if form.is_rms else mean, inverse_std, kept_keys)
        ctx.probability = probability
        ctx.dtypes = [None if one is None else one.dtype for one in (branch_bias, weight, bias)]
        ctx.set_materialize_grads(False)
        return summed, normed

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_summed: torch.Tensor | None, grad_normed: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        """Gradients of both addends per row; those of parameters as partial sums per program, added up in fp32."""
        summed, weight, mean, inverse_std, keys = ctx.saved_tensors
        needs, drops = ctx.needs_input_grad, keys is not None
        rows = as_rows(summed)
        grad_rows = torch.zeros_like(rows) if grad_normed is None else as_rows(grad_normed)
        beside_rows = grad_rows if grad_summed is None else as_rows(grad_summed)
        num_rows, num_columns = rows.shape
        programs = min(num_rows, BACKWARD_PROGRAMS if num_columns <= _WIDE_ROW else BACKWARD_PROGRAMS // 2)
        need_x = needs[0] or (needs[1] and not drops)
        grad_x = summed.new_empty(summed.shape) if need_x else None
        grad_branch = (summed.new_empty(summed.shape) if needs[1] else None) if drops else grad_x
        places = _places(needs[2:5])
        partials = torch.empty(max(1, len(places)), programs, num_columns, dtype=torch.float32, device=summed.device)
        of = {need: partials[place] for need, place in places.items()}
        parameter_sums = [of.get(need, partials[0]) for need in range(3)]
        outputs = [rows if one is None else one for one in (grad_x, grad_branch)]
        statistics = (inverse_std if mean is None else mean, inverse_std)
        masks = weight if keys is None else keys
        tensors = (rows, grad_rows, beside_rows, weight, *statistics, masks, *outputs, *parameter_sums)
        strides = (rows.stride(0), grad_rows.stride(0), beside_rows.stride(0))
        constants = {
            "IS_RMS": mean is None,
            "HAS_BESIDE": grad_summed is not None,
            "DROPS": drops,
            "NEED_X": need_x,
            "NEED_BRANCH": drops and needs[1],
            "NEED_BRANCH_BIAS": 0 in places,
            "NEED_WEIGHT": 1 in places,
            "NEED_BIAS": 2 in places,
        }
        sizes = (*strides, num_rows, num_columns, programs, *_numbers(ctx.probability))
        _launch_backward(tensors, sizes, constants)
        sums = partials.sum(1) if places else partials
        of_parameters = [
            sums[places[need]].to(dtype) if need in places else None for need, dtype in enumerate(ctx.dtypes)
        ]
        return grad_x if needs[0] else None, grad_branch if needs[1] else None, *of_parameters, None


def _places(needs: tuple[bool, ...]) -> dict[int, int]:
    """Where among the partial sums those of each parameter are whose gradient is needed."""
    return {need: place for place, need in enumerate(number for number, needed in enumerate(needs) if needed)}


def _launch_backward(tensors: tuple[torch.Tensor, ...], sizes: tuple[float, ...], constants: dict[str, bool]) -> None:
    """`sizes` has the columns at 4 and the programs at 5."""
    block = max(whole_row_block("residual_norm", int(sizes[4])), _LEAST_BLOCK)
    grid, device = (int(sizes[5]),), tensors[0].device
    launch(
        _backward_kernel,
        grid,
        *tensors,
        *sizes,
        device=device,
        **constants,
        BLOCK=block,
        num_warps=num_warps_for(block),
    )


@jit
def _forward_kernel(
    residual_ptr: tl.tensor,
    branch_ptr: tl.tensor,
    branch_bias_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    summed_ptr: tl.tensor,
    normed_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    inverse_std_ptr: tl.tensor,
    residual_stride: tl.tensor,
    branch_stride: tl.tensor,
    num_columns: tl.tensor,
    eps: tl.tensor,
    least: tl.tensor,
    scale: tl.tensor,
    IS_RMS: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    COPIES: tl.constexpr,
    HAS_BRANCH_BIAS: tl.constexpr,
    DROPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Add and normalise one row, held whole in registers."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_columns
    x = tl.load(residual_ptr + row * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        branch = tl.load(branch_ptr + row * branch_stride + columns, mask=inside, other=0.0).to(tl.float32)
        if HAS_BRANCH_BIAS:
            branch += tl.load(branch_bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        if DROPS:
            keep = kept_columns(tl.load(keys_ptr + row), 0, least, BLOCK)
            branch = tl.where(keep, branch * scale, 0.0)
        rounded = (x + branch).to(summed_ptr.dtype.element_ty)
        tl.store(summed_ptr + row * num_columns + columns, rounded, mask=inside)
        x = rounded.to(tl.float32)
    if COPIES:
        copy = x
        if HAS_BRANCH_BIAS:
            copy += tl.load(branch_bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(summed_ptr + row * num_columns + columns, copy.to(summed_ptr.dtype.element_ty), mask=inside)
    if IS_RMS:
        centred = x
    else:
        mean = tl.sum(x, axis=0) / num_columns
        tl.store(mean_ptr + row, mean)
        centred = tl.where(inside, x - mean, 0.0)
    inverse_std = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / num_columns + eps)
    tl.store(inverse_std_ptr + row, inverse_std)
    normed = centred * inverse_std * tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        normed += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed_ptr + row * num_columns + columns, normed.to(normed_ptr.dtype.element_ty), mask=inside)


@jit
def _backward_kernel(
    summed_ptr: tl.tensor,
    grad_normed_ptr: tl.tensor,
    beside_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    inverse_std_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    grad_x_ptr: tl.tensor,
    grad_branch_ptr: tl.tensor,
    branch_bias_partial_ptr: tl.tensor,
    weight_partial_ptr: tl.tensor,
    bias_partial_ptr: tl.tensor,
    summed_stride: tl.tensor,
    grad_normed_stride: tl.tensor,
    beside_stride: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    num_programs: tl.tensor,
    least: tl.tensor,
    scale: tl.tensor,
    IS_RMS: tl.constexpr,
    HAS_BESIDE: tl.constexpr,
    DROPS: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_BRANCH: tl.constexpr,
    NEED_BRANCH_BIAS: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Gradients of rows program, program + num_programs, ...; parameter gradients stay in registers until the end."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_columns
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    bias_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    branch_bias_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    for row_index in range(program, num_rows, num_programs):
        row = tl.cast(row_index, tl.int64)
        x = tl.load(summed_ptr + row * summed_stride + columns, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_normed_ptr + row * grad_normed_stride + columns, mask=inside, other=0.0).to(tl.float32)
        inverse_std = tl.load(inverse_std_ptr + row)
        if IS_RMS:
            normalized = x * inverse_std
        else:
            normalized = tl.where(inside, (x - tl.load(mean_ptr + row)) * inverse_std, 0.0)
        if NEED_WEIGHT:
            weight_sum += grad * normalized
        if NEED_BIAS:
            bias_sum += grad
        if NEED_X or NEED_BRANCH or NEED_BRANCH_BIAS:
            scaled = grad * weight
            mean_projected = tl.sum(scaled * normalized, axis=0) / num_columns
            grad_x = scaled - normalized * mean_projected
            if not IS_RMS:
                grad_x -= tl.sum(scaled, axis=0) / num_columns
            grad_x *= inverse_std
            if HAS_BESIDE:
                grad_x += tl.load(beside_ptr + row * beside_stride + columns, mask=inside, other=0.0).to(tl.float32)
            at = row * num_columns + columns
            if NEED_X:
                tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
            if DROPS:
                keep = kept_columns(tl.load(keys_ptr + row), 0, least, BLOCK)
                grad_x = tl.where(keep, grad_x * scale, 0.0)
            if NEED_BRANCH:
                tl.store(grad_branch_ptr + at, grad_x.to(grad_branch_ptr.dtype.element_ty), mask=inside)
            if NEED_BRANCH_BIAS:
                branch_bias_sum += grad_x
    at = program.to(tl.int64) * num_columns + columns
    if NEED_WEIGHT:
        tl.store(weight_partial_ptr + at, weight_sum, mask=inside)
    if NEED_BIAS:
        tl.store(bias_partial_ptr + at, bias_sum, mask=inside)
    if NEED_BRANCH_BIAS:
        tl.store(branch_bias_partial_ptr + at, branch_bias_sum, mask=inside)


RESIDUAL_NORM = Kernel(name="residual_norm", reference=_reference, triton=_triton)
