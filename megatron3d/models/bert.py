"""BERT: a bidirectional encoder that predicts masked tokens and, with the binary head, whether two sentences go
together; cut into stages as a GPT is.

    embedding   word + position + token type (+ norm, where norms follow the residual sums)
    blocks      attention to every position but padding
    head        (+ norm, where norms precede) transform, gelu, norm, the word table and a bias: masked tokens
                first token, pooler, tanh, two classes: sentence pairs

With norms after (`--norm-position post`) it is Devlin's BERT, with norms before Megatron-LM's. Names and shapes of the
parameters map one to one onto both.

Source: Devlin et al. 2018 (arXiv:1810.04805), section 3; Shoeybi et al. 2019 (arXiv:1909.08053), section 3 and figure 7
for norms before each half.

Shapes: S sequence, B micro-batch, H hidden, V vocabulary, P positions whose label counts, C = 2 classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron3d.config.sections.model import ModelConfig
from megatron3d.config.sections.train import TrainConfig
from megatron3d.models.losses import (
    chunked_loss_and_hits,
    class_hits,
    class_loss_sum,
    masked_hits,
    masked_loss_sum,
    num_chunks,
)
from megatron3d.models.stage import MicroBatch, Stage, StagePart, assemble_stage
from megatron3d.models.vocabulary import TiedTable, vocabulary_table
from megatron3d.nn.dropout import drop_hidden
from megatron3d.nn.inputs import LayerInputs
from megatron3d.nn.loss_sink import LossSink, LossSpec
from megatron3d.nn.norm import residual_norm
from megatron3d.nn.positions import LearnedPositions, TokenTypes
from megatron3d.params.module import ParallelModule
from megatron3d.params.spec import Init
from megatron3d.tensor.chunked_loss import ChunkedProjection
from megatron3d.tensor.context import LayerContext
from megatron3d.tensor.embedding import VocabParallelEmbedding, padded_vocab_size
from megatron3d.tensor.linear import InputType, ReplicatedLinear
from megatron3d.tensor.residual import first_position, whole_sequence

_NUM_CLASSES = 2
_TOKENS = LossSpec("lm", "cross-entropy of the masked tokens", "labels", accuracy="masked_accuracy")
_PAIRS = LossSpec("sentence", "cross-entropy of the pairs of sentences", "pairs", accuracy="sentence_accuracy")


class BertEmbedding(nn.Module):
    """Word embedding plus positions and token types where the model has them, a norm where norms follow; dropout."""

    def __init__(self, config: ModelConfig, context: LayerContext) -> None:
        super().__init__()
        self.config, self.context = config, context
        self.word = vocabulary_table(config, context)
        learned = config.position_embedding_type == "learned_absolute"
        self.position = LearnedPositions(config, context) if learned else None
        self.token_type = TokenTypes(config, context) if config.num_token_types else None
        self.norm = residual_norm(config, context) if config.norm_position == "post" else None

    def forward(self, micro: MicroBatch, inputs: LayerInputs) -> Tensor:
        """Token ids [B, S] to the residual stream [S, B, H] (S local under sequence parallelism).

        Where no token types are given, every token has type 0.
        """
        x_SBH = self.word(micro.tokens_BS.t())
        if self.position is not None:
            x_SBH = x_SBH + self.position(micro.tokens_BS.shape[1], micro.position_ids_BS)
        if self.token_type is not None:
            types = micro.token_types_BS
            x_SBH = x_SBH + self.token_type(torch.zeros_like(micro.tokens_BS) if types is None else types)
        if self.norm is not None:
            x_SBH = self.norm(x_SBH)
        return drop_hidden(
            x_SBH,
            self.config.hidden_dropout,
            inputs.dropout,
            site="embedding",
            positions_SB=self.context.positions(x_SBH, inputs.positions_BL),
            kernels=self.context.kernels,
        )


class BertHead(ParallelModule):
    """Everything after the last block: the masked tokens and, with the binary head, the sentence pairs."""

    output_bias: nn.Parameter

    def __init__(self, config: ModelConfig, context: LayerContext, *, loss_chunk_size: int | None = None) -> None:
        """`loss_chunk_size` is the most masked positions whose logits are there at once when losses are asked for."""
        super().__init__(tp=context.tp.size)
        self.config, self.context, self.loss_chunk_size = config, context, loss_chunk_size
        hidden, normal, gradient = config.hidden_size, Init("normal", config.init_method_std), context.residual_gradient
        self.norm = residual_norm(config, context) if config.norm_position == "pre" else None
        self.transform = ReplicatedLinear(context, hidden, hidden, init=normal, tp_gradient=gradient)
        self.transform_norm = residual_norm(config, context)
        self.output = vocabulary_table(config, context) if config.untie_embeddings_and_output_weights else None
        self.declare(
            "output_bias",
            (config.vocab_size,),
            init=Init("zeros"),
            decays=False,
            tp_dim=0,
            padded_size=padded_vocab_size(
                config.vocab_size, divisible_by=config.make_vocab_size_divisible_by, tp=context.tp.size
            ),
        )
        self.pooler = self.binary = None
        if config.has_binary_head:
            self.pooler = ReplicatedLinear(context, hidden, hidden, init=normal, tp_gradient="equal")
            self.binary = ReplicatedLinear(context, hidden, _NUM_CLASSES, init=normal, tp_gradient="equal", scores=True)

    def forward(self, x_SBH: Tensor, micro: MicroBatch, table: VocabParallelEmbedding) -> Tensor:
        """[S, B, H] to the end of the losses, or to logits [S, B, Vp/tp] of all tokens where there are no labels."""
        x_SBH = self.normed(x_SBH)
        if micro.labels_BS is None:
            return self.token_logits(whole_sequence(x_SBH, self.context), table)
        assert micro.loss_mask_BS is not None, "a mask says which tokens of a BERT are to be predicted"
        assert micro.losses is not None, "labels are given where losses are asked for"
        sums = {"lm": self._token_loss(x_SBH, micro, table, micro.losses)}
        if self.config.has_binary_head:
            assert micro.sentence_labels_B is not None, "the binary head needs a label for every pair of sentences"
            logits_BC = self.pair_logits(self.pooled(x_SBH))
            # Of context-parallel ranks the first has the first token. What the others score counts nothing.
            has_first = float(self.context.cp.rank == 0)
            sums["sentence"] = class_loss_sum(logits_BC, micro.sentence_labels_B) * has_first
            if micro.losses.counts_hits:
                hits = class_hits(logits_BC, micro.sentence_labels_B) * has_first
                micro.losses.add_hits("sentence", hits, over_tp="equal")
        return micro.losses.end(sums)

    def normed(self, x_SBH: Tensor) -> Tensor:
        """The output of the encoder: of the last block, behind a last norm where norms precede."""
        return x_SBH if self.norm is None else self.norm(x_SBH)

    def token_logits(self, x_PH: Tensor, table: VocabParallelEmbedding, *, cuts_off: bool = True) -> Tensor:
        """Encoder outputs [..., H] of any positions to this rank's logits [..., Vp/tp], as wide as
        `VocabParallelEmbedding.scores` makes them.

        Under sequence parallelism the positions are those of `whole_sequence`, of type R: each rank brings a partial
        gradient to the transform.
        """
        return table.scores(self._transformed(x_PH), self.output_bias, input_type=self._input_type, cuts_off=cuts_off)

    @property
    def _input_type(self) -> InputType:
        """Of what the word table projects."""
        return "local" if self.context.sequence_parallel else "I"

    def _transformed(self, x_PH: Tensor) -> Tensor:
        kind = self.config.activation
        x_PH = self.context.kernels.activation(self.transform(x_PH), "gelu" if self.config.is_gated else kind)
        return self.transform_norm(x_PH)

    def pooled(self, x_SBH: Tensor) -> Tensor:
        """tanh(W x + b) of the first token, [B, H], the same on all tensor-parallel ranks."""
        assert self.pooler is not None, "a model without a binary head has no pooler"
        return torch.tanh(self.pooler(first_position(x_SBH, self.context)))

    def pair_logits(self, pooled_BH: Tensor) -> Tensor:
        """Scores [B, C]: class 0 says that the second sentence follows the first."""
        assert self.binary is not None, "a model without a binary head scores no pairs"
        return self.binary(pooled_BH)

    def _token_loss(self, x_SBH: Tensor, micro: MicroBatch, table: VocabParallelEmbedding, losses: LossSink) -> Tensor:
        """Summed loss of the masked tokens; the others, some 85 %, never reach the vocabulary."""
        index_P = micro.label_index_P
        assert micro.loss_mask_BS is not None and micro.labels_BS is not None, "there is nothing to predict"
        assert index_P is not None, "a batch says which of its tokens have a label"
        x_PH = whole_sequence(x_SBH, self.context).flatten(0, 1).index_select(0, index_P)
        labels_P, mask_P = (x_BS.t().flatten()[index_P] for x_BS in (micro.labels_BS, micro.loss_mask_BS))
        if self.loss_chunk_size is not None:
            chunks = num_chunks(micro.labels_BS.numel(), self.loss_chunk_size)  # alike on ranks with other masks
            projection = ChunkedProjection(table, self.output_bias, self.context, self._input_type, chunks)
            loss, hits = chunked_loss_and_hits(self._transformed(x_PH), labels_P, mask_P, projection)
            if losses.counts_hits:
                losses.add_hits("lm", hits, over_tp="equal")
            return loss
        logits_PV = self.token_logits(x_PH, table, cuts_off=False)
        vocabulary = {"table": table, "context": self.context}
        if losses.counts_hits:
            hits = masked_hits(logits_PV, labels_P, mask_P, **vocabulary)
            losses.add_hits("lm", hits, over_tp="equal")
        return masked_loss_sum(logits_PV, labels_P, mask_P, **vocabulary)


def bert_losses(config: ModelConfig) -> tuple[LossSpec, ...]:
    """The losses of a BERT: of masked tokens and, with the binary head, of pairs of sentences."""
    return (_TOKENS, _PAIRS) if config.has_binary_head else (_TOKENS,)


def build_bert_stage(config: ModelConfig, train: TrainConfig, part: StagePart, context: LayerContext) -> Stage:
    """Build one stage of a BERT on the meta device.

    Args:
        config: the resolved model.
        train: says which activations are recomputed, and in which chunks losses are computed.
        part: the stage's share of the model.
        context: axis, sink and kernels of its layers.
    """
    embedding: nn.Module | None = None
    if part.is_first:
        embedding = BertEmbedding(config, context)
    elif part.is_last and not config.untie_embeddings_and_output_weights:
        embedding = TiedTable(config, context)
    head = BertHead(config, context, loss_chunk_size=train.loss_chunk_size) if part.is_last else None
    losses = bert_losses(config)
    return assemble_stage(config, train, part, context, embedding=embedding, head=head, losses=losses)
