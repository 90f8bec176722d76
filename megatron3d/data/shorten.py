"""Shorter samples of a step: the first tokens of each, or rows that each is split into (`config/lengths.py`).

A batch is shortened on the host, after it was read and before it is cut into micro-batches, so that what a sample is,
which samples a batch has and what a checkpoint says of them do not depend on the length of a step.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megatron3d.config.lengths import SampleShape, sample_shape
from megatron3d.config.sections.train import DraftTrain
from megatron3d.data.batch import GPTBatch, GroupedSamples, Samples


def with_shape_of_step(batch: Samples | GroupedSamples, train: DraftTrain, step: int) -> Samples | GroupedSamples:
    """The batch as the step made after `step` steps trains on it.

    Raises: ValueError if there is a sequence-length curriculum and the samples are no running text.
    """
    if not train.length_levels:
        return batch
    if not isinstance(batch, GPTBatch):
        raise ValueError(f"a {type(batch).__name__} is no running text, which a sequence-length curriculum cuts")
    return shortened(batch, sample_shape(train, step, batch.tokens_BS.shape[1]))


def shortened(batch: GPTBatch, shape: SampleShape) -> GPTBatch:
    """Of each sample the first rows x length tokens, as so many rows of their own.

    Positions count from the beginning of the row, or of a document that begins in it, as they do in a sample. Document
    numbers are only compared, so they stay.
    """
    if shape.tokens == batch.tokens_BS.shape[1] and shape.rows == 1:
        return batch
    rows = {name: _rows(value, shape) for name, value in vars(batch).items() if isinstance(value, Tensor)}
    short = replace(batch, **rows, rows_per_sample=batch.rows_per_sample * shape.rows)
    if short.position_ids_BS is None:
        return short
    return replace(short, position_ids_BS=_from_row_start(short.position_ids_BS))


def _rows(values_BS: Tensor, shape: SampleShape) -> Tensor:
    """[B, S] to [B x rows, length]."""
    return values_BS[:, : shape.tokens].reshape(-1, shape.length).contiguous()


def _from_row_start(positions_BS: Tensor) -> Tensor:
    """Positions in documents, counted from the beginning of the row for the document that it begins in."""
    first_B1 = positions_BS[:, :1]
    is_first_document_BS = positions_BS == first_B1 + torch.arange(positions_BS.shape[1])
    return positions_BS - torch.where(is_first_document_BS, first_B1, 0)
