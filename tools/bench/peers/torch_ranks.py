"""The plain-torch GPT on several ranks, with what torch ships for it.

Data parallel is DistributedDataParallel, ZeRO 1 adds ZeroRedundancyOptimizer, ZeRO 2 and 3 are `fully_shard` of each
block, with parameters kept after the forward and without.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from tools.bench.peers.plain_torch import PlainGPT
from tools.bench.peers.trainee import Trainee, autocast, cross_entropy, fused_adamw, own_sequences
from tools.bench.peers.work import LEARNING_RATE, WEIGHT_DECAY, Work


def build(work: Work) -> Trainee:
    """This rank's model; `work.layout` is "dp", "zero1", "zero2" or "zero3"."""
    dist.init_process_group("gloo")
    model = PlainGPT(work)
    num_parameters = sum(p.numel() for p in model.parameters())
    wrapped, optimizer, loss_of = _BUILDERS[work.layout](model, work)
    tokens_BS, labels_BS = own_sequences(work)

    def step() -> float:
        loss = loss_of(wrapped, tokens_BS, labels_BS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return Trainee(step, num_parameters)


Built = tuple[nn.Module, torch.optim.Optimizer, Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]]


def _data_parallel(model: PlainGPT, work: Work, *, sharded: bool) -> Built:
    wrapped = DistributedDataParallel(model)
    options = {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "fused": True}
    optimizer = ZeroRedundancyOptimizer(wrapped.parameters(), torch.optim.AdamW, **options) if sharded else None

    def loss_of(module: nn.Module, tokens_BS: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
        with autocast(work):
            return cross_entropy(module(tokens_BS), labels_BS)

    return wrapped, optimizer or fused_adamw(wrapped), loss_of


def _fully_sharded(model: PlainGPT, work: Work, *, keeps_parameters: bool) -> Built:
    """bf16 by fully_shard's own policy: parameters are gathered in bf16 and gradients reduced in fp32."""
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = mixed if work.dtype == "bf16" else MixedPrecisionPolicy()
    mesh = init_device_mesh("cpu", (work.ranks,))
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=not keeps_parameters)

    def loss_of(module: nn.Module, tokens_BS: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
        return cross_entropy(module(tokens_BS).float(), labels_BS)

    return model, fused_adamw(model), loss_of


_BUILDERS: dict[str, Callable[[PlainGPT, Work], Built]] = {
    "dp": partial(_data_parallel, sharded=False),
    "zero1": partial(_data_parallel, sharded=True),
    "zero2": partial(_fully_sharded, keeps_parameters=True),
    "zero3": partial(_fully_sharded, keeps_parameters=False),
}
