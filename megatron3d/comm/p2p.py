"""Messages between two ranks of an axis: sends and receives that are posted together and return at once.

Gloo matches messages by tag. NCCL matches them by order alone, so both ends must post the messages of a pair in the
same order, which `pipeline.lower` gives; and it gives batches another communicator than single messages, so everything
goes through batches here, also a message that is alone. The first batch of an axis makes its communicator: every rank
of the axis must come to one before any of them waits for data, as the rows of `pipeline.lower` do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from megatron3d.comm.collectives import Pending
from megatron3d.comm.mesh import Axis
from megatron3d.comm.shape_only import ShapeOnlyGroup


@dataclass(frozen=True)
class Message:
    """One end of a message.

    Attributes:
        tensor: contiguous; what is sent, or the buffer to be filled.
        sends: whether this rank is the sender.
        peer: position of the other rank on the axis.
        tag: a number that no other message has at this time, the same on both ends.
    """

    tensor: Tensor
    sends: bool
    peer: int
    tag: int


def start_exchange(messages: Sequence[Message], axis: Axis) -> list[Pending]:
    """Post the messages together. A sent tensor may change, and a buffer is filled, only after its `wait`.

    On CUDA all of them are one operation, in which both directions of a link are used at once, and each `wait` waits
    for the whole of it.

    Returns:
        One `Pending` for each message, in their order.
    """
    for message in messages:
        size_bytes = message.tensor.numel() * message.tensor.element_size()
        axis.meter.add(axis.name, "send" if message.sends else "receive", size_bytes)
    if isinstance(axis.group, ShapeOnlyGroup):
        return [Pending(message.tensor) for message in messages]
    posts = [
        dist.P2POp(
            dist.isend if message.sends else dist.irecv,
            message.tensor,
            _peer(message, axis),
            group=axis.group,
            tag=message.tag,
        )
        for message in messages
    ]
    works = dist.batch_isend_irecv(posts)
    if len(works) == 1:  # one work for the whole batch
        works = works * len(messages)
    return [
        Pending(
            message.tensor, work, axis, f"{'send to' if message.sends else 'receive from'} rank {_peer(message, axis)}"
        )
        for message, work in zip(messages, works, strict=True)
    ]


def _peer(message: Message, axis: Axis) -> int:
    """The global rank at the other end."""
    return axis.ranks[message.peer]
