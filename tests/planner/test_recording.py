"""Records of stages: the same with and without FakeTensorMode, complete, and true to depth; GPU kernels to formulas."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from megatron3d_kernels.registry import Registry
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron3d.models.stage import StagePart
from megatron3d.nn import block
from megatron3d.planner import stage_run
from megatron3d.planner.kernel_scratch import cpu_scratch
from megatron3d.planner.kernels_without_memory import CpuKernels, GpuKernels
from megatron3d.planner.ledger import activation_bytes
from megatron3d.planner.recording import Event, Kind, StorageRecorder
from megatron3d.planner.replay import condensed, left_of
from megatron3d.planner.stage_records import StageRecords
from megatron3d.planner.stage_run import StageRun
from tests.parity.test_kinds import ExpertMLP
from tests.planner.measured import config_of
from tests.planner.models import BERT, DROPOUT, GPT, LLAMA, NO_DROPOUT, SELECTIVE

TP_SP = "--tensor-model-parallel-size 2 --sequence-parallel"
FULL = "--recompute-granularity full --recompute-method"
DEEP = "--num-layers 7 --bf16 --zero-stage 2"
TERM = 4  # bytes of a loss of a micro-batch
Shapes = tuple[int, int, int, int]


def left(events: Sequence[Event], kind: Kind) -> int:
    """Bytes allocated less bytes freed."""
    return sum(event.size_bytes for event in events if event.kind is kind)


@pytest.mark.parametrize(
    ("flags", "splits", "is_first"),
    [
        ("", False, False),
        ("", True, False),
        (f"{FULL} uniform --recompute-num-layers 2", False, False),
        (f"{FULL} block --recompute-num-layers 4", False, False),
        ("--freeze-params *.attention.*", True, False),
        ("--freeze-params embedding.* layers.[3-5].* head.norm.weight", True, True),
        ("--freeze-params embedding.* layers.*", False, True),
        (f"--freeze-params embedding.* layers.[3-7].* {FULL} uniform --recompute-num-layers 2", True, True),
        (f"--freeze-params layers.[3-7].mlp.* {FULL} block --recompute-num-layers 6", False, True),
        ("--num-layers 10 --num-experts 4", False, True),
        ("--num-layers 10 --random-ltd --random-ltd-min 48 --random-ltd-max 48 --random-ltd-layers 4:8", True, False),
        ("--num-layers 10 --num-experts 4 --moe-layer-freq [0]*4+[1]*6", True, False),
        ("--num-layers 10 --num-experts 2 2 2 4 4 4 --moe-layer-freq [0]*4+[1]*6 --mlp-type residual", True, False),
    ],
)
def test_one_layer_stands_for_all_in_the_middle(flags: str, splits: bool, is_first: bool) -> None:
    config, part = config_of(f"{LLAMA} {DEEP} {flags}", 1), StagePart(range(3, 10), is_first, True)
    short = StageRecords(config, "cpu").of(part, splits=splits)
    whole = StageRun(config, "cpu").record(part, splits=splits)
    assert (short.forward, short.backward) == (condensed(whole.forward), condensed(whole.backward))
    assert short.weights[:-1] == condensed(whole.weights)


@pytest.mark.parametrize("splits", [False, True], ids=["whole", "split"])
def test_layers_with_units_of_two_kinds_are_repeated_too(monkeypatch: pytest.MonkeyPatch, splits: bool) -> None:
    monkeypatch.setattr(block, "MLP", ExpertMLP)
    config, part = config_of(f"{LLAMA} {DEEP}", 1), StagePart(range(3, 10), False, True)
    short = StageRecords(config, "cpu").of(part, splits=splits)
    whole = StageRun(config, "cpu").record(part, splits=splits)
    assert short.backward == condensed(whole.backward) and short.weights[:-1] == condensed(whole.weights)
    names = {one.name for one in (*short.backward, *short.weights) if isinstance(one, Event)}
    assert {f"layers.{layer}{kind}" for layer in range(3, 10) for kind in ("", ".expert")} <= names


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("splits", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("flags", [f"{GPT} {DROPOUT} {FULL} uniform", f"{LLAMA} --bf16 {TP_SP}"])
def test_all_that_is_allocated_is_freed(flags: str, splits: bool, device_type: str) -> None:
    config = config_of(flags, 2 if "tensor" in flags else 1)
    record = StageRecords(config, device_type).of(StagePart(range(4), False, True), splits=splits)
    # The terms of the losses are kept until the sums are made, at the end of a step.
    assert left_of((*record.forward, *record.backward, *record.weights)).total in (0, TERM)
    assert bool(record.weights) == splits
    kept = left_of(record.forward)
    assert kept.activations == kept.total > 0


@pytest.mark.parametrize(
    ("architecture", "flags"),
    [("gpt", f"{LLAMA} --bf16 {TP_SP} --num-layers 2"), ("bert", f"{BERT} --num-layers 2 {SELECTIVE}")],
)
def test_fake_tensors_of_a_cpu_give_the_record_of_the_meta_device(
    monkeypatch: pytest.MonkeyPatch, architecture: str, flags: str
) -> None:
    """With torch's own choice of an attention kernel, which fake tensors of a CPU leave to it."""
    config = config_of(flags, 2 if "tensor" in flags else 1, architecture=architecture)
    part = StagePart(range(2), True, True)
    on_meta = StageRun(config, "cpu").record(part, splits=False)
    monkeypatch.setattr(stage_run, "CpuKernels", Registry)
    with FakeTensorMode():
        fake = StageRun(config, "cpu", torch.device("cpu")).record(part, splits=False)
    assert on_meta == fake


