"""Updated weights on their way to where the shard of a rank lives."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron3d.comm.device import Copy
from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.zero.buffers import TransientBuffers, WeightBacking, WeightBuffer
from megatron3d.zero.flat import Span


class Stored:
    """A backing that keeps what it is given to store."""

    host_bytes = file_bytes = 0

    def __init__(self) -> None:
        self.sources: list[Tensor] = []

    def start_store(self, name: str, source: Tensor) -> Copy:
        self.sources.append(source)
        return Copy(None)


def test_offloaded_weights_that_were_updated_on_the_host_do_not_go_by_the_device() -> None:
    """The layers' device is meta here, from which nothing would come back."""
    stored, transient = Stored(), TransientBuffers()
    buffer = WeightBuffer(
        torch.zeros(8, device="meta"),
        Span(0, 8),
        make_mesh(Layout()).grad,
        dtype=torch.bfloat16,
        is_sharded=True,
        transient=transient,
        keeps_master=False,
        backing=WeightBacking(stored, "unit"),
    )
    values = torch.linspace(0, 1, 8)
    buffer.set_shard(values)
    first, updated = stored.sources
    assert first.device.type == "meta"  # the initial weights, from where they were made
    assert torch.equal(updated, values.bfloat16())
