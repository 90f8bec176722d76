"""The models by the name of their architecture: one record for each, from which everything that differs is read.

A decoder is added with its module, a record here and its traits in `config/architectures.py`; or from outside, with
one file that has an `Architecture` (CONTRIBUTING.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from types import MappingProxyType
from typing import Protocol

from megatron3d.config.architectures import ARCHITECTURES, DescribedArchitecture, load_architecture
from megatron3d.config.sections.model import ModelConfig
from megatron3d.config.sections.train import TrainConfig
from megatron3d.models.bert import build_bert_stage
from megatron3d.models.bert_classifier import build_bert_classifier_stage
from megatron3d.models.bert_encoder import build_bert_encoder_stage
from megatron3d.models.gpt import build_gpt_stage
from megatron3d.models.stage import Stage, StageBuilder, StagePart
from megatron3d.tensor.context import LayerContext


class ClassifierBuilder(Protocol):
    """Builds one stage of a model that scores whole texts."""

    def __call__(
        self, config: ModelConfig, train: TrainConfig, part: StagePart, context: LayerContext, *, num_outputs: int
    ) -> Stage:
        """As `StageBuilder`; `num_outputs` is the number of classes, or 1 for a regression."""
        ...


class EncoderBuilder(Protocol):
    """Builds one stage of a model that gives a vector for each token."""

    def __call__(
        self, config: ModelConfig, train: TrainConfig, part: StagePart, context: LayerContext, *, with_pooler: bool
    ) -> Stage:
        """As `StageBuilder`; `with_pooler` gives the last stage the pooler too."""
        ...


@dataclass(frozen=True)
class Architecture(DescribedArchitecture):
    """One family of models.

    Attributes:
        traits: what options, samples and reports must know of it.
        build_stage: makes the stages of pretraining, which declare its parameters and its losses.
        build_classifier: makes those that score whole texts, of the same encoder; None where it learns no tasks.
        build_encoder: makes those that give a vector for each token, which end in an `EncoderHead`; None where it gives
            none.
    """

    build_stage: StageBuilder
    build_classifier: ClassifierBuilder | None = None
    build_encoder: EncoderBuilder | None = None

    def problems(self) -> list[str]:
        """A clause for each thing that is wrong with it: its traits, and builders that cannot be called as they are."""
        found = [_builder_problem("build_stage", self.build_stage)]
        if self.build_classifier is not None:
            found.append(_builder_problem("build_classifier", self.build_classifier, "num_outputs"))
        if self.build_encoder is not None:
            found.append(_builder_problem("build_encoder", self.build_encoder, "with_pooler"))
        return [*self.wrong_traits(), *(problem for problem in found if problem is not None)]


def _builder_problem(field: str, builder: object, *keywords: str) -> str | None:
    """What is wrong with a builder, which may be anything in a user's file."""
    wanted = ", ".join(("config, train, part, context", *(f"{keyword}=..." for keyword in keywords)))
    if not callable(builder):
        return f"{field} is {builder!r:.80}; use a function that is called with ({wanted})"
    try:
        signature(builder).bind(None, None, None, None, **dict.fromkeys(keywords))
    except ValueError:  # of a callable that was not written in Python nothing is known
        return None
    except TypeError as error:
        return f"{field} cannot be called with ({wanted}): {error}; change what it takes"
    return None


ZOO: Mapping[str, Architecture] = MappingProxyType(
    {
        "gpt": Architecture(ARCHITECTURES["gpt"], build_gpt_stage),
        "bert": Architecture(
            ARCHITECTURES["bert"], build_bert_stage, build_bert_classifier_stage, build_bert_encoder_stage
        ),
    }
)


def architecture_of(model: ModelConfig) -> Architecture:
    """The record of a model's architecture: one of `ZOO`, or one from a user's own file.

    Raises: ConfigError if there is none of that name.
    """
    name = model.architecture
    found = ZOO[name] if name in ZOO else load_architecture(name)
    assert isinstance(found, Architecture), f"{name}, which builds no layers, is refused when it is loaded"
    return found
