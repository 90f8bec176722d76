"""The kinds of Hugging Face models that are known, by their `model_type`, and which of them a model of ours is."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from megatron3d.config.architectures import named
from megatron3d.config.sections.model import ModelConfig
from megatron3d.convert.family import Family
from megatron3d.convert.maps.bert import BERT, MEGATRON_BERT
from megatron3d.convert.maps.gpt2 import GPT2
from megatron3d.convert.maps.llama import LLAMAS
from megatron3d.convert.maps.mixture import MIXTURES
from megatron3d.errors import ConfigError

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {f.model_type: f for f in (BERT, MEGATRON_BERT, GPT2, *LLAMAS, *MIXTURES)}
)


def family_of(model: ModelConfig, imported_as: object = None) -> Family:
    """The kind of model there that computes what ours does: of several the one that it was imported as.

    Raises:
        ConfigError: there is none, with what stands in the way of the nearest.
    """
    known = model.traits.hf_families
    if not known:
        raise ConfigError(
            f"no model of Hugging Face's is known to compute what {named(model.architecture)} computes, so it cannot "
            "be exported; its architecture would name one in hf_families"
        )
    misfits = {kind: FAMILIES[kind].misfits(model) for kind in known}
    if isinstance(imported_as, str) and misfits.get(imported_as) == []:
        return FAMILIES[imported_as]
    nearest = min(reversed(misfits), key=lambda kind: len(misfits[kind]))  # of two as near the later, which has more
    if misfits[nearest]:
        raise ConfigError(
            f"no model of Hugging Face's that we know computes the same: the nearest is {nearest}, but here "
            f"{', '.join(misfits[nearest])}; train with options that it has, to export"
        )
    return FAMILIES[nearest]
