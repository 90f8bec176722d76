"""Rotary frequencies, plain and scaled to contexts longer than those that a model was first trained at.

With R the rotated part of a head, base b, frequencies f_i = b^(-2i/R), i = 0 .. R/2-1, factor s
(`--rotary-scaling-factor`) and L the original length (`--rotary-original-max-position-embeddings`), a frequency makes
t_i = L f_i / 2 pi turns in L:

    none      f_i; another `--rotary-base` is the plainest extension
    linear    f_i / s: positions are squeezed into the original length
    ntk       f_i of the base b s^(R/(R-2)): the slowest is divided by s, the fastest stays
    yarn      a mix of f_i / s and f_i: f_i from `--yarn-beta-fast` turns up, f_i / s to `--yarn-beta-slow` turns down,
              between them linear in i; cosine and sine are enlarged
    llama3    the same with `--rotary-high-freq-factor` and `--rotary-low-freq-factor` turns, linear in t_i

None depends on the length of a text, so that all layouts, a cache and its later tokens rotate alike. The dynamic form
of ntk in transformers does depend on it; ours is its value at the length s L, at which it stays.

Sources: Su et al. 2021 (RoFormer), equation 15; Chen et al. 2023 (arXiv:2306.15595) for linear; Peng et al. 2023
(arXiv:2309.00071), sections 3.1 to 3.4, for ntk and yarn; the release of Llama 3.1 for llama3. Every formula is
evaluated in the order of transformers' `modeling_rope_utils.py` (5.23), so that its frequencies are ours bit for bit.
"""

from __future__ import annotations

from math import ceil, floor, log, pi

import torch
from torch import Tensor

from megatron3d.config.rotary import ntk_base, rotated_size
from megatron3d.config.sections.model import ModelConfig


def rotary_frequencies(config: ModelConfig, *, device: torch.device) -> Tensor:
    """Radians a position, fp32 [R/2], of a model with rotary positions."""
    rotated = rotated_size(config)
    factor, scaling = config.rotary_scaling_factor or 1.0, config.rotary_scaling
    base = config.rotary_base
    if scaling == "ntk":
        base = ntk_base(config)
    periods_R2 = base ** (torch.arange(0, rotated, 2, device=device, dtype=torch.float32) / rotated)
    plain_R2 = 1.0 / periods_R2
    if scaling == "linear":
        return plain_R2 / factor
    if scaling == "yarn":
        return _yarn(config, periods_R2)
    return _llama3(config, plain_R2) if scaling == "llama3" else plain_R2


def _yarn(config: ModelConfig, periods_R2: Tensor) -> Tensor:
    """Source: Peng et al. 2023, section 3.2, with the ramp over indices of the authors' code."""
    factor = config.rotary_scaling_factor or 1.0
    first, last = (_index_of_turns(config, turns) for turns in (config.yarn_beta_fast, config.yarn_beta_slow))
    if config.yarn_correction_range_round_to_int:
        first, last = floor(first), ceil(last)
    first, last = max(first, 0), min(last, rotated_size(config) - 1)
    width = last - first if last != first else 0.001  # as there, so that the ramp is a step
    indices_R2 = torch.arange(len(periods_R2), device=periods_R2.device, dtype=torch.float32)
    kept_R2 = 1 - ((indices_R2 - first) / width).clamp(0, 1)
    return 1.0 / (factor * periods_R2) * (1 - kept_R2) + 1.0 / periods_R2 * kept_R2


def _index_of_turns(config: ModelConfig, turns: float) -> float:
    """The index, not whole, of the frequency that makes so many turns in the original length."""
    length = config.rotary_original_max_position_embeddings or config.max_position_embeddings
    return rotated_size(config) * log(length / (turns * 2 * pi)) / (2 * log(config.rotary_base))


def _llama3(config: ModelConfig, plain_R2: Tensor) -> Tensor:
    """Source: `apply_scaling` of the release of Llama 3.1."""
    factor, low, high = (
        config.rotary_scaling_factor or 1.0,
        config.rotary_low_freq_factor,
        config.rotary_high_freq_factor,
    )
    length = config.rotary_original_max_position_embeddings or config.max_position_embeddings
    wavelengths_R2 = 2 * pi / plain_R2
    kept_R2 = (length / wavelengths_R2 - low) / (high - low)
    mixed_R2 = (1 - kept_R2) * plain_R2 / factor + kept_R2 * plain_R2
    slow_R2, fast_R2 = wavelengths_R2 > length / low, wavelengths_R2 < length / high
    return torch.where(slow_R2, plain_R2 / factor, torch.where(fast_R2, plain_R2, mixed_R2))
