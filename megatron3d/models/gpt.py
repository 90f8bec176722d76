"""GPT: a causal language model, cut into stages.

Source: Radford et al. 2019 (GPT-2), Brown et al. 2020 (GPT-3), Touvron et al. 2023 (Llama). One class covers them,
since they differ only in what `ModelConfig` says.
"""

from __future__ import annotations

from torch import Tensor, nn

from megatron3d.config.sections.model import ModelConfig
from megatron3d.config.sections.train import TrainConfig
from megatron3d.models.losses import chunked_loss_and_hits, masked_loss_sum, num_chunks
from megatron3d.models.stage import BlockBuilder, MicroBatch, Stage, StagePart, assemble_stage, model_block
from megatron3d.models.vocabulary import TiedTable, vocabulary_table
from megatron3d.moe.balance import balance_specs
from megatron3d.nn.dropout import drop_hidden
from megatron3d.nn.inputs import LayerInputs
from megatron3d.nn.loss_sink import LossSpec
from megatron3d.nn.norm import residual_norm
from megatron3d.nn.positions import LearnedPositions
from megatron3d.tensor.chunked_loss import ChunkedProjection
from megatron3d.tensor.context import LayerContext
from megatron3d.tensor.embedding import VocabParallelEmbedding
from megatron3d.tensor.linear import InputType

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
            positions_SB=self.context.positions(x_SBH, inputs.positions_BL),
            kernels=self.context.kernels,
        )


class GPTHead(nn.Module):
    """Final norm, projection to the vocabulary, and loss. Untied models have a projection table of their own."""

    def __init__(self, config: ModelConfig, context: LayerContext, *, loss_chunk_size: int | None = None) -> None:
        """`loss_chunk_size` is the most positions whose logits are there at once when losses are asked for."""
        super().__init__()
        self.context, self.loss_chunk_size = context, loss_chunk_size
        self.norm = residual_norm(config, context)
        untied = config.untie_embeddings_and_output_weights
        self.output = vocabulary_table(config, context) if untied else None

    def forward(self, x_SBH: Tensor, micro: MicroBatch, table: VocabParallelEmbedding) -> Tensor:
        """[S, B, H] to the end of the losses (`LossSink.end`), or to logits [S, B, Vp/tp] where there are no labels."""
        context, x_SBH = self.context, self.norm(x_SBH)
        input_type: InputType = "V" if context.sequence_parallel else "I"
        if micro.labels_BS is None:
            return table.scores(x_SBH, input_type=input_type, cuts_off=True)
        assert micro.losses is not None, "labels are given where losses are asked for"
        labels_SB = micro.labels_BS.t().contiguous()
        mask_SB = None if micro.loss_mask_BS is None else micro.loss_mask_BS.t()
        if self.loss_chunk_size is None:
            logits_SBV = table.scores(x_SBH, input_type=input_type, cuts_off=False)
            loss = masked_loss_sum(logits_SBV, labels_SB, mask_SB, table=table, context=context)
        else:
            chunks = num_chunks(labels_SB.numel(), self.loss_chunk_size)
            projection = ChunkedProjection(table, None, context, input_type, chunks)
            loss, _ = chunked_loss_and_hits(x_SBH, labels_SB, mask_SB, projection)
        return micro.losses.end({"lm": loss})


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
        train: says which activations are recomputed, and in which chunks losses are computed.
        part: the stage's share of the model.
        context: axis, sink and kernels of its layers.
        block: makes its blocks.
    """
    embedding: nn.Module | None = None
    if part.is_first:
        embedding = GPTEmbedding(config, context)
    elif part.is_last and not config.untie_embeddings_and_output_weights:
        embedding = TiedTable(config, context)
    head = GPTHead(config, context, loss_chunk_size=train.loss_chunk_size) if part.is_last else None
    losses = (*LOSSES, *balance_specs(config))
    return assemble_stage(config, train, part, context, embedding=embedding, head=head, losses=losses, block=block)
