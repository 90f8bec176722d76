"""Layout-independent initial values: a parameter's values depend on the seed and its full name alone.

Every rank draws the whole parameter from a generator seeded by (seed, name) on the CPU and keeps its own cut, so the
same model comes out at every layout and on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron3d.params.spec import ParamSpec
from megatron3d.params.streams import stream_seed


def initial_full(spec: ParamSpec, *, seed: int) -> Tensor:
    """The whole parameter's initial values, fp32 on the CPU, without padding."""
    if spec.init.kind == "zeros":
        return torch.zeros(spec.shape)
    if spec.init.kind == "ones":
        return torch.ones(spec.shape)
    generator = torch.Generator().manual_seed(stream_seed(seed, "init", spec.name))
    return torch.empty(spec.shape).normal_(0.0, spec.init.std, generator=generator)


def initial_shard(spec: ParamSpec, *, seed: int, tp: int, tp_rank: int) -> Tensor:
    """This rank's shard of the initial values, fp32 on the CPU, in its local (padded) shape."""
    return spec.take(initial_full(spec, seed=seed), tp, tp_rank).clone()
