"""Stage: the consecutive layers of a model that one pipeline rank runs as one piece.

A stage takes one hidden tensor [S, B, H] (or, on the first, the tokens of its own micro-batch) and returns one hidden
tensor (or, on the last, the summed loss). Tokens, masks and labels come from the rank's own reading of the batch, so
shapes are known beforehand and nothing but hidden tensors crosses the wire.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron3d.config.model import ModelConfig
from megatron3d.nn.inputs import KeyValueCache, LayerInputs
from megatron3d.nn.positions import rotary_table
from megatron3d.nn.recompute import LayerGroup, run_layers
from megatron3d.params.module import Declared, declared_parameters


@dataclass(frozen=True)
class MicroBatch:
    """What every stage knows of one micro-batch.

    Attributes:
        tokens_BS: token ids, int64, the whole sequence.
        labels_BS: the token to predict at each position, int64; None asks the last stage for logits.
        loss_mask_BS: weight of each position's loss, fp32.
        position_ids_BS: positions, int64; None is 0 .. S-1.
        attention_mask_BST: True where position S may attend to position T; None is causal attention.
        dropout_seed: seed of this forward's dropout masks; None drops nothing.
        cache: keys and values of earlier tokens, for generation.
    """

    tokens_BS: Tensor
    labels_BS: Tensor | None = None
    loss_mask_BS: Tensor | None = None
    position_ids_BS: Tensor | None = None
    attention_mask_BST: Tensor | None = None
    dropout_seed: int | None = None
    cache: KeyValueCache | None = None


@dataclass(frozen=True)
class StagePart:
    """Which part of a model a stage is: the numbers of its layers, and whether the first or last stage."""

    layers: range
    is_first: bool
    is_last: bool


@dataclass(frozen=True)
class StageModules:
    """The modules of a stage; the embedding and the head are None where the stage has none."""

    embedding: nn.Module | None
    blocks: Mapping[int, nn.Module]
    head: nn.Module | None
    groups: tuple[LayerGroup, ...]


class Stage(nn.Module):
    """Embedding (first stage), blocks, and head (last stage), under names that are the same at every layout."""

    def __init__(self, config: ModelConfig, part: StagePart, modules: StageModules) -> None:
        super().__init__()
        self.config, self.part, self.groups = config, part, modules.groups
        self.embedding = modules.embedding
        self.layers = nn.ModuleDict({str(number): block for number, block in modules.blocks.items()})
        self.head = modules.head

    def forward(self, x_SBH: Tensor | None, micro: MicroBatch) -> Tensor:
        """Run the stage.

        Args:
            x_SBH: output of the stage before (S local under sequence parallelism); None on the first stage.
            micro: the micro-batch.

        Returns:
            Hidden [S, B, H]; on the last stage the sum of the masked losses (fp32 scalar), or, where `micro` has no
            labels, this rank's logits [S, B, Vp/tp].
        """
        inputs = self._layer_inputs(micro)
        if self.part.is_first:
            x_SBH = self.embedding(micro.tokens_BS, micro.position_ids_BS, inputs)
        assert x_SBH is not None, "only the first stage runs without a hidden tensor"
        x_SBH = run_layers(list(self.layers.values()), self.groups, x_SBH, inputs)
        if self.head is None:
            return x_SBH
        tied = not self.config.untie_embeddings_and_output_weights
        table = self.embedding.word if tied else self.head.output
        return self.head(x_SBH, micro.labels_BS, micro.loss_mask_BS, table)

    def parameters_by_name(self) -> dict[str, Declared]:
        """Declared parameters by full name; a tied table that this stage both embeds and projects with stands once."""
        return declared_parameters(self)

    def units(self) -> dict[str, list[str]]:
        """Parameter names by unit: the word embedding, the rest of the embedding, each block, the head.

        The word embedding is a unit of its own so that, where it is tied, its holders lay it out alike.
        """
        units: dict[str, list[str]] = {}
        for name in self.parameters_by_name():
            units.setdefault(unit_of(name), []).append(name)
        return units

    @property
    def tied_unit(self) -> str | None:
        """Name of the unit that holds a tied table, whose gradient is the sum over its holders; None if untied."""
        return None if self.config.untie_embeddings_and_output_weights else "embedding.word"

    def uses_of(self, name: str) -> int:
        """How many contributions to its gradient a parameter gets in one backward of this stage."""
        tied = not self.config.untie_embeddings_and_output_weights
        both_ends = self.part.is_first and self.part.is_last
        return 2 if tied and both_ends and name == "embedding.word.weight" else 1

    def _layer_inputs(self, micro: MicroBatch) -> LayerInputs:
        rotary = None
        if self.config.position_embedding_type == "rope":
            tokens = micro.tokens_BS
            with torch.no_grad():
                rotary = rotary_table(self.config, tokens.shape[1], micro.position_ids_BS, device=tokens.device)
        return LayerInputs(rotary, micro.attention_mask_BST, micro.cache, micro.dropout_seed)


def unit_of(name: str) -> str:
    """The unit a parameter belongs to, from its full name."""
    words = name.split(".")
    if words[0] == "layers":
        return f"layers.{words[1]}"
    return "embedding.word" if name.startswith("embedding.word.") else words[0]
