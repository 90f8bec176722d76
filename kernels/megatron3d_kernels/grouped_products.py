"""The products of many linear layers of one shape, each with rows of its own: the experts of a mixture.

    y[rows of e] = x[rows of e] W_e^T + b_e        dx[rows of e] = g[rows of e] W_e
    dW_e += g[rows of e]^T x[rows of e]

The rows of a layer lie together, those of the first layer first. There are three ways to make the products:

    looped    one layer after another, by the library that multiplies all else (`products.py`)
    batched   all layers in one product of stacks, where all have equally many rows
    grouped   torch's grouped product (`torch.nn.functional.grouped_mm`), whatever the rows; on a CPU it is the loop

The last two read the weights of all layers as one [E, O, I]: a view of the buffer in which they lie at equal distances,
never a copy. Where they lie otherwise, or at strides that torch refuses, products are looped. Which way is taken is a
measured table, `FASTEST`, that `tools/bench/grouped.py` makes. A layer without rows multiplies nothing. No function
here is differentiable: the layers have a backward of their own.

Shapes: R rows of all layers, E layers, C rows of each where they are equally many, I input and O output features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron3d_kernels import products
from megatron3d_kernels.launch import KernelError, sent

LOOPED, BATCHED, GROUPED = "looped", "batched", "grouped"
WAYS = (LOOPED, BATCHED, GROUPED)

FASTEST: Mapping[tuple[str, torch.dtype], tuple[tuple[int, str], ...]] = MappingProxyType(
    {
        ("cpu", torch.float32): ((1024, BATCHED),),
        ("cpu", torch.bfloat16): ((1024, BATCHED),),
    }
)
"""By device and dtype: up to how many rows of a layer which way is fastest; beyond, and where rows are not equally
many, products are looped. Devices that are not here have not been measured."""
_ALIGNED = 16  # bytes that the strides of torch's grouped product are multiples of


def has_grouped() -> bool:
    """Whether this version of torch has a public grouped product."""
    return hasattr(F, "grouped_mm")


def require_way(way: str | None) -> str | None:
    """The way if it is one that can be taken here; raises KernelError if it is not. None is by the table."""
    if way is not None and way not in WAYS:
        raise KernelError(f"There is no way {way!r} to make grouped products; use one of {', '.join(WAYS)}.")
    if way == GROUPED and not has_grouped():
        raise KernelError("'grouped' products need a torch with torch.nn.functional.grouped_mm; use 'looped'.")
    return way


def grouped_linear(
    x_RI: Tensor,
    weights_OI: Sequence[Tensor],
    biases_O: Sequence[Tensor | None],
    counts: Sequence[int],
    *,
    library: str = products.TORCH,
    way: str | None = None,
) -> Tensor:
    """x W_e^T + b_e for the rows of each layer, [R, O]; `counts` has the rows of each."""
    way = way_of(x_RI, counts, library=library, way=way)
    biases = [bias for bias in biases_O if bias is not None]
    weight_EOI, bias_EO = _stack(weights_OI, way), _stack(biases, way) if biases else None
    if weight_EOI is None or (biases and bias_EO is None):
        return _looped_linear(x_RI, weights_OI, biases_O, counts, library)
    if way == GROUPED:
        y_RO = _grouped(x_RI, weight_EOI.transpose(1, 2), counts)
        for number, rows in _stretches(counts if biases else ()):
            y_RO[rows] += biases[number]
        return y_RO
    x_ECI = _by_layer(x_RI, counts)
    if bias_EO is None:
        return torch.bmm(x_ECI, weight_EOI.transpose(1, 2)).flatten(0, 1)
    return torch.baddbmm(bias_EO.unsqueeze(1), x_ECI, weight_EOI.transpose(1, 2)).flatten(0, 1)


def grouped_input_gradient(
    grad_RO: Tensor,
    weights_OI: Sequence[Tensor],
    counts: Sequence[int],
    *,
    library: str = products.TORCH,
    way: str | None = None,
) -> Tensor:
    """g W_e for the rows of each layer, [R, I]."""
    way = way_of(grad_RO, counts, library=library, way=way)
    weight_EOI = _stack(weights_OI, way)
    if weight_EOI is not None and way == GROUPED:
        return _grouped(grad_RO, weight_EOI, counts)
    if weight_EOI is not None:
        return torch.bmm(_by_layer(grad_RO, counts), weight_EOI).flatten(0, 1)
    grad_RI = grad_RO.new_empty(grad_RO.shape[0], weights_OI[0].shape[1])
    for number, rows in _stretches(counts):
        if library != products.TORCH:
            grad_RI[rows] = products.input_gradient(grad_RO[rows], weights_OI[number], library=library)
        else:
            torch.mm(grad_RO[rows], weights_OI[number], out=grad_RI[rows])
    return grad_RI


def add_grouped_weight_gradients(
    buffers_OI: Sequence[Tensor],
    grad_RO: Tensor,
    x_RI: Tensor,
    counts: Sequence[int],
    *,
    overwrites: Sequence[bool],
    library: str = products.TORCH,
    way: str | None = None,
) -> None:
    """buffer_e += g^T x of the rows of each layer, or = where it `overwrites`. All of one dtype."""
    way = way_of(x_RI, counts, library=library, way=way)
    buffer_EOI = _stack(buffers_OI, way) if way == BATCHED and len(set(overwrites)) == 1 else None
    if buffer_EOI is not None:
        grad_EOC, x_ECI = _by_layer(grad_RO, counts).transpose(1, 2), _by_layer(x_RI, counts)
        if overwrites[0]:
            torch.bmm(grad_EOC, x_ECI, out=buffer_EOI)
        else:
            buffer_EOI.baddbmm_(grad_EOC, x_ECI)
        return
    layers = zip(buffers_OI, grad_RO.split(list(counts)), x_RI.split(list(counts)), overwrites, strict=True)
    for buffer_OI, grad, x, overwrite in layers:
        products.add_weight_gradient(buffer_OI, grad, x, library=library, overwrites=overwrite)


def way_of(x_RA: Tensor, counts: Sequence[int], *, library: str = products.TORCH, way: str | None = None) -> str:
    """The way that products of these rows take: `way`, or for None that of the table, where it can be taken."""
    if library != products.TORCH or not x_RA.shape[0] or x_RA.device.type == "meta":
        return LOOPED
    if way is None:
        mean = x_RA.shape[0] / len(counts)
        ranges = FASTEST.get((x_RA.device.type, x_RA.dtype), ())
        way = next((name for most, name in ranges if mean <= most), LOOPED)
    if way == BATCHED and any(count != counts[0] for count in counts):
        return LOOPED
    return way


def _looped_linear(
    x_RI: Tensor,
    weights_OI: Sequence[Tensor],
    biases_O: Sequence[Tensor | None],
    counts: Sequence[int],
    library: str,
) -> Tensor:
    y_RO = x_RI.new_empty(x_RI.shape[0], weights_OI[0].shape[0])
    for number, rows in _stretches(counts):
        weight, bias = weights_OI[number], biases_O[number]
        if library != products.TORCH:
            y_RO[rows] = products.linear(x_RI[rows], weight, bias, library=library)
        elif bias is None:
            torch.mm(x_RI[rows], weight.t(), out=y_RO[rows])
        else:
            torch.addmm(bias, x_RI[rows], weight.t(), out=y_RO[rows])
    return y_RO


def _grouped(x_RA: Tensor, weight_EAB: Tensor, counts: Sequence[int]) -> Tensor:
    """The rows of each layer times its matrix, [R, B]; torch's product refuses strides of 0."""
    ends_E = sent(torch.tensor(list(accumulate(counts)), dtype=torch.int32), x_RA.device)
    return F.grouped_mm(x_RA.contiguous(), weight_EAB, offs=ends_E)


