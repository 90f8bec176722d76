"""The models by the name of their architecture: what they are called and who builds their stages."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from megatron3d.models.bert import build_bert_stage
from megatron3d.models.gpt import build_gpt_stage
from megatron3d.models.stage import StageBuilder

TITLES: Mapping[str, str] = MappingProxyType({"gpt": "GPT", "bert": "BERT"})
BUILDERS: Mapping[str, StageBuilder] = MappingProxyType({"gpt": build_gpt_stage, "bert": build_bert_stage})
