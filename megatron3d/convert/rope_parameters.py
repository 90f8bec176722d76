"""Rotary positions in a `config.json`: base and scaling there, and the options of ours that compute the same.

Version 5 of transformers has all in `rope_parameters`; earlier ones have `rope_theta` and, where frequencies are
scaled, `rope_scaling`. Both are read, and both are written.

Source: transformers' `modeling_rope_utils.py` (5.23), `standardize_rope_params` and the functions of each type.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron3d.config.rotary import ntk_base, rotary_attention_factor
from megatron3d.config.sections.model import ModelConfig
from megatron3d.convert.family import HfConfig
from megatron3d.errors import CheckpointError

_LENGTH = "original_max_position_embeddings"


def rotary_options(hf: HfConfig, *, positions: int, default_base: float = 10000.0) -> dict[str, Any]:
    """Fields of a model of ours with the rotary positions of a `config.json`.

    Args:
        hf: the whole `config.json`.
        positions: its `max_position_embeddings`.
        default_base: where it names none.

    Raises:
        CheckpointError: a value is out of range, or frequencies are scaled in a way that we do not compute.
    """
    parameters = hf.nested("rope_scaling" if hf.values.get("rope_scaling") else "rope_parameters")
    for place in (hf, parameters):
        place.expect("partial_rotary_factor", 1.0, 1, None)
    base = parameters.number("rope_theta", hf.number("rope_theta", default_base))
    if base <= 0:
        raise CheckpointError(f"{hf.path}: rope_theta {base} must be above 0; correct it")
    kind = parameters.values.get("rope_type", parameters.values.get("type", "default"))
    return {"rotary_base": base, **_scaling(kind, hf, parameters, positions)}


def _scaling(kind: object, hf: HfConfig, parameters: HfConfig, positions: int) -> dict[str, Any]:
    if kind == "default":
        return {}
    if kind == "linear":
        return {"rotary_scaling": "linear", "rotary_scaling_factor": _factor(parameters)}
    if kind == "llama3":
        return {
            "rotary_scaling": "llama3",
            "rotary_scaling_factor": _factor(parameters),
            "rotary_original_max_position_embeddings": _original(hf, parameters, positions),
            "rotary_low_freq_factor": _required(parameters, "low_freq_factor"),
            "rotary_high_freq_factor": _required(parameters, "high_freq_factor"),
        }
    if kind == "yarn":
        return _yarn(hf, parameters, positions)
    if kind == "dynamic":
        raise CheckpointError(
            f"{hf.path}: rope_type 'dynamic' rotates by other frequencies as a text grows, unlike the keys that it has "
            "in a cache; set rope_scaling to null for texts up to max_position_embeddings, which it does not scale, "
            "and extend these by a fine-tuning with --rotary-scaling ntk"
        )
    raise CheckpointError(
        f"{hf.path}: rope_type {kind!r:.60} cannot be converted; only default, linear, yarn and llama3 can"
    )


def _yarn(hf: HfConfig, parameters: HfConfig, positions: int) -> dict[str, Any]:
    original = _original(hf, parameters, positions)
    has_factor = parameters.values.get("factor") is not None
    options = {
        "rotary_scaling": "yarn",
        "rotary_scaling_factor": _factor(parameters) if has_factor else positions / original,
        "rotary_original_max_position_embeddings": original,
        "yarn_beta_fast": parameters.number("beta_fast", 0.0) or 32.0,
        "yarn_beta_slow": parameters.number("beta_slow", 0.0) or 1.0,
        "yarn_correction_range_round_to_int": parameters.flag("truncate", True),
    }
    if parameters.values.get("attention_factor") is not None:
        return {**options, "rotary_attention_factor": parameters.number("attention_factor", 1.0)}
    mscale, all_dims = (parameters.number(name, 0.0) for name in ("mscale", "mscale_all_dim"))
    # There either counts only beside the other; here each does.
    return {**options, "mscale": mscale, "mscale_all_dim": all_dims} if mscale and all_dims else options


def _original(hf: HfConfig, parameters: HfConfig, positions: int) -> int:
    outside = hf.integer(_LENGTH) if hf.values.get(_LENGTH) is not None else None
    return outside or parameters.integer(_LENGTH, positions)


def _factor(parameters: HfConfig) -> float:
    factor = _required(parameters, "factor")
    if factor < 1:
        raise CheckpointError(
            f"{parameters.path}: factor {factor:g} of the rotary scaling must be at least 1; correct it"
        )
    return factor


def _required(parameters: HfConfig, name: str) -> float:
    if parameters.values.get(name) is None:
        raise CheckpointError(f"{parameters.path}: the rotary scaling lacks {name}; add it")
    return parameters.number(name, 0.0)


def rope_fields(model: ModelConfig) -> dict[str, Any]:
    """The fields of `config.json` that say how a model of ours rotates.

    With ntk this is another base, which is the same function.
    """
    base = ntk_base(model) if model.rotary_scaling == "ntk" else model.rotary_base
    scaling = _scaling_there(model)
    return {
        "rope_parameters": {"rope_type": "default", **scaling, "rope_theta": base},
        "rope_scaling": scaling or None,
        "rope_theta": base,
    }


def _scaling_there(model: ModelConfig) -> dict[str, Any]:
    kind = model.rotary_scaling
    if kind in ("none", "ntk"):
        return {}
    values: dict[str, Any] = {"rope_type": kind, "factor": model.rotary_scaling_factor}
    if kind == "linear":
        return values
    values[_LENGTH] = model.rotary_original_max_position_embeddings
    if kind == "llama3":
        return values | {
            "low_freq_factor": model.rotary_low_freq_factor,
            "high_freq_factor": model.rotary_high_freq_factor,
        }
    return values | dict(_yarn_there(model))


def _yarn_there(model: ModelConfig) -> Mapping[str, Any]:
    """What differs from the values that transformers takes where none are given."""
    values: dict[str, Any] = {}
    if model.yarn_beta_fast != 32.0:
        values["beta_fast"] = model.yarn_beta_fast
    if model.yarn_beta_slow != 1.0:
        values["beta_slow"] = model.yarn_beta_slow
    if not model.yarn_correction_range_round_to_int:
        values["truncate"] = False
    if model.rotary_attention_factor is None and model.mscale and model.mscale_all_dim:
        return values | {"mscale": model.mscale, "mscale_all_dim": model.mscale_all_dim}
    if model.rotary_attention_factor is not None or (model.mscale, model.mscale_all_dim) != (1.0, 0.0):
        values["attention_factor"] = rotary_attention_factor(model)
    return values
