"""What a run says about its attention, and what it refuses, before the first step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron3d.config.run import RunConfig
from megatron3d.errors import ConfigError
from megatron3d.train import attention
from megatron3d.train.attention import AttentionUse
from tests.planner.measured import config_of

FLAGS = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --vocab-size 512 --seq-length 32 "
    "--max-position-embeddings 32 --micro-batch-size 1 --global-batch-size 2 --hidden-dropout 0"
)


def use_of(config: RunConfig, device: str, dtype: torch.dtype) -> AttentionUse:
    return AttentionUse(config.model, config.train, dtype, torch.device(device))


@pytest.mark.parametrize(
    ("flags", "device", "dtype", "line"),
    [
        ("--attention-dropout 0", "cpu", torch.float32, "FlashAttention (cpu, float32)"),
        (
            "--attention-dropout 0",
            "cpu",
            torch.bfloat16,
            "torch's FlashAttention, its backward over blocks of keys (cpu, bfloat16)",
        ),
        (
            "--attention-dropout 0.1",
            "cpu",
            torch.float32,
            "two products and a softmax in fp32, with dropout by place (cpu, float32, with dropout)",
        ),
        (
            "--attention-dropout 0",
            "cuda",
            torch.bfloat16,
            "cuDNN, where it takes the inputs, else FlashAttention or torch's memory-efficient kernel "
            "(cuda, bfloat16, compute capability 9.0)",
        ),
        (
            "--attention-dropout 0 --attention-backend flash",
            "cuda",
            torch.bfloat16,
            "FlashAttention (--attention-backend flash)",
        ),
    ],
)
def test_one_line_says_which_attention_runs_and_why(
    flags: str, device: str, dtype: torch.dtype, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "compute_capability", lambda device: (9, 0) if device.type == "cuda" else (0, 0))
    use = use_of(config_of(f"{FLAGS} {flags}", 1), device, dtype)
    use.settle()
    assert use.lines() == [f"attention: {line}"]


def test_selective_recomputation_of_a_fused_kernel_gets_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "compute_capability", lambda device: (9, 0))
    config = config_of(f"{FLAGS} --attention-dropout 0 --recompute-granularity selective", 1)
    assert use_of(config, "cuda", torch.bfloat16).lines()[1].startswith("--recompute-granularity selective recomputes")
    assert len(use_of(config, "cpu", torch.bfloat16).lines()) == 1


@pytest.mark.parametrize(("backend", "reason"), [("fused", "cuDNN's"), ("flash", "drops no probabilities")])
def test_a_backend_that_the_device_does_not_have_is_refused(backend: str, reason: str) -> None:
    config = config_of(f"{FLAGS} --attention-dropout 0.1", 1)
    use = use_of(replace(config, train=replace(config.train, attention_backend=backend)), "cpu", torch.float32)
    with pytest.raises(ConfigError, match=f"--attention-backend {backend}: .*{reason}"):
        use.settle()


def test_the_newest_flash_attention_is_taken_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    activated: list[str] = []
    monkeypatch.setattr(attention, "compute_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention.backends, "_is_installed", lambda module: module == "flash_attn_interface")
    monkeypatch.setattr(attention.backends, "activate_flash", activated.append)
    for flags in ("--attention-backend flash", "--attention-backend flash --attention-dropout 0.1", ""):
        config = config_of(f"{FLAGS} --attention-dropout 0 {flags}", 1)
        use_of(config, "cuda", torch.bfloat16).settle()
    assert activated == ["FA3"]
