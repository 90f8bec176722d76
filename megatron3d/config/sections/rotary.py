"""Rotary positions: which frequencies queries and keys are rotated by, and how they are scaled to a longer context.

What the scalings compute is in `nn/rotary.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron3d.config.fields import off_switch, option, switch

ROTARY_SCALINGS = ("none", "linear", "ntk", "yarn", "llama3")


@dataclass(frozen=True)
class GivenRotary:
    """The options of rotary positions. They mean nothing where positions are learned or absent."""

    rotary_base: float = option(10000.0, "--rotary-base", "Base of the rotary frequencies.")
    rotary_percent: float = option(1.0, "--rotary-percent", "Part of each head that is rotated, 0 to 1.")
    rotary_interleaved: bool = switch(
        "--rotary-interleaved", "Rotate neighbouring pairs (GPT-J) instead of halves (GPT-NeoX, Llama)."
    )
    rotary_scaling: str = option(
        "none", "--rotary-scaling", "How the frequencies are scaled to a longer context.", choices=ROTARY_SCALINGS
    )
    rotary_scaling_factor: float | None = option(
        None,
        "--rotary-scaling-factor",
        "By how much the context is extended; default the ratio of new to original length, and 8 with llama3.",
        also=("--rope-scaling-factor",),
    )
    rotary_seq_len_interpolation_factor: float | None = option(
        None,
        "--rotary-seq-len-interpolation-factor",
        "The same as --rotary-scaling linear --rotary-scaling-factor with this value.",
    )
    rotary_original_max_position_embeddings: int | None = option(
        None,
        "--rotary-original-max-position-embeddings",
        "Length that the unscaled frequencies were trained at; default 8192 with llama3.",
        unit="tokens",
        also=("--yarn-original-max-position-embeddings", "--original-max-position-embeddings"),
    )
    rotary_low_freq_factor: float = option(
        1.0, "--rotary-low-freq-factor", "llama3: frequencies with fewer turns in the original length are divided."
    )
    rotary_high_freq_factor: float = option(
        4.0, "--rotary-high-freq-factor", "llama3: frequencies with more turns in the original length stay."
    )
    rotary_attention_factor: float | None = option(
        None, "--rotary-attention-factor", "yarn: factor of cosine and sine; default by --mscale and --mscale-all-dim."
    )
    yarn_beta_fast: float = option(
        32.0, "--yarn-beta-fast", "yarn: frequencies with more turns in the original length stay."
    )
    yarn_beta_slow: float = option(
        1.0, "--yarn-beta-slow", "yarn: frequencies with fewer turns in the original length are divided."
    )
    mscale: float = option(1.0, "--mscale", "yarn: cosine and sine times 0.1 x this x ln(factor) + 1,")
    mscale_all_dim: float = option(0.0, "--mscale-all-dim", "yarn: divided by 0.1 x this x ln(factor) + 1.")
    yarn_correction_range_round_to_int: bool = off_switch(
        "--no-yarn-correction-range-round-to-int", "yarn: do not widen the range of mixed frequencies to whole numbers."
    )
