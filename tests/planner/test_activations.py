"""What a forward keeps for its backward: recorded bytes against the tensors that autograd really saves, exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megatron3d.config.run import RunConfig
from megatron3d.models.stage import MicroBatch, Stage
from megatron3d.nn.loss_sink import LossSink
from megatron3d.planner.ledger import activation_bytes
from megatron3d.planner.memory import part_of
from megatron3d.planner.stage_run import message_bytes, message_shape
from megatron3d.train.dropout import with_dropout
from megatron3d.train.plan import plan_of
from megatron3d.train.setup import TrainingSetup
from megatron3d.train.step import micro_batches
from tests.dist.pool import Pool
from tests.planner.measured import allocations_of, batches_of, config_of, parts_of
from tests.planner.models import BERT, DROPOUT, FULL, GPT, LLAMA, NO_DROPOUT, SELECTIVE

TP_SP = "--tensor-model-parallel-size 2 --sequence-parallel"
ONE = (
    ("gpt", f"{GPT} {NO_DROPOUT}"),
    ("gpt", f"{GPT} {DROPOUT}"),
    ("gpt", f"{GPT} {DROPOUT} --bf16"),
    ("gpt", f"{GPT} {NO_DROPOUT} --squared-relu --apply-residual-connection-post-layernorm"),
    ("gpt", f"{GPT} {NO_DROPOUT} --qk-layernorm --micro-batch-size 1"),
    ("gpt", LLAMA),
    ("gpt", f"{LLAMA} --bf16"),
    ("gpt", f"{LLAMA} --num-query-groups 4 --qk-layernorm --bf16"),
    ("gpt", f"{LLAMA} --bf16 --fp8-format hybrid"),
    ("gpt", f"{LLAMA} {SELECTIVE}"),
    ("gpt", f"{GPT} {DROPOUT} {SELECTIVE} --bf16"),
    ("gpt", f"{LLAMA} {FULL}"),
    ("gpt", f"{LLAMA} --recompute-granularity full --recompute-method block --recompute-num-layers 3"),
    ("bert", BERT),
    ("bert", f"{BERT} --bf16 {SELECTIVE}"),
)
TWO = (
    ("gpt", f"{GPT} {DROPOUT} {TP_SP}"),
    ("gpt", f"{LLAMA} --tensor-model-parallel-size 2"),
    ("gpt", f"{LLAMA} {TP_SP} --bf16"),
    ("gpt", f"{GPT} {DROPOUT} {TP_SP} --tp-comm-overlap"),
    ("gpt", f"{LLAMA} {TP_SP} --bf16 --fp8-format e4m3"),
    ("gpt", f"{LLAMA} --pipeline-model-parallel-size 2"),
    ("bert", f"{BERT} {TP_SP}"),
)
SCALARS = 160  # bytes: 8 for each number that a tensor is scaled by, which is no tensor that anybody saves


@dataclass(frozen=True)
class Kept:
    """What a forward of a stage keeps: bytes that hooks see saved, bytes that the allocator does not get back, and how
    many tokens of its micro-batch count for the loss."""

    saved: int
    held: int
    counted: int


def _kept(rank: int, world_size: int, cases: list[tuple[str, str]]) -> list[dict[int, Kept]]:
    return [_kept_by(config_of(flags, world_size, architecture=kind)) for kind, flags in cases]


def _kept_by(config: RunConfig) -> dict[int, Kept]:
    """One forward of each stage of this rank after another, which warms up what is made once."""
    parts = parts_of(config)
    batch, specs = batches_of(config, parts, 1)[0], parts.model.losses
    gradients = {spec.name: 1.0 for spec in specs}
    losses = LossSink(specs, tp_rank=parts.mesh.tp.rank, device=parts.model.device, gradients=gradients)
    micros = micro_batches(batch, config.train.micro_batch_size, device=torch.device("cpu"), losses=losses)
    micro = with_dropout(micros[:1], config.model, seed=1, first_samples=[0])[0]
    found = {}
    for number, stage in parts.model.stages.items():
        x = (
            None
            if stage.part.is_first
            else torch.randn(message_shape(config), dtype=parts.model.dtype, requires_grad=True)
        )
        saved = _saved(parts, stage, x, micro)
        outputs: list[Tensor] = []
        held = allocations_of(lambda stage=stage, x=x, outputs=outputs: outputs.append(stage(x, micro)))
        found[number] = Kept(saved, held.left, int(micro.loss_mask_BS.count_nonzero()))
    return found


def _tables(config: RunConfig) -> int:
    """Bytes of the tables of angles where every layer is recomputed, which keeps them without saving them."""
    model = config.model
    is_kept = model.position_embedding_type == "rope" and config.train.recompute_method == "uniform"
    return 4 * model.seq_length * model.kv_channels if is_kept else 0


def _saved(parts: TrainingSetup, stage: Stage, x: Tensor | None, micro: MicroBatch) -> int:
    """Bytes of all memory that tensors saved for the backward lie in, but for weights, input and samples."""
    given = [one for one in vars(micro).values() if isinstance(one, Tensor)] + ([] if x is None else [x])
    weights = [unit.weights.full for unit in parts.engine.units.values()]
    theirs = {one.untyped_storage().data_ptr() for one in (*given, *weights)}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = stage(x, micro)
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in saved}
    assert y.requires_grad
    return sum(size for pointer, size in storages.items() if pointer not in theirs)


@pytest.mark.parametrize(("world_size", "cases"), [(1, ONE), (2, TWO)], ids=["1 process", "2 processes"])
def test_a_forward_keeps_what_was_recorded(pool: Pool, world_size: int, cases: tuple[tuple[str, str], ...]) -> None:
    wrong = []
    for rank, of_rank in enumerate(pool.run(world_size, _kept, list(cases), timeout_s=600)):
        for (kind, flags), found in zip(cases, of_rank, strict=True):
            config = config_of(flags, world_size, architecture=kind)
            tp, plan = config.parallel.tensor_model_parallel_size, plan_of(config)
            for number, real in found.items():
                if kind == "bert":  # of which an expected number of masked tokens is recorded
                    share = real.counted / (config.train.micro_batch_size * config.model.seq_length)
                    config = replace(config, data=replace(config.data, mask_prob=share))
                part = part_of(plan, number)
                kept = activation_bytes(config, part, device_type="cpu") - (
                    0 if part.is_first else message_bytes(config)
                )
                if kind == "bert" and config.parallel.sequence_parallel and rank == 0:  # has the first token, no mask
                    kept -= config.train.micro_batch_size * config.model.hidden_size
                # The output lives on without being saved; on the last stage a scalar, and so do the terms of losses.
                terms = 1 + config.model.has_binary_head if tp == 1 else 0
                output = 4 * (1 + terms) if part.is_last else message_bytes(config)
                saved = kept - output - _tables(config)
                # gloo may let go of the copy of a collective on a thread that the profiler does not see.
                most = kept + SCALARS if tp == 1 else math.inf
                if real.saved != saved or not kept <= real.held <= most:
                    wrong.append(f"{kind} {flags}: {real}, but the record saves {saved} and keeps {kept}")
    assert not wrong, "\n".join(wrong)
