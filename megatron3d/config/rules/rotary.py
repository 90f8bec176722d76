"""What must hold between the options of rotary positions and of their scaling."""

from __future__ import annotations

from collections.abc import Iterator

from megatron3d.config.options import BY_NAME
from megatron3d.config.sections.model import GivenModel

# Options that only some scalings read.
_READ_BY = {
    "rotary_scaling_factor": ("linear", "ntk", "yarn", "llama3"),
    "rotary_original_max_position_embeddings": ("linear", "ntk", "yarn", "llama3"),
    "rotary_low_freq_factor": ("llama3",),
    "rotary_high_freq_factor": ("llama3",),
    "rotary_attention_factor": ("yarn",),
    "yarn_beta_fast": ("yarn",),
    "yarn_beta_slow": ("yarn",),
    "mscale": ("yarn",),
    "mscale_all_dim": ("yarn",),
    "yarn_correction_range_round_to_int": ("yarn",),
}


def rotary_rule(given: GivenModel, model: GivenModel) -> Iterator[str]:
    """Rotations work on pairs, and a scaling has what it needs."""
    rotated = int((model.kv_channels or 0) * model.rotary_percent)
    is_rotary = model.position_embedding_type == "rope"
    if is_rotary and model.kv_channels and (rotated % 2 or rotated == 0):
        yield (
            f"--position-embedding-type rope rotates pairs, but --kv-channels {model.kv_channels} x "
            f"--rotary-percent {model.rotary_percent:g} is {rotated}; choose them so that it is even and positive."
        )
    yield from _asked_twice(given)
    if model.rotary_scaling != "none" and not is_rotary:
        yield (
            f"--rotary-scaling {model.rotary_scaling} scales rotary positions, and --position-embedding-type is "
            f"{model.position_embedding_type}; use --position-embedding-type rope, or leave the scaling out."
        )
    yield from _without_reader(given, model.rotary_scaling)
    yield from _lacks(model, rotated)


def _asked_twice(given: GivenModel) -> Iterator[str]:
    """--position-embedding-type yarn and Megatron-LM's interpolation each name a scaling."""
    named, interpolation = given.rotary_scaling, given.rotary_seq_len_interpolation_factor
    if given.position_embedding_type == "yarn":
        if named not in ("none", "yarn"):
            yield (
                f"--position-embedding-type yarn and --rotary-scaling {named} ask for different scalings; use "
                "--position-embedding-type rope with the one that is meant."
            )
        named = "yarn"
    if interpolation is None or interpolation == 1:
        return
    if named not in ("none", "linear"):
        yield (
            f"--rotary-seq-len-interpolation-factor {interpolation:g} asks for linear scaling, and the scaling is "
            f"{named}; give one of them."
        )
    elif given.rotary_scaling_factor not in (None, interpolation):
        yield (
            f"--rotary-seq-len-interpolation-factor {interpolation:g} and --rotary-scaling-factor "
            f"{given.rotary_scaling_factor:g} ask for different factors; give one of them."
        )


def _without_reader(given: GivenModel, scaling: str) -> Iterator[str]:
    """Options that the scaling does not read; a factor of 1, which Megatron-LM's scripts give, asks for nothing."""
    for name, readers in _READ_BY.items():
        option = BY_NAME[name]
        value = vars(given)[name]
        is_factor_of_one = name == "rotary_scaling_factor" and value == 1
        if scaling not in readers and value != option.default and not is_factor_of_one:
            shown = f" {value:g}" if not isinstance(value, bool) else ""
            others = " or ".join(readers)
            yield (
                f"{option.spelling}{shown} has no effect with --rotary-scaling {scaling}; leave it out, or use "
                f"--rotary-scaling {others}."
            )


def _lacks(model: GivenModel, rotated: int) -> Iterator[str]:
    """What the formula of the scaling needs to be defined."""
    scaling, original = model.rotary_scaling, model.rotary_original_max_position_embeddings
    if scaling == "yarn" and original is None:
        yield (
            "--rotary-scaling yarn needs the length that the frequencies were trained at; give "
            "--rotary-original-max-position-embeddings (Megatron-LM takes 4096 where it is not given)."
        )
    elif scaling != "none" and model.rotary_scaling_factor is None:
        yield (
            f"--rotary-scaling {scaling} needs to know by how much the context is extended; give "
            "--rotary-scaling-factor, or --rotary-original-max-position-embeddings beside --max-position-embeddings."
        )
    if scaling == "yarn" and model.yarn_beta_fast <= model.yarn_beta_slow:
        yield (
            f"--yarn-beta-fast {model.yarn_beta_fast:g} must be above --yarn-beta-slow {model.yarn_beta_slow:g}; swap "
            "them, or leave them out for 32 and 1."
        )
    if scaling == "llama3" and model.rotary_high_freq_factor <= model.rotary_low_freq_factor:
        yield (
            f"--rotary-high-freq-factor {model.rotary_high_freq_factor:g} must be above --rotary-low-freq-factor "
            f"{model.rotary_low_freq_factor:g}; swap them, or leave them out for 4 and 1."
        )
    if scaling == "yarn" and model.rotary_base <= 1:
        yield f"--rotary-scaling yarn needs --rotary-base {model.rotary_base:g} above 1; use 10000 or more."
    if scaling == "ntk" and rotated == 2:
        yield (
            "--rotary-scaling ntk stretches the frequencies of a head between the first and the last, and there is one "
            "alone; use --rotary-scaling linear."
        )
