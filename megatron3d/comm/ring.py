"""A ring: every rank of an axis passes a tensor to the next one, and gets that of the previous one, while it works.

A hop that is started must be waited for: gloo matches messages of one tag by their order, so one that is dropped would
be taken for the next.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megatron3d.comm.collectives import Pending
from megatron3d.comm.mesh import Axis
from megatron3d.comm.p2p import Message, start_exchange


class Hop:
    """One tensor on its way to the next rank, and one on its way here."""

    def __init__(self, arriving: Tensor, messages: Sequence[Pending]) -> None:
        self._arriving, self._messages = arriving, messages

    def wait(self) -> Tensor:
        """Block (on CUDA: make the current stream wait) until what arrives is there, and what left may change.

        Raises: CollectiveError if a rank was lost or did not come in time.
        """
        for message in self._messages:
            message.wait()
        return self._arriving


def start_hop(leaving: Tensor, arriving: Tensor, axis: Axis, *, tag: int = 0) -> Hop:
    """Start passing the contiguous `leaving` to the next rank and filling `arriving` from the previous one.

    Args:
        leaving: must not change before the hop is over.
        arriving: contiguous, of the same size and dtype.
        axis: of at least two ranks, all of which start the same hops in the same order.
        tag: another one for every hop that is under way at the same time.
    """
    to_next = Message(leaving, sends=True, peer=(axis.rank + 1) % axis.size, tag=tag)
    from_previous = Message(arriving, sends=False, peer=(axis.rank - 1) % axis.size, tag=tag)
    return Hop(arriving, start_exchange([to_next, from_previous], axis))
