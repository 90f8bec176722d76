"""The table of a model's vocabulary, and the copy of it that a last stage projects with where the two are tied."""

from __future__ import annotations

from torch import nn

from megatron3d.config.sections.model import ModelConfig
from megatron3d.params.spec import Init
from megatron3d.tensor.context import LayerContext
from megatron3d.tensor.embedding import VocabParallelEmbedding, padded_vocab_size


class TiedTable(nn.Module):
    """The last stage's copy of the word embedding, under the owner's name; it embeds nothing."""

    def __init__(self, config: ModelConfig, context: LayerContext) -> None:
        super().__init__()
        self.word = vocabulary_table(config, context, tied_copy=True)


def vocabulary_table(config: ModelConfig, context: LayerContext, *, tied_copy: bool = False) -> VocabParallelEmbedding:
    """A table [V, H] cut over the tensor axis, padded as the config says."""
    multiple = config.make_vocab_size_divisible_by
    padded = padded_vocab_size(config.vocab_size, divisible_by=multiple, tp=context.tp.size)
    init = Init("normal", config.init_method_std)
    return VocabParallelEmbedding(
        context, config.vocab_size, config.hidden_size, padded_size=padded, init=init, tied_copy=tied_copy
    )
