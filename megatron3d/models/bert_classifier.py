"""A BERT that scores whole texts or pairs of texts: the encoder, the pooler, dropout and one linear layer.

The encoder and the pooler have the names they have in pretraining (`models/bert.py`), so a pretraining checkpoint fills
them; `head.classifier` is new. The masked-token head and the copy of the word table that it needs are left out.

Source: Devlin et al. 2018 (arXiv:1810.04805), sections 4.1 and 3 (the first token stands for the whole input). Names
and shapes map one to one onto Hugging Face's `BertForSequenceClassification`.

Shapes: S sequence, B micro-batch, H hidden, C outputs: classes, or 1 value in a regression.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron3d.config.sections.model import ModelConfig
from megatron3d.config.sections.train import TrainConfig
from megatron3d.models.bert import BertEmbedding
from megatron3d.models.stage import MicroBatch, Stage, StagePart, assemble_stage
from megatron3d.nn.dropout import drop_samples
from megatron3d.nn.loss_sink import LossSpec
from megatron3d.nn.norm import residual_norm
from megatron3d.params.spec import Init
from megatron3d.tensor.context import LayerContext
from megatron3d.tensor.linear import ReplicatedLinear
from megatron3d.tensor.residual import first_position

LOSSES = (LossSpec("label", "cross-entropy, or squared error, of the samples", "samples"),)


class ClassifierHead(nn.Module):
    """Everything after the last block: tanh(W x + b) of the first token, dropout, and the scores."""

    output = None  # no projection to the vocabulary

    def __init__(self, config: ModelConfig, context: LayerContext, *, num_outputs: int) -> None:
        super().__init__()
        self.config, self.context = config, context
        hidden, normal = config.hidden_size, Init("normal", config.init_method_std)
        self.norm = residual_norm(config, context) if config.norm_position == "pre" else None
        self.pooler = ReplicatedLinear(context, hidden, hidden, init=normal, tp_gradient="equal")
        self.classifier = ReplicatedLinear(context, hidden, num_outputs, init=normal, tp_gradient="equal")

    def forward(self, x_SBH: Tensor, micro: MicroBatch, table: None) -> Tensor:
        """[S or 1, B, H] to the end of the losses, or to the scores [B, C] where there are no labels."""
        if self.norm is not None:
            x_SBH = self.norm(x_SBH)
        pooled_BH = torch.tanh(self.pooler(first_position(x_SBH, self.context)))
        rate, kernels = self.config.hidden_dropout, self.context.kernels
        pooled_BH = drop_samples(pooled_BH, rate, micro.dropout, site="head.classifier", kernels=kernels)
        scores_BC = self.classifier(pooled_BH)
        if micro.sentence_labels_B is None:
            return scores_BC
        losses_B = sample_losses(scores_BC, micro.sentence_labels_B)
        if micro.sample_weights_B is not None:
            losses_B = losses_B * micro.sample_weights_B
        assert micro.losses is not None, "labels are given where losses are asked for"
        return micro.losses.end({"label": losses_B.sum()})


def sample_losses(scores_BC: Tensor, labels_B: Tensor) -> Tensor:
    """The loss of each sample, fp32 [B]: cross-entropy for whole-number labels, the squared error for fp32 ones."""
    if labels_B.is_floating_point():
        return (scores_BC.float().squeeze(1) - labels_B).square()
    return F.cross_entropy(scores_BC.float(), labels_B, reduction="none")


def build_bert_classifier_stage(
    config: ModelConfig, train: TrainConfig, part: StagePart, context: LayerContext, *, num_outputs: int
) -> Stage:
    """Build one stage of a classifier on the meta device; bind `num_outputs` to get a builder for `build_parts`.

    Args:
        config: the resolved model.
        train: says which activations are recomputed.
        part: the stage's share of the model.
        context: axis, sink and kernels of its layers.
        num_outputs: classes, or 1 for a regression.
    """
    # Nothing projects to the vocabulary, so no other stage needs the table of the first.
    config = replace(config, untie_embeddings_and_output_weights=True)
    embedding = BertEmbedding(config, context) if part.is_first else None
    head = ClassifierHead(config, context, num_outputs=num_outputs) if part.is_last else None
    return assemble_stage(
        config, train, part, context, embedding=embedding, head=head, losses=LOSSES, reads_first_only=True
    )
