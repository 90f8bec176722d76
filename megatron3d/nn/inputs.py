"""What the layers of a stage may know of a micro-batch besides the hidden tensor that flows through them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron3d.nn.context.shards import ContextShards
from megatron3d.nn.documents import Rectangles
from megatron3d.nn.dropout import DropoutStream
from megatron3d.nn.loss_sink import LossSink


class KeyValueCache(Protocol):
    """Keys and values of the tokens seen so far, one pair a layer, for generation."""

    def extend(self, layer: int, k_BGTD: Tensor, v_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens and return those of all tokens so far."""
        ...


class KeptPositions(Protocol):
    """Which positions each layer sees, where some drop tokens (`token_dropping.py`)."""

    def kept(self, layer: int, num_samples: int, length: int, device: torch.device) -> Tensor | None:
        """Those that a layer sees of each sample, int64 [B, R], each row ascending; None where it sees all."""
        ...


@dataclass(frozen=True)
class LayerInputs:
    """The same for every layer of one forward, and for its recomputation.

    Attributes:
        rotary: cosine and sine of the positions, [S, R/2] or [B, S, R/2] fp32, where positions are rotary.
        attention_mask_BST: True where query position S may attend to key position T; None is plain causal attention,
            which with tokens in the cache is right for a single new one alone.
        rectangles: what attends to what where samples are packed documents (`documents.py`), instead of a mask.
        cache: keys and values of earlier tokens.
        dropout: the random numbers of this forward's dropout; None drops nothing.
        losses: takes what layers add to the model's losses; None where nobody asks for losses, as in generation.
        dropping: which positions each layer sees; None lets all see all.
        shards: how the samples are cut over context-parallel ranks; None where they are not.
        kept_share: of the positions of the sequence those that this layer sees, above 0 to 1.
    """

    rotary: tuple[Tensor, Tensor] | None = None
    attention_mask_BST: Tensor | None = None
    cache: KeyValueCache | None = None
    dropout: DropoutStream | None = None
    losses: LossSink | None = None
    dropping: KeptPositions | None = None
    kept_share: float = 1.0
    rectangles: Rectangles | None = None
    shards: ContextShards | None = None

    @property
    def positions_BL(self) -> Tensor | None:
        """Where the tokens of this rank stand in their samples, [1 or B, L]; None where they stand one after another
        from the first on."""
        return None if self.shards is None else self.shards.positions_BL
