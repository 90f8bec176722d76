"""Megatron-core on several ranks: its data-parallel wrapper, optimizer and schedules, on a CPU with gloo.

Without sequence parallelism, which its LayerNorm in plain torch refuses. Needs the same replacements of `torch.cuda` as
one process does, see `megatron_core_gpt.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module

from tools.bench.peers.megatron_core_gpt import config_of, gpt_model, use_cpu_as_the_device
from tools.bench.peers.trainee import Trainee, own_sequences
from tools.bench.peers.work import LEARNING_RATE, WEIGHT_DECAY, Work

Losses = tuple[torch.Tensor, dict[str, torch.Tensor]]


def build(work: Work) -> Trainee:
    """This rank's model; `work.layout` is "dp", "zero1", "tp" or "pp"."""
    use_cpu_as_the_device()
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(work.tensor_ranks, work.pipeline_ranks)
    model_parallel_cuda_manual_seed(1)
    config = config_of(work)
    model = gpt_model(work, config)
    sharded = work.layout == "zero1"
    reduction = DistributedDataParallelConfig(use_distributed_optimizer=sharded, grad_reduce_in_fp32=True)
    wrapped = DistributedDataParallel(config, reduction, Float16Module(config, model) if config.bf16 else model)
    wrapped.broadcast_params()
    options = OptimizerConfig(
        optimizer="adam",
        lr=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        bf16=config.bf16,
        params_dtype=config.params_dtype,
        clip_grad=0.0,
        use_distributed_optimizer=sharded,
    )
    optimizer = get_megatron_optimizer(options, [wrapped])
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = wrapped.no_sync
    forward_backward, forward_step = get_forward_backward_func(), _forward_step(work)

    def step() -> float:
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        losses = forward_backward(
            forward_step_func=forward_step,
            data_iterator=iter(range(work.num_micro_batches)),
            model=[wrapped],
            num_microbatches=work.num_micro_batches,
            seq_length=work.seq_length,
            micro_batch_size=work.micro_batch_size,
            forward_only=False,
        )
        optimizer.step()
        return sum(one["loss"].item() for one in losses) / max(1, len(losses))

    return Trainee(step, sum(p.numel() for p in model.parameters()))


def _forward_step(work: Work) -> Callable[[Iterator[int], torch.nn.Module], tuple[torch.Tensor, Callable[..., Losses]]]:
    """What the schedules call for each micro-batch; b is a micro-batch, and losses exist on the last stage."""
    tokens_BS, labels_BS = own_sequences(work)
    size = work.micro_batch_size
    hidden_11SS = torch.ones(1, 1, work.seq_length, work.seq_length, dtype=torch.bool).triu(1)
    positions_bS = torch.arange(work.seq_length).expand(size, -1)

    def mean(losses_BS: torch.Tensor) -> Losses:
        loss = losses_BS.float().mean()
        return loss, {"loss": loss.detach()}

    def forward_step(numbers: Iterator[int], model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Losses]]:
        first = next(numbers) * size
        chosen = slice(first, first + size)
        return model(tokens_BS[chosen], positions_bS, hidden_11SS, labels=labels_BS[chosen]), mean

    return forward_step
