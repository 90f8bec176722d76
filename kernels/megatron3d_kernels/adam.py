"""Adam over flat tensors in one pass: gradient times a scale, moments, fp32 weights, and their copy in a narrow dtype.

    g <- s g;  m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
    w <- w - lr decay w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps);  copy <- w, rounded

With the decay in the gradient instead, g <- s g + decay w. The scale s is what clips gradients and takes a loss scale
out of them. The copy is what the layers compute with. A parameter takes 28 bytes of memory traffic in one launch with
fp32 moments, 20 with bf16 ones, and 2 for the copy; passes of their own for the scale and the copy would take 14 more.

Moments in bf16 are worked on in fp32, and stored by a threshold (`rounding.py`).

Source: Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019 (AdamW), algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.optim.adam import adam as torch_adam

from megatron3d_kernels.launch import jit, launch, tl
from megatron3d_kernels.rounding import store_bf16, threshold
from megatron3d_kernels.selection import DEFAULT_SELECTION, Kernel, Selection

BLOCK = 1024
NUM_WARPS = 4
# On the CPU a chunk of a few tensors stays in the cache over the passes of an update; on a GPU launches count.
CHUNK_CPU = 1 << 16
CHUNK_DEVICE = 1 << 26


@dataclass(frozen=True)
class AdamTensors:
    """What one parameter consists of: dense one-dimensional tensors of one length and device.

    Attributes:
        value: the weights, fp32, updated in place.
        grad: the gradient, fp32, which may be used up.
        exp_avg: the first moment, fp32 or bf16, updated in place.
        exp_avg_sq: the second, likewise.
        copy: takes the updated weights, in a dtype of its own; None where no copy is wanted.
    """

    value: torch.Tensor
    grad: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    copy: torch.Tensor | None = None


@dataclass(frozen=True)
class AdamStep:
    """The numbers of one update: rates, coefficients, what gradients are multiplied with, and its number from 1."""

    lr: float
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    count: int
    decoupled: bool = True
    grad_scale: float = 1.0


def adam(parameters: Sequence[AdamTensors], step: AdamStep, *, selection: Selection = DEFAULT_SELECTION) -> None:
    """Update parameters, which have the same rates, in place."""
    if parameters:
        selection.pick(ADAM, parameters[0].value)(parameters, step)


Adam = Callable[[Sequence[AdamTensors], AdamStep], None]


def _reference(parameters: Sequence[AdamTensors], step: AdamStep) -> None:
    """torch's fused update, of fp32 moments all parameters at once, of bf16 ones chunk by chunk."""
    if step.grad_scale != 1.0:
        for one in parameters:
            one.grad.mul_(step.grad_scale)
    if all(moment.dtype == torch.float32 for one in parameters for moment in (one.exp_avg, one.exp_avg_sq)):
        _torch_update(parameters, step)
    else:
        for one in parameters:
            for chunk in _chunks(one):
                wide = replace(chunk, exp_avg=_wide(chunk.exp_avg), exp_avg_sq=_wide(chunk.exp_avg_sq))
                _torch_update([wide], step)
                store_bf16(chunk.exp_avg, wide.exp_avg, count=step.count)
                store_bf16(chunk.exp_avg_sq, wide.exp_avg_sq, count=step.count)
    for one in parameters:
        if one.copy is not None:
            one.copy.copy_(one.value)


def _chunks(one: AdamTensors) -> Iterator[AdamTensors]:
    """Ranges of a parameter, each small enough for elementwise passes to stay in the cache, without its copy."""
    size = CHUNK_CPU if one.value.device.type == "cpu" else CHUNK_DEVICE
    for tensors in zip(*(tensor.split(size) for tensor in (one.value, one.grad, one.exp_avg, one.exp_avg_sq))):
        yield AdamTensors(*tensors)


def _wide(moment: torch.Tensor) -> torch.Tensor:
    return moment if moment.dtype == torch.float32 else moment.float()


