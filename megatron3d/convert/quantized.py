"""Quantized weights are refused by name: their integers and 8-bit floats are not the weights but stand for them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from megatron3d.convert.family import HfConfig
from megatron3d.errors import CheckpointError

if TYPE_CHECKING:
    from megatron3d.convert.directory import StoredWeight

# Fields of a config.json under which quantizers describe what they did.
_DESCRIPTIONS = ("quantization_config", "compression_config", "quantization")
# Tensors that hold what quantizers need beside the weights: bitsandbytes, GPTQ, AWQ, fp8 and compressed-tensors.
_ADDED = re.compile(
    r".*\.(SCB|absmax|quant_map|quant_state\..*|qweight|qzeros|scales|g_idx|weight_packed|weight_shape|"
    r"(weight|input|k|v|activation)_(scale|zero_point|global_scale|scale_inv))"
)
_WEIGHT_DTYPES = ("float64", "float32", "float16", "bfloat16")
_REMEDY = "give a directory of the model before it was quantized, or dequantize it there and save it again"


def refuse_quantized(config: HfConfig, weights: Mapping[str, StoredWeight], derived: Iterable[str]) -> None:
    """Refuse a directory whose weights are quantized.

    Args:
        config: its `config.json`.
        weights: its tensors by name.
        derived: patterns of names whose tensors are no weights and may be of any type.

    Raises:
        CheckpointError: `config.json` describes a quantization, or a tensor is not of a floating-point type of 16 bits
            or more.
    """
    for name in _DESCRIPTIONS:
        described = config.values.get(name)
        if described:
            method = described.get("quant_method", described) if isinstance(described, dict) else described
            raise CheckpointError(f"{config.path} has {name} ({method!r:.60}): its weights are quantized; {_REMEDY}")
    for name, stored in weights.items():
        if any(re.fullmatch(pattern, name) for pattern in derived):
            continue
        if stored.dtype not in _WEIGHT_DTYPES or _ADDED.fullmatch(name):
            raise CheckpointError(
                f"{stored.file}: the tensor {name} is {stored.dtype}, as in quantized weights, and weights are "
                f"{', '.join(_WEIGHT_DTYPES)}; {_REMEDY}"
            )
