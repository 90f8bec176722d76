"""What elementwise operations return of tensors without memory, as torch's TensorIterator decides it.

Source: aten/src/ATen/TensorIterator.cpp (`reorder_dimensions`, `allocate_or_resize_outputs`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
Function = Callable[..., Any]


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor without memory and without gaps."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _same(*args: Any, **_: Any) -> Any:
    """Elementwise, in the dtype of the arguments."""
    return _elementwise(args, _common_dtype(args))


def _number(*args: Any, **_: Any) -> Any:
    """Elementwise, in the dtype of the arguments, which of integers is torch's default one."""
    dtype = _common_dtype(args)
    return _elementwise(args, torch.get_default_dtype() if dtype is not None and not dtype.is_floating_point else dtype)


def _truth(*args: Any, **_: Any) -> Any:
    """Elementwise, whether something holds."""
    return _elementwise(args, torch.bool)


def _power(base: float, x: Tensor) -> Any:
    """A power of a number, always without gaps."""
    return empty(x.shape, x.dtype) if x.dtype.is_floating_point else NotImplemented


def _relu_backward(grad: Tensor, x: Tensor, *_: Any) -> Any:
    """Elementwise; the input comes first."""
    return _same(x, grad)


def _filled(x: Tensor, mask: Tensor, value: Any) -> Any:
    """A copy with another value where the mask is true, always without gaps."""
    return empty(_broadcast([x.shape, mask.shape]), x.dtype)


def _chosen(condition: Tensor, *args: Any) -> Any:
    """Elementwise, in the dtype of all but the first."""
    return _elementwise((condition, *args), _common_dtype(args))


def _written(*args: Any, **_: Any) -> Any:
    """The first argument, which is written in place."""
    return args[0]


def _written_out(*args: Any, out: Tensor, **_: Any) -> Any:
    """What an elementwise operation is to write to, if it has the size."""
    return out if _broadcast([one.shape for one in args if isinstance(one, Tensor)]) == out.shape else NotImplemented


def _elementwise(args: Sequence[Any], dtype: torch.dtype | None) -> Any:
    tensors = [one for one in args if isinstance(one, Tensor)]
    if dtype is None:
        return NotImplemented
    first, shape = tensors[0], _broadcast([one.shape for one in tensors])
    if all(map(_is_in_order, tensors)):
        return empty(shape, dtype)
    if is_dense(first) and all(one.shape == first.shape and one.stride() == first.stride() for one in tensors):
        strides = first.stride()
    elif len({one.dtype for one in tensors}) > 1 and any(0 in one.stride() for one in tensors):
        return NotImplemented  # what is converted first is no longer expanded
    else:
        strides = dense_strides(shape, [one.expand(shape).stride() for one in tensors])
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


def dense_strides(shape: Sequence[int], given: Sequence[Sequence[int]]) -> list[int]:
    """Strides of a result without gaps whose dimensions lie as those of the arguments, the first of which comes first.

    As torch's TensorIterator orders them: by insertion, where a stride of 0 says nothing.
    """

    def is_outer(one: int, other: int) -> bool | None:
        for strides in given:
            if strides[one] and strides[other] and (strides[one] != strides[other] or shape[one] > shape[other]):
                return strides[one] >= strides[other]
        return None

    order = list(reversed(range(len(shape))))  # from the innermost
    for last in range(1, len(order)):
        at = last
        for before in reversed(range(last)):
            decided = is_outer(order[before], order[at])
            if decided:
                order[before], order[at], at = order[at], order[before], before
            elif decided is not None:
                break
    strides, stride = [0] * len(order), 1
    for dim in order:
        strides[dim], stride = stride, stride * shape[dim]
    return strides


def _common_dtype(args: Sequence[Any]) -> torch.dtype | None:
    """The dtype in which torch computes with tensors and numbers, where it is plain."""
    tensors = [one for one in args if isinstance(one, Tensor)]
    has_number = any(isinstance(one, float) for one in args)
    dtypes = {one.dtype for one in tensors}
    if len(tensors) == 2 and len(dtypes) == 2:
        dtypes = {torch.result_type(tensors[0], tensors[1])}
    found = dtypes.pop()
    return None if dtypes or (has_number and not found.is_floating_point) else found


