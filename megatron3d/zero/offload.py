"""What of a rank's state lives off the device, and how one unit's part of it lies in its record."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron3d.offload.backing import StateBacking
from megatron3d.offload.record import Record, record_of

MASTER = "master"  # the field of master weights; the others have the names of the optimizer's states
WEIGHTS = "weights"  # the one field of a record of sharded weights

StateKinds = tuple[tuple[str, torch.dtype], ...]


@dataclass(frozen=True)
class Offload:
    """Where state lives that is not on the device.

    Attributes:
        states: backing of master weights and optimizer state; None keeps them on the device.
        weights: backing of the weights that stage 3 shards; None keeps them on the device.
        state_kinds: name and dtype of what the optimizer keeps for every element.
        delays_update: whether a step runs beside the next forward and backward.
    """

    states: StateBacking | None = None
    weights: StateBacking | None = None
    state_kinds: StateKinds = ()
    delays_update: bool = False


def state_kinds(optimizer: torch.optim.Optimizer) -> StateKinds:
    """Name and dtype of what an optimizer keeps for every element, as its first parameter's state shows."""
    state = next(iter(optimizer.state.values()), {})
    return tuple((name, value.dtype) for name, value in state.items() if value.dim() > 0)


def states_record(length: int, kinds: StateKinds) -> Record:
    """The record of master weights and optimizer state where a rank owns `length` elements of a unit."""
    return record_of([(MASTER, torch.float32, length), *((name, dtype, length) for name, dtype in kinds)])


def weights_record(length: int, dtype: torch.dtype) -> Record:
    """The record of the weights where a rank owns `length` elements of a unit."""
    return record_of([(WEIGHTS, dtype, length)])
