"""What common operations return of tensors without memory: shapes, strides and dtypes, and nothing else.

torch has functions of its own for the meta device, which are made for its compiler: they import it, most of a second of
a run's start, and take longer than these. An operation that is not here, or whose result is not plain, is left to
torch. `test_result_shapes.py` holds each of these against the operation itself on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megatron3d.planner.elementwise_shapes import ELEMENTWISE, Function, dense_strides, empty, is_dense

aten = torch.ops.aten


def result_of(operation: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What an operation returns of tensors on the meta device, or NotImplemented; an argument is the result where torch
    writes in place."""
    function = RESULTS.get(operation)
    if function is None or any(isinstance(one, Tensor) and not one.is_meta for one in args):
        return NotImplemented
    return function(*args, **kwargs)


# --- Products, norms and what else a layer is made of -----------------------------------------------------------------


def _mm(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    return empty((a_MK.shape[0], b_KN.shape[1]), a_MK.dtype)


def _addmm(bias: Tensor, a_MK: Tensor, b_KN: Tensor, **_: Any) -> Tensor:
    return _mm(a_MK, b_KN)


def _mv(a_MK: Tensor, b_K: Tensor) -> Tensor:
    return empty(a_MK.shape[:1], a_MK.dtype)


def _bmm(a_BMK: Tensor, b_BKN: Tensor) -> Tensor:
    return empty((*a_BMK.shape[:2], b_BKN.shape[2]), a_BMK.dtype)


def _like(tensor: Tensor, **kwargs: Any) -> Any:
    """Another tensor like the first, in another dtype if one is given, whose dimensions lie as those of the first."""
    if kwargs.get("memory_format") not in (None, torch.preserve_format):
        return NotImplemented
    if torch.device(kwargs.get("device") or "meta").type != "meta":
        return NotImplemented
    dtype, shape = kwargs.get("dtype") or tensor.dtype, tensor.shape
    strides = tensor.stride() if is_dense(tensor) else dense_strides(shape, [tensor.stride()])
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


def _clone(tensor: Tensor, *, memory_format: torch.memory_format | None = None) -> Any:
    if memory_format is torch.contiguous_format:
        return empty(tensor.shape, tensor.dtype)
    return _like(tensor)


_CHANNELS_LAST = (4, 5)  # numbers of dimensions for which torch may keep another order than that of the dimensions


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Any:
    first = tensors[0]
    if any(one.dtype != first.dtype or one.dim() != first.dim() or not one.is_meta for one in tensors):
        return NotImplemented
    if first.dim() in _CHANNELS_LAST and not all(one.is_contiguous() for one in tensors):
        return NotImplemented
    shape = list(first.shape)
    shape[dim] = sum(one.shape[dim] for one in tensors)
    return empty(shape, first.dtype)


def _stack(tensors: Sequence[Tensor], dim: int = 0) -> Any:
    first = tensors[0]
    if not all(one.is_contiguous() and one.dtype == first.dtype and one.is_meta for one in tensors):
        return NotImplemented
    shape = list(first.shape)
    shape.insert(dim if dim >= 0 else dim + len(shape) + 1, len(tensors))
    return empty(shape, first.dtype)


def _embedding(table_VH: Tensor, ids: Tensor, *_: Any) -> Tensor:
    return empty((*ids.shape, table_VH.shape[1]), table_VH.dtype)


def _layer_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
    if not x.is_contiguous() or any(one is not None and one.dtype != x.dtype for one in (weight, bias)):
        return NotImplemented
    rows = (*x.shape[: x.dim() - len(shape)], *(1 for _ in shape))
    return empty(x.shape, x.dtype), empty(rows, x.dtype), empty(rows, x.dtype)


def _layer_norm_backward(grad: Tensor, x: Tensor, *others: Any) -> Any:
    _shape, _mean, _rstd, weight, bias, wanted = others
    if not (grad.is_contiguous() and x.is_contiguous()):
        return NotImplemented
    return tuple(
        empty(one.shape, one.dtype) if is_wanted and one is not None else None
        for one, is_wanted in zip((x, weight, bias), wanted, strict=True)
    )


def _product_out(*args: Any, out: Tensor) -> Any:
    """What a product is to write to, if it has the size."""
    return out if (args[0].shape[0], args[1].shape[1]) == out.shape else NotImplemented


def _sum_out(x: Tensor, dims: Sequence[int], keepdim: bool = False, *, out: Tensor, **_: Any) -> Any:
    """What a sum is to write to, if it has the size."""
    return out if _reduced(x, dims, keepdim).shape == out.shape else NotImplemented


def _softmax(x: Tensor, dim: int, half_to_float: bool) -> Any:
    return NotImplemented if half_to_float or not x.is_contiguous() else empty(x.shape, x.dtype)


def _softmax_backward(grad: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Any:
    return NotImplemented if not (grad.is_contiguous() and y.is_contiguous()) else empty(grad.shape, dtype)


def _reduced(x: Tensor, dims: int | Sequence[int] | None = None, keepdim: bool = False, **kwargs: Any) -> Any:
    """A sum or a maximum over dimensions."""
    dtype = kwargs.get("dtype") or (x.dtype if x.dtype.is_floating_point else torch.int64)
    listed = (dims,) if isinstance(dims, int) else dims or range(x.dim())
    gone = {dim % x.dim() for dim in listed}
    return empty([1 if i in gone else size for i, size in enumerate(x.shape) if keepdim or i not in gone], dtype)


def _norm(x: Tensor, order: float = 2, dims: Sequence[int] | None = None, keepdim: bool = False, **kwargs: Any) -> Any:
    return _reduced(x, dims, keepdim, **kwargs)


def _range(*bounds: float, dtype: torch.dtype | None = None, device: torch.device | str | None = None, **_: Any) -> Any:
    if device is None or torch.device(device).type != "meta":
        return NotImplemented
    start, end, step = (0, *bounds, 1) if len(bounds) == 1 else (*bounds, 1)[:3]
    counts = all(isinstance(one, int) for one in bounds)
    size = ceil((end - start) / step)
    return empty((size,), dtype or (torch.int64 if counts else torch.get_default_dtype()))


def _flash_attention(q_BNSD: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """The output, and one number for each query and head in the order in which the kernel writes them."""
    batch, heads, length, _width = q_BNSD.shape
    sums_BSN = empty((batch, length, heads), torch.float32)
    return _like(q_BNSD), sums_BSN.transpose(1, 2)


# --- Choosing --------------------------------------------------------------------------------------------------------


def _gather(x: Tensor, dim: int, index: Tensor, **_: Any) -> Tensor:
    return empty(index.shape, x.dtype)


def _index(x: Tensor, indices: Sequence[Tensor | None]) -> Any:
    """Of one or more leading dimensions, each by integers."""
    shapes = {None if one is None or one.dtype == torch.bool else one.shape for one in indices}
    found = shapes.pop()
    return NotImplemented if shapes or found is None else empty((*found, *x.shape[len(indices) :]), x.dtype)


def _index_select(x: Tensor, dim: int, index: Tensor) -> Tensor:
    shape = list(x.shape)
    shape[dim] = index.numel()
    return empty(shape, x.dtype)


def _changed_copy(x: Tensor, *_: Any, **__: Any) -> Any:
    return _like(x)


def _repeat(x: Tensor, times: Sequence[int]) -> Tensor:
    padded = (1,) * (len(times) - x.dim()) + tuple(x.shape)
    return empty([size * count for size, count in zip(padded, times, strict=True)], x.dtype)


def _sort(x: Tensor, dim: int = -1, descending: bool = False, **_: Any) -> Any:
    return (_like(x), _like(x, dtype=torch.int64)) if x.is_contiguous() else NotImplemented


def _sort_stably(x: Tensor, *, stable: bool | None, dim: int = -1, descending: bool = False) -> Any:
    return _sort(x, dim)


def _topk(x: Tensor, k: int, dim: int = -1, *_: Any) -> tuple[Tensor, Tensor]:
    shape = list(x.shape)
    shape[dim] = k
    return empty(shape, x.dtype), empty(shape, torch.int64)


def _nll_loss(x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignored: int) -> Any:
    return empty(() if reduction else target.shape, x.dtype), empty((), x.dtype)


def _nll_loss_backward(grad: Tensor, x: Tensor, *_: Any) -> Any:
    return empty(x.shape, x.dtype)


def _scattered(grad: Tensor, sizes: Sequence[int], *_: Any) -> Tensor:
    return empty(sizes, grad.dtype)


def _triangle(x: Tensor, diagonal: int = 0) -> Any:
    return empty(x.shape, x.dtype) if x.is_contiguous() else NotImplemented


RESULTS: Mapping[Any, Function] = MappingProxyType(
    {
        **ELEMENTWISE,
        aten.mm.default: _mm,
        aten.mm.out: _product_out,
        aten.mv.default: _mv,
        aten.addmm.default: _addmm,
        aten.bmm.default: _bmm,
        aten.empty_like.default: _like,
        aten.zeros_like.default: _like,
        aten.ones_like.default: _like,
        aten.clone.default: _clone,
        aten.cat.default: _cat,
        aten.stack.default: _stack,
        aten.embedding.default: _embedding,
        aten.native_layer_norm.default: _layer_norm,
        aten.native_layer_norm_backward.default: _layer_norm_backward,
        aten._softmax.default: _softmax,
        aten._softmax_backward_data.default: _softmax_backward,
        aten.sum.default: _reduced,
        aten.sum.dim_IntList: _reduced,
        aten.sum.IntList_out: _sum_out,
        aten.mean.dim: _reduced,
        aten.amax.default: _reduced,
        aten._log_softmax.default: _softmax,
        aten._log_softmax_backward_data.default: _softmax_backward,
        aten.nll_loss_forward.default: _nll_loss,
        aten.nll_loss_backward.default: _nll_loss_backward,
        aten.linalg_vector_norm.default: _norm,
        aten.arange.default: _range,
        aten.arange.start: _range,
        aten.arange.start_step: _range,
        aten._scaled_dot_product_flash_attention_for_cpu.default: _flash_attention,
        aten.gather.default: _gather,
        aten.index.Tensor: _index,
        aten.index_select.default: _index_select,
        aten.index_add.default: _changed_copy,
        aten.scatter_add.default: _changed_copy,
        aten.repeat.default: _repeat,
        aten.sort.default: _sort,
        aten.sort.stable: _sort_stably,
        aten.topk.default: _topk,
        aten.slice_backward.default: _scattered,
        aten.select_backward.default: _scattered,
        aten.triu.default: _triangle,
        aten.tril.default: _triangle,
    }
)
