"""Rotary frequencies of each scaling are those of transformers, bit for bit; ntk is its dynamic form at full length."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron3d.config.rotary import rotary_attention_factor
from megatron3d.config.sections.model import ModelConfig
from megatron3d.nn.positions import rotary_table
from megatron3d.nn.rotary import rotary_frequencies
from tests.nn.dense import model_config

rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
LlamaConfig = pytest.importorskip("transformers").LlamaConfig

CPU = torch.device("cpu")
HEAD, LENGTH, BASE = 32, 64, 10000.0
ORIGINAL: dict[str, Any] = {"original_max_position_embeddings": LENGTH}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
OURS_OF_LLAMA3 = {"rotary_scaling": "llama3", "rotary_base": 5e5, "kv_channels": 128, "max_position_embeddings": 131072}


def ours(scaling: str, factor: float | None = None, **more: Any) -> ModelConfig:
    options = {"kv_channels": HEAD, "rotary_original_max_position_embeddings": LENGTH, **more}
    sizes = {"position_embedding_type": "rope", "rotary_scaling": scaling, "rotary_scaling_factor": factor}
    return model_config(**sizes, **options)


def theirs(rope_type: str, head: int = HEAD, positions: int = 1024, theta: float = BASE, **more: Any) -> Any:
    parameters = {"rope_type": rope_type, "rope_theta": theta, **more}
    return LlamaConfig(
        hidden_size=head, num_attention_heads=1, max_position_embeddings=positions, rope_parameters=parameters
    )


CASES = {
    "linear": (ours("linear", 4.0), theirs("linear", factor=4.0)),
    "linear by Megatron-LM's option": (
        ours("none", rotary_seq_len_interpolation_factor=3),
        theirs("linear", factor=3.0),
    ),
    "yarn": (ours("yarn", 16.0), theirs("yarn", factor=16.0, **ORIGINAL)),
    "yarn by the lengths": (
        ours("yarn", max_position_embeddings=1024),
        theirs("yarn", factor=16.0, **ORIGINAL),
    ),
    "yarn with another ramp": (
        ours("yarn", 4.0, yarn_beta_fast=8.0, yarn_beta_slow=2.0, yarn_correction_range_round_to_int=False),
        theirs("yarn", factor=4.0, beta_fast=8.0, beta_slow=2.0, truncate=False, **ORIGINAL),
    ),
    "yarn of both magnitudes": (
        ours("yarn", 40.0, mscale=0.7, mscale_all_dim=1.0),
        theirs("yarn", factor=40.0, mscale=0.7, mscale_all_dim=1.0, **ORIGINAL),
    ),
    "yarn with its magnitude": (
        ours("yarn", 4.0, rotary_attention_factor=1.25),
        theirs("yarn", factor=4.0, attention_factor=1.25, **ORIGINAL),
    ),
    "llama3 of the release": (model_config(position_embedding_type="rope", **OURS_OF_LLAMA3), None),
    "llama3": (
        ours("llama3", 32.0, rotary_low_freq_factor=0.5, rotary_high_freq_factor=6.0),
        theirs("llama3", factor=32.0, low_freq_factor=0.5, high_freq_factor=6.0, **ORIGINAL),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_scaled_frequencies_and_magnitudes_are_those_of_transformers(case: str) -> None:
    config, there = CASES[case]
    there = there or theirs("llama3", 128, 131072, 5e5, **LLAMA3)
    expected, factor = rope_utils.ROPE_INIT_FUNCTIONS[config.rotary_scaling](there, CPU)
    assert torch.equal(rotary_frequencies(config, device=CPU), expected)
    assert rotary_attention_factor(config) == pytest.approx(factor, rel=1e-15)
    plain = rotary_frequencies(model_config(kv_channels=config.kv_channels, rotary_base=config.rotary_base), device=CPU)
    assert not torch.equal(plain, expected), "a scaling that changes nothing would not show a mistake"


@pytest.mark.parametrize(("head", "base"), [(128, 10000.0), (64, 500000.0), (80, 1e6)])
def test_plain_frequencies_are_those_of_transformers(head: int, base: float) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    expected = LlamaRotaryEmbedding(theirs("default", head, theta=base)).inv_freq
    assert torch.equal(rotary_frequencies(model_config(kv_channels=head, rotary_base=base), device=CPU), expected)


@pytest.mark.parametrize("scale", [2.0, 8.0])
def test_ntk_is_the_dynamic_form_of_transformers_at_the_extended_length(scale: float) -> None:
    """With factor 1 theirs stretches the base by exactly the ratio of the text's length to the original one."""
    there = theirs("dynamic", positions=LENGTH, factor=1.0)
    expected, _ = rope_utils.ROPE_INIT_FUNCTIONS["dynamic"](there, CPU, seq_len=int(scale * LENGTH))
    assert torch.equal(rotary_frequencies(ours("ntk", scale), device=CPU), expected)


def test_ntk_divides_the_slowest_frequency_by_the_factor_and_leaves_the_fastest() -> None:
    plain, scaled = (rotary_frequencies(ours(*how), device=CPU) for how in (("none",), ("ntk", 8.0)))
    assert scaled[0] == plain[0] == 1
    torch.testing.assert_close(scaled[-1], plain[-1] / 8)


def test_the_table_of_yarn_is_longer_by_its_magnitude() -> None:
    cos, sin = rotary_table(ours("yarn", 16.0), 5, None, device=CPU)
    torch.testing.assert_close((cos**2 + sin**2).sqrt(), torch.full_like(cos, 0.1 * math.log(16.0) + 1))
