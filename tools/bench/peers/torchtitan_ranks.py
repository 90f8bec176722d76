"""Torchtitan's Llama 3 on several ranks: its own parallelize function and pipeline, on a CPU with gloo.

Its `fully_shard` asks for a reduction that divides on the way, which gloo does not have: sums are forced instead.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims, parallel_dims
from torchtitan.distributed import utils as titan
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.models.llama3 import parallelize_llama
from torchtitan.models.llama3.sharding import set_llama3_sharding_config

from tools.bench.peers.torchtitan_llama import config_of, positions_of
from tools.bench.peers.trainee import Trainee, fused_adamw, own_sequences
from tools.bench.peers.work import Work


def build(work: Work) -> Trainee:
    """This rank's model; `work.layout` is "zero2", "zero3", "tp", "tp_sp" or "pp"."""
    parallel_dims.device_type = titan.device_type = "cpu"  # it takes CUDA where there is no accelerator at all
    titan.device_module = torch.cpu
    dist.init_process_group("gloo")
    parallel = ParallelismConfig(
        tensor_parallel_degree=work.tensor_ranks,
        pipeline_parallel_degree=work.pipeline_ranks,
        pipeline_parallel_schedule="1F1B",
        pipeline_parallel_microbatch_size=work.micro_batch_size,
        enable_sequence_parallel=work.layout == "tp_sp",
        fsdp_reshard_after_forward="never" if work.layout == "zero2" else "always",
        spmd_backend="partial_dtensor",
    )
    training = TrainingConfig(
        local_batch_size=work.num_sequences if work.layout == "pp" else work.micro_batch,
        seq_len=work.seq_length,
        mixed_precision_param="bfloat16" if work.dtype == "bf16" else "float32",
    )
    config = config_of(work)
    set_llama3_sharding_config(config, enable_sp=work.layout == "tp_sp")
    dims = ParallelDims.from_config(parallel, work.ranks)
    titan.set_spmd_backend(parallel.spmd_backend)
    with torch.device("meta"):
        model = config.build()
    options = {
        "parallel_dims": dims,
        "training": training,
        "parallelism": parallel,
        "compile_config": CompileConfig(),
        "ac_config": None,
        "dump_folder": "",
    }
    context = titan.get_spmd_context(parallel_dims=dims)
    if work.layout == "pp":
        schedule, parts, is_first, is_last = pipeline_llm(
            model,
            device=torch.device("cpu"),
            model_config=config,
            parallelize_fn=parallelize_llama,
            loss_fn=_Loss(work),
            **options,
        )
        run = _pipeline_run(schedule, work, is_first=is_first, is_last=is_last)
    else:
        parts = [parallelize_llama(model, **options)]
        run = _micro_batches_run(parts[0], work)
    for part in parts:
        _allocate(part)
    optimizer = fused_adamw(nn.ModuleList(parts))

    def step() -> float:
        with context():
            loss = run()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return Trainee(step, sum(p.numel() for part in parts for p in part.parameters()))


class _Loss:
    """The mean of its own loss, which knows logits that are sharded by vocabulary."""

    def __init__(self, work: Work) -> None:
        self._sum = CrossEntropyLoss(CrossEntropyLoss.Config(global_vocab_size=work.vocab_size))

    def __call__(self, logits_BSV: Tensor, labels_BS: Tensor, **_: object) -> tuple[Tensor, dict]:
        return self._sum(logits_BSV, labels_BS, torch.tensor(float(labels_BS.numel())))[0], {}


def _pipeline_run(schedule: object, work: Work, *, is_first: bool, is_last: bool) -> Callable[[], float]:
    tokens_BS, labels_BS = own_sequences(work)
    positions_BS = positions_of(tokens_BS)

    def run() -> float:
        losses = [] if is_last else None
        inputs, target = ((tokens_BS,) if is_first else ()), (labels_BS if is_last else None)
        schedule.step(*inputs, positions=positions_BS, target=target, losses=losses, return_outputs=False)
        return sum(loss.item() for loss in losses) / len(losses) if losses else 0.0

    return run


def _micro_batches_run(model: nn.Module, work: Work) -> Callable[[], float]:
    tokens_BS, labels_BS = own_sequences(work)
    size, mean_loss = work.micro_batch_size, _Loss(work)

    def run() -> float:
        losses = []
        for tokens_bS, labels_bS in zip(tokens_BS.split(size), labels_BS.split(size)):
            loss, _ = mean_loss(model(tokens_bS, positions_of(tokens_bS)), labels_bS)
            loss.backward()
            losses.append(loss.item())
        return sum(losses) / len(losses)

    return run


def _allocate(part: nn.Module) -> None:
    for module in part.modules():
        if hasattr(module, "set_force_sum_reduction_for_comms"):
            module.set_force_sum_reduction_for_comms(True)
    part.to_empty(device="cpu")
    with torch.no_grad():
        part.init_states(buffer_device=torch.device("cpu"))
    part.train()
