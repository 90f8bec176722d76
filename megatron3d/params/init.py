"""Layout-independent initial values: a parameter's values depend on the seed and its full name alone.

Every number has its place in the whole parameter, and is drawn by that place (`normal.py`), on the CPU. So a rank draws
what it holds and nothing else, and the same model comes out at every layout and on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron3d.params.boxes import Box
from megatron3d.params.normal import fill_normal
from megatron3d.params.spec import ParamSpec
from megatron3d.params.streams import stream_seed


def initial_full(spec: ParamSpec, *, seed: int) -> Tensor:
    """The whole parameter's initial values, fp32 on the CPU, without padding."""
    full = torch.empty(spec.shape)
    _fill(full, Box((0,) * len(spec.shape), spec.shape), spec, seed)
    return full


def initial_shard(spec: ParamSpec, *, seed: int, tp: int, tp_rank: int) -> Tensor:
    """This rank's shard of the initial values, fp32 on the CPU, in its local (padded) shape."""
    shard = torch.empty(spec.local_shape(tp))
    fill_initial(shard.view(-1), spec, seed=seed, tp=tp, tp_rank=tp_rank)
    return shard


def fill_initial(out: Tensor, spec: ParamSpec, *, seed: int, tp: int, tp_rank: int, start: int = 0) -> None:
    """Write the initial values of a range of this rank's flattened shard into `out`; padding starts as zero.

    Args:
        out: fp32 on the CPU, one-dimensional, as long as the range.
        spec: of the parameter.
        seed: of the model.
        tp: ranks that cut the parameter.
        tp_rank: this rank's position among them.
        start: the first element of the range.
    """
    boxes, covered = spec.boxes(tp, tp_rank, start, start + out.numel())
    for box, part in zip(boxes, out[:covered].split([box.numel for box in boxes]), strict=True):
        _fill(part.view(box.size), box, spec, seed)
    out[covered:].zero_()


def _fill(out: Tensor, box: Box, spec: ParamSpec, seed: int) -> None:
    if spec.init.kind != "normal":
        out.fill_(1.0 if spec.init.kind == "ones" else 0.0)
    elif out.numel():
        fill_normal(out, box, spec.shape, std=spec.init.std, seed=stream_seed(seed, "init", spec.name))
