"""OwnedSlice: what one rank updates of one parameter, for optimizers that must know where it begins and ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from megatron3d.params.boxes import Box
from megatron3d.params.spec import ParamSpec


@dataclass(frozen=True)
class OwnedSlice:
    """A contiguous range of one parameter's local shard, and where it lies in the flat tensor an optimizer updates.

    Every rank that shares a unit lists the same parameters in the same order, also those of which it holds nothing.

    Attributes:
        spec: the whole parameter.
        tp: ranks that shard the parameter.
        tp_rank: this rank's position among them.
        start: first element held of the flattened local shard (padding rows included).
        stop: one past the last; equal to `start` where nothing is held.
        flat: the one-dimensional parameter that holds it, None where nothing is held.
        offset: where in `flat` it begins.
    """

    spec: ParamSpec
    tp: int
    tp_rank: int
    start: int
    stop: int
    flat: nn.Parameter | None
    offset: int

    @property
    def length(self) -> int:
        """Number of elements held."""
        return self.stop - self.start

    @property
    def within(self) -> slice:
        """Where the elements lie in `flat`."""
        return slice(self.offset, self.offset + self.length)

    @property
    def counts(self) -> bool:
        """Whether the elements count in a sum over the ranks: of a replicated parameter only one copy does."""
        return not self.spec.is_replicated or self.tp_rank == 0

    def boxes(self) -> tuple[tuple[Box, ...], int]:
        """The boxes of the whole parameter that are held, and how many leading elements they cover."""
        return self.spec.boxes(self.tp, self.tp_rank, self.start, self.stop)


class FullAccess(Protocol):
    """What optimizers that need whole parameters ask of the ranks that share them, and all that they know of ranks.

    Every method but `owned_slices` communicates, so all ranks that share the parameters call it together, also those
    that hold nothing. An optimizer asks for `owned_slices` afresh at each step: a run may step unit by unit.
    """

    def owned_slices(self) -> Sequence[OwnedSlice]:
        """The parameters of this step, in an order that the ranks share."""
        ...

    def sum_over_ranks(self, shares: Sequence[Tensor]) -> list[Tensor]:
        """For each of `owned_slices()` the sum of a tensor over all ranks that hold different elements of it.

        Args:
            shares: this rank's summands, of one dtype and device.
        """
        ...

    def map_full(
        self,
        owned_slices: Sequence[OwnedSlice],
        values: Sequence[Tensor],
        function: Callable[[ParamSpec, Tensor], Tensor],
    ) -> None:
        """Replace tensors that have the shapes of whole parameters by a function of them, computed on one rank each.

        Args:
            owned_slices: some of `owned_slices()`, the same on all ranks; matrices without padding.
            values: for each, the elements held, one-dimensional and empty where none are; overwritten.
            function: from spec and whole tensor to a tensor of the same shape.
        """
        ...
