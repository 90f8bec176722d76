"""InputStore: where the inputs of recomputed layers are between their forward and their backward, if not on the device.

What a stage knows of it; `offload/activations.py` has the stores.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class StoredInput(Protocol):
    """One input that is on its way, or there."""

    def start_fetch(self) -> None:
        """Start bringing it back; once it is on its way, nothing more."""
        ...

    def take(self) -> Tensor:
        """The input on the device, when it has arrived; its room in the store is free then."""
        ...


class InputStore(Protocol):
    """Takes the inputs of one rank's layers, of any number of micro-batches."""

    def put(self, x: Tensor) -> StoredInput:
        """Start copying an input that nobody changes; at most one is on its way while the next forward runs."""
        ...

    def settle(self) -> None:
        """Return when the device holds nothing any more for what is on its way."""
        ...