def _by_layer(x_RA: Tensor, counts: Sequence[int]) -> Tensor:
    """[E, C, A], where all layers have as many rows."""
    return x_RA.unflatten(0, (len(counts), counts[0]))


def _stack(tensors: Sequence[Tensor], way: str) -> Tensor | None:
    if way == LOOPED:
        return None
    found = stacked(tensors)
    if found is not None and way == GROUPED and any(n * found.element_size() % _ALIGNED for n in _strides(found)):
        return None
    return found


def _strides(stack: Tensor) -> tuple[int, ...]:
    """Those of a stack of matrices and of the rows that they multiply, or of a stack of vectors."""
    return (stack.stride(0), *stack.shape[1:]) if stack.dim() > 2 else (stack.stride(0),)


def stacked(tensors: Sequence[Tensor]) -> Tensor | None:
    """Tensors of one shape as one, [E, ...], a view of the storage in which they lie at equal distances; None where
    they do not."""
    first = tensors[0]
    storage = first.untyped_storage().data_ptr()
    if not all(one.is_contiguous() and one.untyped_storage().data_ptr() == storage for one in tensors):
        return None
    offsets = [one.storage_offset() for one in tensors]
    step = offsets[1] - offsets[0] if len(offsets) > 1 else first.numel()
    if step < first.numel() or any(b - a != step for a, b in pairwise(offsets)):
        return None
    return first.detach().as_strided((len(tensors), *first.shape), (step, *first.stride()), offsets[0])


def _stretches(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Number and rows of each layer that has some."""
    first = 0
    for number, count in enumerate(counts):
        if count:
            yield number, slice(first, first + count)
        first += count
