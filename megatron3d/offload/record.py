"""Record: how the state of one unit lies in one buffer of bytes. Pure arithmetic.

Master weights and every kind of optimizer state of a unit travel together, so that a unit is one read and one write.
Each field starts at a multiple of `FIELD_ALIGNMENT_BYTES`, so that vector instructions find them aligned.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

FIELD_ALIGNMENT_BYTES = 128  # as in the flat buffers: 32 elements of fp32


@dataclass(frozen=True)
class Field:
    """One tensor of a record: one-dimensional, `start_byte` from the beginning."""

    name: str
    dtype: torch.dtype
    numel: int
    start_byte: int

    @property
    def stop_byte(self) -> int:
        """Where it ends."""
        return self.start_byte + self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Record:
    """The fields in the order in which they lie."""

    fields: tuple[Field, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole record."""
        return self.fields[-1].stop_byte if self.fields else 0

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The fields as views of a buffer of bytes that starts with the record."""
        return {f.name: buffer[f.start_byte : f.stop_byte].view(f.dtype) for f in self.fields}


def record_of(tensors: Iterable[tuple[str, torch.dtype, int]]) -> Record:
    """The record of tensors given by name, dtype and number of elements."""
    fields: list[Field] = []
    position = 0
    for name, dtype, numel in tensors:
        start = -(-position // FIELD_ALIGNMENT_BYTES) * FIELD_ALIGNMENT_BYTES
        fields.append(Field(name, dtype, numel, start))
        position = fields[-1].stop_byte
    return Record(tuple(fields))
