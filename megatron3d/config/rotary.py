"""Numbers that follow from the options of rotary positions; the frequencies themselves are in `nn/rotary.py`."""

from __future__ import annotations

from math import log

from megatron3d.config.sections.model import ModelConfig


def rotated_size(model: ModelConfig) -> int:
    """R, how many of a head's values are rotated."""
    return int(model.kv_channels * model.rotary_percent)


def ntk_base(model: ModelConfig) -> float:
    """The base that ntk scaling changes `--rotary-base` to: b s^(R/(R-2)) for a factor s; R must be above 2.

    Source: Peng et al. 2023 (arXiv:2309.00071), section 3.1.
    """
    rotated = rotated_size(model)
    return model.rotary_base * (model.rotary_scaling_factor or 1.0) ** (rotated / (rotated - 2))


def rotary_attention_factor(model: ModelConfig) -> float:
    """What cosine and sine are multiplied by: 1 but with yarn, where logits of attention grow by its square.

    Source: Peng et al. 2023, section 3.4; `--mscale` and `--mscale-all-dim` as in Megatron-LM's `YarnRotaryEmbedding`.
    """
    if model.rotary_scaling != "yarn":
        return 1.0
    if model.rotary_attention_factor is not None:
        return model.rotary_attention_factor
    growth = log(max(1.0, model.rotary_scaling_factor or 1.0))
    return (0.1 * model.mscale * growth + 1.0) / (0.1 * model.mscale_all_dim * growth + 1.0)