def _broadcast(shapes: Sequence[torch.Size]) -> tuple[int, ...]:
    if all(shape == shapes[0] for shape in shapes):
        return tuple(shapes[0])
    ndim = max(map(len, shapes))
    padded = [(1,) * (ndim - len(shape)) + tuple(shape) for shape in shapes]
    return tuple(next((size for size in sizes if size != 1), 1) for sizes in zip(*padded, strict=True))


def _is_in_order(tensor: Tensor) -> bool:
    """Whether dimensions lie one within the other as their order is, so that a result has them so without gaps."""
    if tensor.is_contiguous():
        return True
    strides = [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1 and stride]
    return strides == sorted(strides, reverse=True)


def is_dense(tensor: Tensor) -> bool:
    """Whether elements fill the memory without gaps, whatever the order of the dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride()) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


_SAME = (
    *(aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.mul.Tensor, aten.mul.Scalar),
    *(aten.rsub.Scalar, aten.neg.default, aten.abs.default, aten.relu.default, aten.maximum.default),
    *(aten.bitwise_and.Tensor, aten.bitwise_or.Tensor, aten.bitwise_xor.Tensor, aten.clamp.default),
    *(aten.clamp_min.default, aten.lerp.Scalar, aten.addcmul.default, aten.gelu_backward.default),
    *(aten.silu_backward.default, aten.sigmoid_backward.default, aten.tanh_backward.default),
    *(aten.pow.Tensor_Scalar, aten.bitwise_not.default),
    *(aten.floor_divide.default, aten.minimum.default),
)
_NUMBERS = (
    *(aten.div.Tensor, aten.div.Scalar, aten.exp.default, aten.log.default, aten.sqrt.default, aten.rsqrt.default),
    *(aten.reciprocal.default, aten.sigmoid.default, aten.tanh.default, aten.silu.default, aten.gelu.default),
    *(aten.cos.default, aten.sin.default, aten.special_entr.default),
)
_TRUTHS = (
    *(aten.eq.Scalar, aten.eq.Tensor, aten.ne.Scalar, aten.ne.Tensor, aten.lt.Scalar, aten.lt.Tensor),
    *(aten.le.Scalar, aten.le.Tensor, aten.gt.Scalar, aten.gt.Tensor, aten.ge.Scalar, aten.ge.Tensor),
    *(aten.logical_not.default, aten.logical_and.default, aten.logical_or.default),
)
IN_PLACE = (
    *(aten.add_.Tensor, aten.add_.Scalar, aten.sub_.Tensor, aten.sub_.Scalar, aten.mul_.Tensor, aten.mul_.Scalar),
    *(aten.div_.Tensor, aten.div_.Scalar, aten.exp_.default, aten.addmm_.default, aten.addcmul_.default),
    *(aten.masked_fill_.Scalar, aten.masked_fill_.Tensor, aten.index_put_.default, aten.index_add_.default),
    *(aten.scatter_.src, aten.scatter_.value),
    *(aten.bitwise_and_.Scalar, aten.bitwise_and_.Tensor, aten.bitwise_xor_.Tensor, aten.bitwise_xor_.Scalar),
    *(aten.clamp_.default, aten.rsqrt_.default, aten.sqrt_.default, aten.scatter_add_.default, aten.lerp_.Scalar),
    *(aten.zero_.default, aten.fill_.Scalar, aten.copy_.default, aten.pow_.Scalar, aten.tril_.default),
)
OUT = (
    *(aten.add.out, aten.sub.out, aten.mul.out, aten.div.out, aten.exp.out, aten.clamp.out, aten.ge.Scalar_out),
    *(aten.lt.Scalar_out, aten.bitwise_right_shift.Tensor_Scalar_out, aten.bitwise_and.Scalar_out),
    *(aten.bitwise_xor.Tensor_out, aten.lt.Tensor_out, aten.ge.Tensor_out),
)
ELEMENTWISE: Mapping[Any, Function] = MappingProxyType(
    {
        **dict.fromkeys(_SAME, _same),
        **dict.fromkeys(_NUMBERS, _number),
        **dict.fromkeys(_TRUTHS, _truth),
        **dict.fromkeys(IN_PLACE, _written),
        **dict.fromkeys(OUT, _written_out),
        aten.pow.Scalar: _power,
        aten.threshold_backward.default: _relu_backward,
        aten.where.self: _chosen,
        aten.masked_fill.Scalar: _filled,
        aten.masked_fill.Tensor: _filled,
    }
)