@pytest.mark.parametrize("shapes", [(2, 4, 4, 16), (2, 4, 2, 16)], ids=["multi-head", "grouped"])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_a_gpu_keeps_what_that_of_a_cpu_does(shapes: Shapes, masked: bool) -> None:
    samples, heads, groups, size = shapes

    def tensor(heads: int) -> Tensor:
        return torch.empty(192, samples, heads, size, device="meta", dtype=torch.bfloat16).permute(1, 2, 0, 3)

    def record(kernels: Registry) -> tuple[list[Event], list[Event]]:
        recorder = StorageRecorder(cpu_scratch)
        qkv = [tensor(count).requires_grad_() for count in (heads, groups, groups)]
        mask = torch.empty(samples, 1, 192, 192, device="meta", dtype=torch.bool) if masked else None
        gradient = torch.empty_like(qkv[0])
        recorder.ignore([*qkv, gradient] + ([] if mask is None else [mask]))
        with recorder:
            y = kernels.attention(*qkv, mask=mask, probability=0.0, is_causal=not masked)
        forward = recorder.take()
        with recorder, recorder.backward():
            gradients = torch.autograd.grad(y, qkv, gradient)
        assert [one.shape for one in gradients] == [one.shape for one in qkv]
        return list(forward), list(recorder.take())

    (ours, back), (theirs, their_back) = record(GpuKernels()), record(CpuKernels())
    assert left(ours, Kind.ACTIVATION) == left(theirs, Kind.ACTIVATION) > 0
    assert left(back, Kind.WORK) == left(their_back, Kind.WORK)  # the gradients


def test_a_block_on_a_gpu_keeps_the_bytes_of_the_formula() -> None:
    """Korthikanti et al. 2022, equation 1, without dropout masks and S x S matrices, which a fused core spares: 32 SBH,
    and 4 bytes for each query and head, and for the mean and deviation of each row of two norms."""
    config = config_of(f"{GPT} {NO_DROPOUT} --bf16", 1)
    samples, length, hidden = config.train.micro_batch_size, config.model.seq_length, config.model.hidden_size
    kept = [activation_bytes(config, StagePart(range(layers), False, False), device_type="cuda") for layers in (1, 2)]
    tokens = samples * length
    expected = 32 * tokens * hidden + 4 * tokens * config.model.num_attention_heads + 16 * tokens
    assert kept[1] - kept[0] == expected


def test_norms_of_heads_on_a_gpu_keep_one_more_tensor_of_queries_and_keys() -> None:
    """Those that attention reads, beside the projection's output; nothing of the statistics."""
    kept = []
    for flags in ("", "--qk-layernorm"):
        config = config_of(f"{GPT} {NO_DROPOUT} --bf16 {flags}", 1)
        kept.append(activation_bytes(config, StagePart(range(1), False, False), device_type="cuda"))
    tokens = config.train.micro_batch_size * config.model.seq_length
    assert kept[1] - kept[0] == 2 * 2 * tokens * config.model.hidden_size
