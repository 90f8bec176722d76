"""A layer that works on each position by itself, run over chunks of the sequence, one after another.

No more of what it makes inside exists than one chunk's. The forward keeps the layer's input alone. The backward runs
the layer again chunk by chunk and differentiates each before the next. A schedule that splits the backward keeps what
the weight gradients need of all chunks between the two steps, as it does without chunks.

Source: Bekman et al. 2025 (arXiv:2506.13996, Arctic Long Sequence Training), section 3.1, "TiledMLP".

Shapes: S sequence (local under sequence parallelism), B micro-batch, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron3d.params.grads import GradSink


@dataclass(frozen=True)
class PositionwiseLayer:
    """A function of [S, B, H] each position of which depends on the same one of its input alone, without random numbers
    or losses of its own. `sink` takes the gradients of its parameters."""

    function: Callable[[Tensor], Tensor]
    sink: GradSink


class _InChunks(torch.autograd.Function):
    """The layer's output, from a forward without a graph; `parameters` are there to say that a gradient is needed."""

    @staticmethod
    def forward(
        ctx: Any, x_SBH: Tensor, layer: PositionwiseLayer, num_chunks: int, *parameters: nn.Parameter
    ) -> Tensor:
        ctx.save_for_backward(x_SBH)
        ctx.layer, ctx.num_chunks = layer, num_chunks
        y_SBH: Tensor | None = None
        for rows in _chunks(len(x_SBH), num_chunks):
            y_CBH = layer.function(x_SBH[rows])
            y_SBH = y_CBH.new_empty((len(x_SBH), *y_CBH.shape[1:])) if y_SBH is None else y_SBH
            y_SBH[rows] = y_CBH
        assert y_SBH is not None, "a sequence has positions"
        return y_SBH

    @staticmethod
    def backward(ctx: Any, grad_SBH: Tensor) -> tuple[Tensor | None, ...]:
        (x_SBH,) = ctx.saved_tensors
        layer: PositionwiseLayer = ctx.layer
        grad_in_SBH = torch.empty_like(x_SBH) if ctx.needs_input_grad[0] else None
        with layer.sink.joined():
            for rows in _chunks(len(x_SBH), ctx.num_chunks):
                x_CBH = x_SBH[rows].detach().requires_grad_(grad_in_SBH is not None)
                with torch.enable_grad():
                    y_CBH = layer.function(x_CBH)
                torch.autograd.backward(y_CBH, grad_SBH[rows])
                del y_CBH
                if grad_in_SBH is not None:
                    assert x_CBH.grad is not None, "the output of a layer depends on its input"
                    grad_in_SBH[rows] = x_CBH.grad
        return grad_in_SBH, None, None, *(None for _ in ctx.needs_input_grad[3:])


def _chunks(length: int, num_chunks: int) -> list[slice]:
    """Chunks of about equal length, of at least one position each."""
    number = min(num_chunks, length)
    return [slice(i * length // number, (i + 1) * length // number) for i in range(number)]


def in_chunks(layer: PositionwiseLayer, x_SBH: Tensor, num_chunks: int, parameters: tuple[nn.Parameter, ...]) -> Tensor:
    """layer.function(x_SBH) in chunks of the sequence.

    Args:
        layer: the function, and where the gradients of its parameters go.
        x_SBH: on the residual stream.
        num_chunks: at most so many, one position being the smallest chunk.
        parameters: of the function.
    """
    return _InChunks.apply(x_SBH, layer, num_chunks, *parameters)
