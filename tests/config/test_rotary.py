"""Scalings of rotary positions: as Megatron-LM spells them, with what they need, and never without effect."""

from __future__ import annotations

import pytest

from megatron3d.config.check import resolve
from megatron3d.config.cli import parse_args
from megatron3d.config.sections.model import ModelConfig
from megatron3d.errors import ConfigError
from tests.runs.harness import MOCK

ROPE = "--position-embedding-type rope"


def model(options: str) -> ModelConfig:
    run = parse_args(f"{MOCK} {options}".split(), program="p", description="d", log=lambda line: None)
    return resolve(run, 1).model


@pytest.mark.parametrize(
    ("options", "scaling", "factor", "original"),
    [
        (ROPE, "none", None, None),
        (f"{ROPE} --rotary-scaling-factor 1 --mscale 1.0 --mscale-all-dim 0.0", "none", 1, None),
        (f"{ROPE} --rotary-seq-len-interpolation-factor 1", "none", None, None),
        (f"{ROPE} --rotary-seq-len-interpolation-factor 4", "linear", 4, None),
        (f"{ROPE} --use-rope-scaling", "llama3", 8, 8192),
        ("--use-rotary-position-embeddings --use-rope-scaling --rope-scaling-factor 32", "llama3", 32, 8192),
        (
            "--position-embedding-type yarn --rotary-scaling-factor 8 --yarn-original-max-position-embeddings 4 "
            "--yarn-correction-range-round-to-int",
            "yarn",
            8,
            4,
        ),
        ("--position-embedding-type yarn --original-max-position-embeddings 4", "yarn", 4, 4),
        (
            f"{ROPE} --rotary-scaling ntk --max-position-embeddings 64 --original-max-position-embeddings 16",
            "ntk",
            4,
            16,
        ),
        (f"{ROPE} --rotary-scaling ntk --original-max-position-embeddings 64", "ntk", 1, 64),
    ],
)
def test_spellings_of_megatron_lm_and_lengths_give_scaling_and_factor(
    options: str, scaling: str, factor: float | None, original: int | None
) -> None:
    found = model(options)
    assert found.position_embedding_type == "rope"
    assert (found.rotary_scaling, found.rotary_scaling_factor) == (scaling, factor)
    assert found.rotary_original_max_position_embeddings == original


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--rotary-scaling linear --rotary-scaling-factor 2", "--position-embedding-type is learned_absolute"),
        (f"{ROPE} --rotary-scaling linear", "by how much the context is extended; give --rotary-scaling-factor"),
        (f"{ROPE} --rotary-scaling yarn --rotary-scaling-factor 4", "the length that the frequencies were trained at"),
        (f"{ROPE} --rotary-scaling-factor 4", "--rotary-scaling-factor 4 has no effect with --rotary-scaling none"),
        (f"{ROPE} --use-rope-scaling --yarn-beta-fast 8", "use --rotary-scaling yarn"),
        ("--position-embedding-type yarn --rotary-scaling ntk --rotary-scaling-factor 2", "ask for different scalings"),
        (f"{ROPE} --use-rope-scaling --rotary-seq-len-interpolation-factor 2", "and the scaling is llama3"),
        (f"{ROPE} --rotary-seq-len-interpolation-factor 2 --rotary-scaling-factor 3", "ask for different factors"),
        (f"{ROPE} --rotary-scaling linear --rotary-scaling-factor 0.5", "it must be at least 1"),
        (f"{ROPE} --use-rope-scaling --rotary-low-freq-factor 4", "must be above --rotary-low-freq-factor 4"),
        (f"{ROPE} --kv-channels 2 --rotary-scaling ntk --rotary-scaling-factor 2", "there is one alone"),
        (f"{ROPE} --rope-type yarn", "use --rotary-scaling"),
        (f"{ROPE} --rope-scaling yarn", "did you mean --rotary-scaling"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_remedy(options: str, words: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        model(options)
    assert words in " ".join(str(refusal.value).split())
