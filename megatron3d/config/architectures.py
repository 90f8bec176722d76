"""The architectures by name, with what options, samples and reports must know of each; nothing here needs torch.

`models/zoo.py` has the layers that go with each of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Literal

from megatron3d.config.activations import ACTIVATIONS
from megatron3d.errors import ConfigError
from megatron3d.files.user_code import is_user_code, load_user_object, located

SampleKind = Literal["tokens", "sentences"]

_SCRIPTS: Mapping[SampleKind, str] = MappingProxyType({"tokens": "pretrain_gpt.py", "sentences": "pretrain_bert.py"})


@dataclass(frozen=True)
class ModelTraits:
    """What is known of an architecture besides its layers. The defaults are those of a decoder.

    Attributes:
        title: what reports and messages call it.
        samples: what it learns from: "tokens", rows of tokens of which each is predicted from those before it, or
            "sentences", pairs of sentences with masked tokens.
        is_causal: whether a token attends to those before it alone, where no mask says otherwise.
        activation: that of its MLP by default.
        own_options: fields of `ModelConfig` that have a meaning here and in no architecture that does not name them.
        hf_families: which of Hugging Face's models, by `model_type`, compute the same with the right options.
        presets: how the names of its published models begin that tools/estimate.py compares by default.
    """

    title: str
    samples: SampleKind = "tokens"
    is_causal: bool = True
    activation: str = "gelu_tanh"
    own_options: frozenset[str] = frozenset()
    hf_families: tuple[str, ...] = ()
    presets: tuple[str, ...] = ()

    @property
    def script(self) -> str:
        """The program that trains it."""
        return _SCRIPTS[self.samples]

    def problems(self) -> list[str]:
        """A clause for each field of a user's own that has no meaning: the field, its value, and what it may be."""
        families = tuple(family for traits in ARCHITECTURES.values() for family in traits.hf_families)
        wrong = {
            "title": None if _is_text(self.title) else "a text that is not empty",
            "samples": None if self.samples in tuple(_SCRIPTS) else f"one of {', '.join(_SCRIPTS)}",
            "is_causal": None if isinstance(self.is_causal, bool) else "True or False",
            "activation": None if self.activation in ACTIVATIONS else f"one of {', '.join(ACTIVATIONS)}",
            "own_options": _unless_of(self.own_options, frozenset, sorted(SPECIAL_OPTIONS)),
            "hf_families": _unless_of(self.hf_families, tuple, families),
            "presets": None if self.presets == () else "(), since only the project's own architectures have presets",
        }
        return [
            f"{name} of its traits is {vars(self)[name]!r:.80}; use {allowed}"
            for name, allowed in wrong.items()
            if allowed is not None
        ]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value.strip() != ""


def _unless_of(value: object, kind: type, names: Sequence[str]) -> str | None:
    """What is allowed, unless the value is a collection of that kind with these names alone."""
    is_right = isinstance(value, kind) and isinstance(value, Collection) and all(one in names for one in value)
    return None if is_right else f"a {kind.__name__} of none or some of {', '.join(names)}"


@dataclass(frozen=True)
class DescribedArchitecture:
    """What has the traits of an architecture; `models/zoo.Architecture` adds its layers."""

    traits: ModelTraits

    def problems(self) -> list[str]:
        """A clause for each thing that is wrong with it; without layers nothing can be trained."""
        return [
            f"it is a {type(self).__name__}, which builds no layers; make it a megatron3d.models.zoo.Architecture",
            *self.wrong_traits(),
        ]

    def wrong_traits(self) -> list[str]:
        """The same of the traits."""
        if isinstance(self.traits, ModelTraits):
            return self.traits.problems()
        return [f"traits is {self.traits!r:.80}; use a megatron3d.config.architectures.ModelTraits"]


ARCHITECTURES: Mapping[str, ModelTraits] = MappingProxyType(
    {
        "gpt": ModelTraits(
            "GPT",
            own_options=frozenset({"num_experts"}),
            hf_families=("gpt2", "mistral", "qwen2", "qwen3", "llama", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe"),
            presets=("gpt3", "megatron"),
        ),
        "bert": ModelTraits(
            "BERT",
            samples="sentences",
            is_causal=False,
            activation="gelu",
            own_options=frozenset({"norm_position", "bert_binary_head", "num_token_types"}),
            hf_families=("bert", "megatron-bert"),
            presets=("bert", "megatron-bert"),
        ),
    }
)
SPECIAL_OPTIONS: frozenset[str] = frozenset().union(*(traits.own_options for traits in ARCHITECTURES.values()))


def traits_of(architecture: str) -> ModelTraits:
    """What is known of an architecture; one of the user's own, `module:NAME` or `path/to/file.py:NAME`, runs its file.

    Raises: ConfigError if there is none of that name.
    """
    if architecture in ARCHITECTURES:
        return ARCHITECTURES[architecture]
    return load_architecture(architecture).traits


def named(architecture: str) -> str:
    """An architecture as the object of a sentence; one of the user's own goes by its name, not by its title."""
    known = ARCHITECTURES.get(architecture)
    return f"the model of --architecture {architecture}" if known is None else f"a {known.title}"


def how_to_train(architecture: str, instead_of: str) -> str:
    """What to do to train one architecture where another is asked for."""
    script = traits_of(architecture).script
    return f"use {script}" if script != traits_of(instead_of).script else f"give --architecture {architecture}"


def load_architecture(name: str) -> DescribedArchitecture:
    """An architecture from a user's own file, which a process runs and checks once.

    Raises: ConfigError if the file or module cannot be loaded, has no architecture of that name, or one whose fields
        have no meaning; with all of these.
    """
    if not is_user_code(name):
        own = name if name.endswith(".py") else "path/to/file.py"
        raise ConfigError(
            f"--architecture {name} is not known; use one of: {', '.join(ARCHITECTURES)}, or {own}:NAME for one of "
            "your own."
        )
    return _loaded(located(name))


@cache  # layers ask for traits, and the file may be gone by then
def _loaded(name: str) -> DescribedArchitecture:
    found = load_user_object("--architecture", name, "Architecture", lambda one: isinstance(one, DescribedArchitecture))
    assert isinstance(found, DescribedArchitecture), f"{name} is a {type(found).__name__}"
    if problems := found.problems():
        raise ConfigError("\n".join(f"--architecture {name}: {problem}." for problem in problems))
    return found
