"""tools/bench/gpu_table.py on a CPU: its models are the same in every way, and its cells run."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools.bench.peers.plain_llama import PlainLlama

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_plain_llama_computes_what_that_of_transformers_does() -> None:
    transformers = pytest.importorskip("transformers", reason="needs the transformers package")
    plain = PlainLlama(layers=2, hidden=32, heads=4, groups=2, ffn=48, vocabulary=50, tied=False, base=1000.0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
            tie_word_embeddings=False,
        )
    )
    state = {"model.embed_tokens.weight": plain.tokens.weight, "model.norm.weight": plain.norm.weight}
    state["lm_head.weight"] = plain.output.weight
    for number, block in enumerate(plain.blocks):
        prefix = f"model.layers.{number}"
        state |= {
            f"{prefix}.input_layernorm.weight": block.attention_norm.weight,
            f"{prefix}.post_attention_layernorm.weight": block.mlp_norm.weight,
            f"{prefix}.self_attn.o_proj.weight": block.projection.weight,
            f"{prefix}.mlp.down_proj.weight": block.down.weight,
        }
        parts = block.qkv.weight.split((32, 16, 16))
        state |= {f"{prefix}.self_attn.{n}_proj.weight": part for n, part in zip("qkv", parts, strict=True)}
        gate, up = block.gate_up.weight.chunk(2)
        state |= {f"{prefix}.mlp.gate_proj.weight": gate, f"{prefix}.mlp.up_proj.weight": up}
    theirs.load_state_dict(state)
    tokens = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(plain(tokens), theirs(input_ids=tokens).logits)


@pytest.mark.slow
def test_the_cells_of_a_gpt_and_a_llama_run_on_a_cpu(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the transformers package")
    ways = ["megatron3d", "megatron3d-fp8", "megatron3d-fp8-blocks", "torch", "transformers"]
    command = [sys.executable, "-m", "tools.bench.gpu_table", "--device", "cpu", "--tiny", "--steps", "2"]
    command += ["--models", "gpt2-124m", "llama-3.2-1b", "--ways", *ways, "--out", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=500, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    cells = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    assert len(cells) == 10
    assert all(abs(cell["loss"] - math.log(500)) < 0.2 for cell in cells), cells  # as good as a guess, at the start
