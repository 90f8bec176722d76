"""A BERT without heads: token ids in, a vector of every token out, and the pooler's vector of the first.

The names of its parameters are those of pretraining (`models/bert.py`), so any checkpoint of a BERT fills it, whichever
heads it was trained with.

Shapes: S sequence, B micro-batch, H hidden.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from megatron3d.config.sections.model import ModelConfig
from megatron3d.config.sections.train import TrainConfig
from megatron3d.models.bert import BertEmbedding
from megatron3d.models.stage import MicroBatch, Stage, StagePart, assemble_stage
from megatron3d.nn.norm import residual_norm
from megatron3d.params.spec import Init
from megatron3d.tensor.context import LayerContext
from megatron3d.tensor.linear import ReplicatedLinear
from megatron3d.tensor.residual import whole_sequence


class EncoderHead(nn.Module):
    """What follows the last block: the last norm, where norms precede, and if wanted the pooler."""

    output = None  # no projection to the vocabulary

    def __init__(self, config: ModelConfig, context: LayerContext, *, with_pooler: bool) -> None:
        super().__init__()
        self.context = context
        self.norm = residual_norm(config, context) if config.norm_position == "pre" else None
        size, init = config.hidden_size, Init("normal", config.init_method_std)
        self.pooler = ReplicatedLinear(context, size, size, init=init, tp_gradient="equal") if with_pooler else None

    def forward(self, x_SBH: Tensor, micro: MicroBatch, table: None) -> Tensor:
        """[S, B, H] on the residual stream to the encoder's output [S, B, H] of all positions."""
        return whole_sequence(x_SBH if self.norm is None else self.norm(x_SBH), self.context)

    def pooled(self, x_SBH: Tensor) -> Tensor:
        """tanh(W x + b) of the first token of the encoder's output, [B, H]."""
        assert self.pooler is not None, "the encoder was built without a pooler"
        return torch.tanh(self.pooler(x_SBH[0]))


def build_bert_encoder_stage(
    config: ModelConfig, train: TrainConfig, part: StagePart, context: LayerContext, *, with_pooler: bool
) -> Stage:
    """Build one stage of an encoder on the meta device.

    Args:
        config: the resolved model.
        train: says which activations are recomputed.
        part: the stage's share of the model.
        context: axis, sink and kernels of its layers.
        with_pooler: whether the last stage also has the pooler.
    """
    # Nothing projects to the vocabulary, so no other stage needs the table of the first.
    config = replace(config, untie_embeddings_and_output_weights=True)
    embedding = BertEmbedding(config, context) if part.is_first else None
    head = EncoderHead(config, context, with_pooler=with_pooler) if part.is_last else None
    return assemble_stage(config, train, part, context, embedding=embedding, head=head, losses=())
