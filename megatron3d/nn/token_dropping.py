"""Random layerwise token dropping (random-LTD): a layer sees some positions of each sample, the others pass it by.

    kept        r of the S positions of a sample, sorted; other ones in each layer and sample
    x[kept]     through the layer, with their true rotations and masks
    the rest    unchanged

Nothing here has a state. What a layer keeps is a function of run, step, sample and layer, so a recomputed forward, a
split backward and several micro-batches under way all keep the same, at every layout.

The draw is stratified: a sample is cut into 16 strata of consecutive positions, and of each equally many are kept. So
the ranks of sequence and context parallelism, each of which holds whole strata, keep equally many rows of their own
shards, and exchange nothing beyond what the layer exchanges anyway.

Kept positions are in ascending order, so that attention among them is plain causal attention where it was before.
Dropout inside the layer counts the rows that it sees.

Source: Yao et al. 2022 (arXiv:2211.11586), section 3, for the method, which draws without strata.

Shapes: S sequence (local under sequence parallelism), L whole sequence, B micro-batch, H hidden, R kept positions of a
sample, K kept rows of all samples on this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from megatron3d_kernels.dropout import child_keys
from torch import Tensor

from megatron3d.comm.device import sent
from megatron3d.config.random_ltd import NUM_STRATA
from megatron3d.nn.documents import kept_rectangles
from megatron3d.nn.inputs import LayerInputs
from megatron3d.params.streams import stream_seed
from megatron3d.tensor.context import LayerContext

_KEY_BITS = 58  # of the random numbers that are sorted, below the 4 bits of a stratum and the sign


class PositionRouter(Protocol):
    """Chooses the positions that a layer sees in one step."""

    def num_kept(self, layer: int, length: int) -> int:
        """R, of each sample of `length` positions."""
        ...

    def kept(self, layer: int, samples: range, length: int, device: torch.device) -> Tensor | None:
        """The kept positions of these samples of the run, int64 [B, R], each row ascending; None keeps all."""
        ...


@dataclass(frozen=True)
class StratifiedRouter:
    """The random choice.

    Attributes:
        seed: of the run and the step (`step_seed`).
        most_kept: positions to keep, at least 16; where a sample has more, a multiple of 16 of them.
    """

    seed: int
    most_kept: int

    def num_kept(self, layer: int, length: int) -> int:
        """All of a sample that is not longer; else at most as many as strata of equal counts can give."""
        if self.most_kept >= length:
            return length
        return self.most_kept // NUM_STRATA * NUM_STRATA

    def kept(self, layer: int, samples: range, length: int, device: torch.device) -> Tensor | None:
        """Of each stratum those of the smallest random numbers, a number for each (seed, layer, sample, position)."""
        num_kept = self.num_kept(layer, length)
        if num_kept == length:
            return None
        of_layer = stream_seed(self.seed, "layer", layer)
        keys_B = child_keys(of_layer, torch.arange(samples.start, samples.stop, device=device))
        return smallest_of_strata(keys_B, num_kept=num_kept, length=length)


def step_seed(seed: int, step: int) -> int:
    """The seed of the choices of one step of a run."""
    return stream_seed(seed, "random_ltd", step)


def smallest_of_strata(keys_B: Tensor, *, num_kept: int, length: int) -> Tensor:
    """Positions of the smallest random numbers, equally many of each of 16 strata, int64 [B, R] ascending.

    Stratum i is the positions from i L / 16 on, rounded down. A shard of a sequence that divides among 2, 4, 8 or 16
    ranks is therefore whole strata, whether or not 16 divides the length.

    Args:
        keys_B: the random key of each sample.
        num_kept: R, a multiple of 16, at most 16 times the size of the smallest stratum.
        length: L.
    """
    assert num_kept % NUM_STRATA == 0 and num_kept <= length // NUM_STRATA * NUM_STRATA, f"{num_kept} of {length}"
    positions_L = torch.arange(length, device=keys_B.device)
    stratum_L = (NUM_STRATA * (positions_L + 1) - 1) // length
    random_BL = (child_keys(keys_B.unsqueeze(1), positions_L) >> (64 - _KEY_BITS)) & ((1 << _KEY_BITS) - 1)
    order_BL = (random_BL + (stratum_L << _KEY_BITS)).argsort(dim=1, stable=True)  # stratum by stratum
    first_of_strata = torch.arange(NUM_STRATA, device=keys_B.device) * length // NUM_STRATA
    smallest = torch.arange(num_kept // NUM_STRATA, device=keys_B.device)
    chosen_R = (first_of_strata.unsqueeze(1) + smallest).flatten()
    return order_BL.index_select(1, chosen_R).sort(dim=1).values


@dataclass(frozen=True)
class TokenDropping:
    """Which positions the layers see of one micro-batch.

    Attributes:
        router: of the step.
        layers: the numbers of the layers that it is asked for; the others see all.
        first_sample: number in the run of the micro-batch's first sample; the others follow it.
    """

    router: PositionRouter
    layers: frozenset[int]
    first_sample: int

    def kept(self, layer: int, num_samples: int, length: int, device: torch.device) -> Tensor | None:
        """The positions that a layer sees, int64 [B, R], each row ascending; None where it sees all."""
        if layer not in self.layers:
            return None
        return self.router.kept(layer, range(self.first_sample, self.first_sample + num_samples), length, device)


def on_kept_positions(
    layer: Callable[[Tensor, LayerInputs], Tensor], number: int, context: LayerContext
) -> Callable[[Tensor, LayerInputs], Tensor]:
    """The layer of this number in the model, run on the positions that its inputs let it see; the rest of the residual
    stream [S, B, H] stays as it is."""

    def run(x_SBH: Tensor, inputs: LayerInputs) -> Tensor:
        if inputs.dropping is None:
            return layer(x_SBH, inputs)
        shards = context.tp.size if context.sequence_parallel else 1
        length, samples = x_SBH.shape[0], x_SBH.shape[1]
        parts = 1 if inputs.shards is None else inputs.shards.num_ranks
        kept = partial(inputs.dropping.kept, number, samples, length * shards * parts)
        kept_BR = kept(x_SBH.device)
        if kept_BR is None:
            return layer(x_SBH, inputs)
        if inputs.rectangles is not None or inputs.shards is not None:
            # The host of a device draws too: waiting for what the device has drawn would cost more.
            on_host_BR = kept_BR if kept_BR.device.type == "cpu" else kept(torch.device("cpu"))
            assert on_host_BR is not None, "what a layer sees does not depend on the device"
            if inputs.rectangles is not None:
                inputs = replace(inputs, rectangles=kept_rectangles(inputs.rectangles, on_host_BR))
            if inputs.shards is not None:
                left, rows_BR = inputs.shards.of_kept(on_host_BR)
                inputs, kept_BR = replace(inputs, shards=left.sent_to(x_SBH.device)), sent(rows_BR, x_SBH.device)
        first = length * context.tp.rank if shards > 1 else 0
        rows_K = _rows(context.local_sequence(kept_BR.t()) - first)
        y_RBH = layer(_Keep.apply(x_SBH, rows_K), _of_kept(inputs, kept_BR, length * shards))
        return _PutBack.apply(x_SBH, y_RBH, rows_K)

    return run


def _rows(kept_RB: Tensor) -> Tensor:
    """Positions of each sample as rows of [S, B] flattened, [K]."""
    samples = kept_RB.shape[1]
    return (kept_RB * samples + torch.arange(samples, device=kept_RB.device)).flatten()


def _of_kept(inputs: LayerInputs, kept_BR: Tensor, length: int) -> LayerInputs:
    """What a layer may know of a micro-batch whose samples have these positions alone."""
    rotary, mask = inputs.rotary, inputs.attention_mask_BST
    if rotary is not None:
        rotary = (_at(rotary[0], kept_BR), _at(rotary[1], kept_BR))
    if mask is not None:
        if mask.shape[1] > 1:
            mask = mask.gather(1, kept_BR.unsqueeze(2).expand(-1, -1, mask.shape[2]))
        mask = mask.gather(2, kept_BR.unsqueeze(1).expand(-1, mask.shape[1], -1))
    share = kept_BR.shape[1] / length
    return replace(inputs, rotary=rotary, attention_mask_BST=mask, dropping=None, kept_share=share)


def _at(table: Tensor, kept_BR: Tensor) -> Tensor:
    """Rows of a table [L, R/2] or [B, L, R/2] at the positions of each sample, [B, R, R/2]."""
    if table.dim() == 2:
        return table[kept_BR]
    return table.gather(1, kept_BR.unsqueeze(2).expand(-1, -1, table.shape[2]))


class _Keep(torch.autograd.Function):
    """Some rows of [S, B] x H, as [K/B, B, H]. No row twice, so the backward adds nothing up."""

    @staticmethod
    def forward(ctx: Any, x_SBH: Tensor, rows_K: Tensor) -> Tensor:
        ctx.save_for_backward(rows_K)
        ctx.shape = x_SBH.shape
        return x_SBH.flatten(0, 1).index_select(0, rows_K).unflatten(0, (-1, x_SBH.shape[1]))

    @staticmethod
    def backward(ctx: Any, grad_RBH: Tensor) -> tuple[Tensor, None]:
        (rows_K,) = ctx.saved_tensors
        grad = grad_RBH.new_zeros(ctx.shape)
        grad.flatten(0, 1).index_copy_(0, rows_K, grad_RBH.flatten(0, 1))
        return grad, None


class _PutBack(torch.autograd.Function):
    """[S, B, H] with other values, [K/B, B, H], in some rows."""

    @staticmethod
    def forward(ctx: Any, x_SBH: Tensor, y_RBH: Tensor, rows_K: Tensor) -> Tensor:
        ctx.save_for_backward(rows_K)
        ctx.shape = y_RBH.shape
        return x_SBH.flatten(0, 1).index_copy(0, rows_K, y_RBH.flatten(0, 1)).view_as(x_SBH)

    @staticmethod
    def backward(ctx: Any, grad_SBH: Tensor) -> tuple[Tensor, Tensor, None]:
        (rows_K,) = ctx.saved_tensors
        flat = grad_SBH.flatten(0, 1)
        of_kept = flat.index_select(0, rows_K).view(ctx.shape)
        of_rest = flat.index_fill(0, rows_K, 0.0).view_as(grad_SBH)
        return of_rest, of_kept, None
