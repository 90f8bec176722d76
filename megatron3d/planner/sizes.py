"""Sizes: what a rank's share of the model looks like, in elements and bytes, as far as memory depends on it."""

from __future__ import annotations

from dataclasses import dataclass

from megatron3d.config.run import RunConfig
from megatron3d.tensor.embedding import padded_vocab_size

FP32 = 4
INT64 = 8
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Sizes:
    """One rank's share: heads, groups, FFN and vocabulary divided by tp, and the options that change what is kept.

    Attributes:
        sequence: tokens of a sample, whole.
        local_sequence: tokens of the residual stream on this rank: sequence / tp under sequence parallelism.
        batch: samples of a micro-batch.
        hidden: width of the residual stream.
        heads: query heads of this rank.
        groups: key and value heads of this rank.
        kv_copies: tensor-parallel ranks that use the same ones.
        head: size of a head.
        ffn: inner width of the MLP on this rank.
        vocab: rows of the vocabulary table on this rank, padding included.
        tp: tensor-parallel ranks.
        element: bytes of a weight or an activation.
        gradient: bytes of an element of the buffers that gradients are added up in.
        on_cpu: whether the reference kernels run, on the CPU with gloo, or Triton and fused attention, on CUDA.
    """

    sequence: int
    local_sequence: int
    batch: int
    hidden: int
    heads: int
    groups: int
    kv_copies: int
    head: int
    ffn: int
    vocab: int
    tp: int
    element: int
    gradient: int
    on_cpu: bool

    @property
    def sharded(self) -> bool:
        """Whether the residual stream is cut along the sequence."""
        return self.local_sequence != self.sequence

    @property
    def residual_rows(self) -> int:
        """Tokens of a micro-batch on the residual stream."""
        return self.local_sequence * self.batch

    @property
    def rows(self) -> int:
        """Tokens of a micro-batch inside attention and MLP."""
        return self.sequence * self.batch

    @property
    def residual(self) -> int:
        """Bytes of the hidden tensor: of an activation between layers and of a message between stages."""
        return self.residual_rows * self.hidden * self.element


def sizes_of(config: RunConfig, *, device_type: str) -> Sizes:
    """The share of every rank of a resolved run on "cpu" or "cuda"; tensor-parallel ranks have equal ones."""
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    sharded = config.parallel.sequence_parallel and tp > 1
    padded = padded_vocab_size(model.vocab_size, divisible_by=model.make_vocab_size_divisible_by, tp=tp)
    return Sizes(
        sequence=model.seq_length,
        local_sequence=model.seq_length // tp if sharded else model.seq_length,
        batch=config.train.micro_batch_size,
        hidden=model.hidden_size,
        heads=model.num_attention_heads // tp,
        groups=max(1, model.num_query_groups // tp),
        kv_copies=max(1, tp // model.num_query_groups),
        head=model.kv_channels,
        ffn=model.ffn_hidden_size // tp,
        vocab=padded // tp,
        tp=tp,
        element=BYTES[config.optim.precision],
        gradient=2 if config.parallel.grad_reduce_in_bf16 else FP32,
        on_cpu=device_type == "cpu",
    )
