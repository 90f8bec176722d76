"""The models by the name of their architecture: what they are called and who builds their stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from megatron3d.config.sections.model import ModelConfig
from megatron3d.config.sections.train import TrainConfig
from megatron3d.models.bert import build_bert_stage
from megatron3d.models.gpt import build_gpt_stage
from megatron3d.models.stage import Stage, StagePart
from megatron3d.tensor.context import LayerContext

StageBuilder = Callable[[ModelConfig, TrainConfig, StagePart, LayerContext], Stage]

TITLES: Mapping[str, str] = MappingProxyType({"gpt": "GPT", "bert": "BERT"})
BUILDERS: Mapping[str, StageBuilder] = MappingProxyType({"gpt": build_gpt_stage, "bert": build_bert_stage})