def _torch_update(parameters: Sequence[AdamTensors], step: AdamStep) -> None:
    """Parameters with fp32 moments and gradients that are scaled already."""
    # A number of its own for each, which torch adds 1 to; on a GPU one kernel writes them and nothing waits.
    device = parameters[0].value.device
    counts = torch.full((len(parameters),), step.count - 1.0, dtype=torch.float32, device=device)
    torch_adam(
        [one.value for one in parameters],
        [one.grad for one in parameters],
        [one.exp_avg for one in parameters],
        [one.exp_avg_sq for one in parameters],
        [],
        list(counts.unbind()),
        fused=True,
        decoupled_weight_decay=step.decoupled,
        amsgrad=False,
        beta1=step.beta1,
        beta2=step.beta2,
        lr=step.lr,
        weight_decay=step.weight_decay,
        eps=step.eps,
        maximize=False,
    )


def _triton(parameters: Sequence[AdamTensors], step: AdamStep) -> None:
    """One launch for each parameter."""
    correction1, correction2 = 1.0 - step.beta1**step.count, 1.0 - step.beta2**step.count
    numbers = (
        step.grad_scale,
        1.0 - step.lr * step.weight_decay if step.decoupled else step.weight_decay,
        step.beta1,
        1.0 - step.beta1,
        step.beta2,
        1.0 - step.beta2,
        step.lr / correction1,
        1.0 / math.sqrt(correction2),
        step.eps,
        threshold(step.count),
    )
    for one in parameters:
        tensors = (one.value, one.grad, _as_stored(one.exp_avg), _as_stored(one.exp_avg_sq))
        copy = one.value if one.copy is None else one.copy
        launch(
            _adam_kernel,
            (-(-one.value.numel() // BLOCK),),
            *tensors,
            copy,
            one.value.numel(),
            *numbers,
            device=one.value.device,
            DECOUPLED=step.decoupled,
            BF16_AVERAGE=one.exp_avg.dtype != torch.float32,
            BF16_SQUARE=one.exp_avg_sq.dtype != torch.float32,
            HAS_COPY=one.copy is not None,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )


def _as_stored(moment: torch.Tensor) -> torch.Tensor:
    """A bf16 moment as its bits."""
    return moment if moment.dtype == torch.float32 else moment.view(torch.int16)


@jit
def _load_moment(ptr: tl.tensor, inside: tl.tensor, IS_BF16: tl.constexpr) -> tl.tensor:
    """The upper half of an fp32 number are the bits of a bf16 one."""
    value = tl.load(ptr, mask=inside, other=0)
    if IS_BF16:
        value = (value.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return value


@jit
def _store_moment(
    ptr: tl.tensor, value: tl.tensor, threshold: tl.tensor, inside: tl.tensor, IS_BF16: tl.constexpr
) -> None:
    if IS_BF16:
        bits = value.to(tl.int32, bitcast=True) + threshold
        tl.store(ptr, (bits >> 16).to(tl.int16), mask=inside)
    else:
        tl.store(ptr, value, mask=inside)


@jit
def _adam_kernel(
    value_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    average_ptr: tl.tensor,
    square_ptr: tl.tensor,
    copy_ptr: tl.tensor,
    length: tl.tensor,
    grad_scale: tl.tensor,
    decay: tl.tensor,
    beta1: tl.tensor,
    rest1: tl.tensor,
    beta2: tl.tensor,
    rest2: tl.tensor,
    rate: tl.tensor,
    inverse_root: tl.tensor,
    eps: tl.tensor,
    threshold: tl.tensor,
    DECOUPLED: tl.constexpr,
    BF16_AVERAGE: tl.constexpr,
    BF16_SQUARE: tl.constexpr,
    HAS_COPY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < length
    value = tl.load(value_ptr + places, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + places, mask=inside, other=0.0) * grad_scale
    average = _load_moment(average_ptr + places, inside, BF16_AVERAGE)
    square = _load_moment(square_ptr + places, inside, BF16_SQUARE)
    if DECOUPLED:
        value = value * decay
    else:
        grad = grad + decay * value
    average = beta1 * average + rest1 * grad
    square = beta2 * square + rest2 * grad * grad
    value = value - rate * average / (tl.sqrt(square) * inverse_root + eps)
    tl.store(value_ptr + places, value, mask=inside)
    _store_moment(average_ptr + places, average, threshold, inside, BF16_AVERAGE)
    _store_moment(square_ptr + places, square, threshold, inside, BF16_SQUARE)
    if HAS_COPY:
        tl.store(copy_ptr + places, value.to(copy_ptr.dtype.element_ty), mask=inside)


ADAM: Kernel[Adam] = Kernel(name="adam", reference=_reference, triton=_triton)
