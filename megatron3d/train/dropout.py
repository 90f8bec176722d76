"""The dropout streams of a step's micro-batches: which samples of the global batch they hold, whoever reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron3d.comm.mesh import Axis
from megatron3d.config.sections.model import ModelConfig
from megatron3d.data.batch import GroupedSamples, Samples
from megatron3d.models.stage import MicroBatch
from megatron3d.nn.attention_core import draws_by_place
from megatron3d.nn.dropout import DropoutStream


def with_dropout(
    micros: Sequence[MicroBatch],
    model: ModelConfig,
    *,
    seed: int,
    first_samples: Sequence[int],
) -> list[MicroBatch]:
    """Give each micro-batch its dropout stream, if the model drops anything or a router draws noise.

    Args:
        micros: the micro-batches of a rank for one step.
        model: says how much is dropped.
        seed: of the step (`nn.dropout.step_seed`).
        first_samples: number of each micro-batch's first sample in the step's global batch.
    """
    if model.hidden_dropout == 0.0 and model.attention_dropout == 0.0 and not model.has_experts:
        return list(micros)
    return [
        replace(micro, dropout=DropoutStream(seed, first)) for micro, first in zip(micros, first_samples, strict=True)
    ]


def first_samples(batch: Samples | GroupedSamples, micro_batch_size: int, axis: Axis) -> list[int]:
    """Number, in the step's global batch, of the first sample of each micro-batch of this rank; of the first row where
    samples are several rows.

    The global batch is numbered group by group, and within a group by the order in which the ranks of `axis` hold it:
    equal numbers of samples one after another.
    """
    numbers: list[int] = []
    before = 0
    for group in batch.groups if isinstance(batch, GroupedSamples) else (batch,):
        rows = group.rows_per_sample
        first = before + axis.rank * group.num_samples * rows
        numbers += range(first, first + group.num_samples * rows, micro_batch_size * rows)
        before += axis.size * group.num_samples * rows
    return numbers


def dropout_note(model: ModelConfig, device_type: str) -> str | None:
    """What a run's start reports about its dropout; None where every mask is the same at every layout."""
    if model.attention_dropout == 0.0 or draws_by_place(device_type):
        return None
    return (
        f"--attention-dropout {model.attention_dropout:g}: the fused attention kernels on {device_type} draw masks of "
        "their own, so losses differ between layouts as between seeds; a repeated or resumed run of this layout drops "
        "the same"
    )
