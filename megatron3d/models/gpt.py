"""GPT: a causal language model, cut into stages.

Source: Radford et al. 2019 (GPT-2), Brown et al. 2020 (GPT-3), Touvron et al. 2023 (Llama). One class covers them,
since they differ only in what `ModelConfig` says.
"""

from __future__ import annotations

from torch import Tensor, nn

from megatron3d.config.sections.model import ModelConfig
from megatron3d.config.sections.train import TrainConfig
from megatron3d.models.losses import masked_loss_sum
from megatron3d.models.stage import BlockBuilder, MicroBatch, Stage, StagePart, assemble_stage, model_block
from megatron3d.models.vocabulary import TiedTable, vocabulary_table
from megatron3d.moe.balance import balance_specs
from megatron3d.nn.dropout import drop_hidden
from megatron3d.nn.inputs import LayerInputs
from megatron3d.nn.loss_sink import LossSpec
from megatron3d.nn.norm import residual_norm
from megatron3d.nn.positions import LearnedPositions
from megatron3d.tensor.context import LayerContext
from megatron3d.tensor.embedding import VocabParallelEmbedding

LOSSES = (LossSpec("lm", "cross-entropy of the next token", "labels"),)


class GPTEmbedding(nn.Module):
    """Word embedding plus, where positions are learned, their table; then dropout."""

    def __init__(self, config: ModelConfig, context: LayerContext) -> None:
        super().__init__()
        self.config, self.context = config, context
        self.word = vocabulary_table(config, context)
        learned = config.position_embedding_type == "learned_absolute"
        self.position = LearnedPositions(config, context) if learned else None

    def forward(self, micro: MicroBatch, inputs: LayerInputs) -> Tensor:
        """Token ids [B, S] to the residual stream [S, B, H] (S local under sequence parallelism)."""
        x_SBH = self.word(micro.tokens_BS.t())
        if self.position is not None:
            x_SBH = x_SBH + self.position(micro.tokens_BS.shape[1], micro.position_ids_BS)
        return drop_hidden(
            x_SBH,
            self.config.hidden_dropout,
            inputs.dropout,
            site="embedding",
            positions_S=self.context.positions(x_SBH),
            kernels=self.context.kernels,
        )


class GPTHead(nn.Module):
    """Final norm, projection to the vocabulary, and loss. Untied models have a projection table of their own."""

    def __init__(self, config: ModelConfig, context: LayerContext) -> None:
        super().__init__()
        self.context = context
        self.norm = residual_norm(config, context)
        untied = config.untie_embeddings_and_output_weights
        self.output = vocabulary_table(config, context) if untied else None

    def forward(self, x_SBH: Tensor, micro: MicroBatch, table: VocabParallelEmbedding) -> Tensor:
        """[S, B, H] to the end of the losses (`LossSink.end`), or to logits [S, B, Vp/tp] where there are no labels."""
        context = self.context
        logits_SBV = table.scores(
            self.norm(x_SBH),
            input_type="V" if context.sequence_parallel else "I",
            cuts_off=micro.labels_BS is None,
        )
        if micro.labels_BS is None:
            return logits_SBV
        labels_SB = micro.labels_BS.t().contiguous()
        mask_SB = None if micro.loss_mask_BS is None else micro.loss_mask_BS.t()
        assert micro.losses is not None, "labels are given where losses are asked for"
        return micro.losses.end({"lm": masked_loss_sum(logits_SBV, labels_SB, mask_SB, table=table, context=context)})


def build_gpt_stage(
    config: ModelConfig,
    train: TrainConfig,
    part: StagePart,
    context: LayerContext,
    *,
    block: BlockBuilder = model_block,
) -> Stage:
    """Build one stage of a GPT on the meta device.

    Args:
        config: the resolved model.
        train: says which activations are recomputed.
        part: the stage's share of the model.
        context: axis, sink and kernels of its layers.
        block: makes its blocks.
    """
    embedding: nn.Module | None = None
    if part.is_first:
        embedding = GPTEmbedding(config, context)
    elif part.is_last and not config.untie_embeddings_and_output_weights:
        embedding = TiedTable(config, context)
    head = GPTHead(config, context) if part.is_last else None
    losses = (*LOSSES, *balance_specs(config))
    return assemble_stage(config, train, part, context, embedding=embedding, head=head, losses=losses, block=block)
