"""Messages between two ranks of an axis: sends and receives that return at once.

Gloo matches messages by tag; NCCL matches them by order alone, so both ends must post the messages of a pair in the
same order. `pipeline.lower` gives that order.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from megatron3d.comm.collectives import Pending
from megatron3d.comm.mesh import Axis


def start_send(x: Tensor, axis: Axis, *, peer: int, tag: int) -> Pending:
    """Send a contiguous `x` to the rank at position `peer` of the axis; `x` may change only after `wait`."""
    axis.meter.add(axis.name, "send", x.numel() * x.element_size())
    return Pending(x, dist.isend(x, axis.ranks[peer], group=axis.group, tag=tag))


def start_receive(buffer: Tensor, axis: Axis, *, peer: int, tag: int) -> Pending:
    """Receive into `buffer` from the rank at position `peer` of the axis; it is filled after `wait`."""
    axis.meter.add(axis.name, "receive", buffer.numel() * buffer.element_size())
    return Pending(buffer, dist.irecv(buffer, axis.ranks[peer], group=axis.group, tag=tag))
