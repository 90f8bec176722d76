"""Where positions enter: a learned table added to the embedding, or rotations of queries and keys; and segments, whose
table is added likewise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron3d.config.rotary import rotary_attention_factor
from megatron3d.config.sections.model import ModelConfig
from megatron3d.nn.rotary import rotary_frequencies
from megatron3d.params.module import ParallelModule
from megatron3d.params.spec import Init
from megatron3d.tensor.context import LayerContext


class _AddedTable(ParallelModule):
    """A table [num_rows, H] whose rows are added to the word embedding; every tensor rank holds all of it."""

    weight: nn.Parameter

    def __init__(self, num_rows: int, config: ModelConfig, context: LayerContext) -> None:
        super().__init__(tp=context.tp.size)
        self.context = context
        self.declare(
            "weight",
            (num_rows, config.hidden_size),
            init=Init("normal", config.init_method_std),
            decays=True,
            tp_gradient=context.residual_gradient,
            is_table=True,
        )


class LearnedPositions(_AddedTable):
    """A table [max_position_embeddings, H], added to the word embedding."""

    def __init__(self, config: ModelConfig, context: LayerContext) -> None:
        super().__init__(config.max_position_embeddings, config, context)

    def forward(self, length: int, position_ids_BS: Tensor | None) -> Tensor:
        """Embeddings [S, B or 1, H] of this rank's positions (S local under sequence parallelism).

        Args:
            length: whole sequence length, positions 0 .. length-1 where no ids are given.
            position_ids_BS: positions of the whole sequence, int64, or [1, S] of all samples alike.
        """
        if position_ids_BS is None:
            return self.context.local_sequence(self.weight[:length].unsqueeze(1))
        return F.embedding(self.context.local_sequence(position_ids_BS.t()), self.weight)


class TokenTypes(_AddedTable):
    """A table [num_token_types, H] of segments (sentence A, sentence B), added to the word embedding.

    Source: Devlin et al. 2018 (BERT), section 3.
    """

    def __init__(self, config: ModelConfig, context: LayerContext) -> None:
        super().__init__(config.num_token_types, config, context)

    def forward(self, token_types_BS: Tensor) -> Tensor:
        """Segments of the whole sequence, int64, to embeddings [S, B, H] (S local under sequence parallelism)."""
        return F.embedding(self.context.local_sequence(token_types_BS.t()), self.weight)


def rotary_table(
    config: ModelConfig, length: int, position_ids_BS: Tensor | None, *, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position times frequency (`rotary.py`), fp32, [S, R/2], or [B, S, R/2] with position ids of
    several samples.

    R is the rotated part of a head; with yarn both are multiplied by its attention factor.

    Source: Su et al. 2021 (RoFormer), equation 15.
    """
    positions = torch.arange(length, device=device) if position_ids_BS is None else position_ids_BS
    positions = positions[0] if positions.dim() == 2 and positions.shape[0] == 1 else positions
    angles = positions.to(torch.float32).unsqueeze(-1) * rotary_frequencies(config, device=device)
    factor = rotary_attention_factor(config)
    return (angles.cos(), angles.sin()) if factor == 1.0 else (angles.cos() * factor, angles.sin() * factor)
