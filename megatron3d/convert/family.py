"""Family: all that conversion must know of one kind of Hugging Face model, as a value; and its `config.json`, read.

A family is a row of functions between `config.json` and `ModelConfig`, and the rows of its tensors. The files in
`maps/` are these values and nothing else; `hf.py` does the work with whichever fits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron3d.config.sections.model import ModelConfig
from megatron3d.convert.rows import Component, TensorRule
from megatron3d.errors import CheckpointError
from megatron3d.files.json_text import is_whole_number

_MOST = 2**31 - 1  # of the sizes of a model
# transformers' names of plain activations; the first of each of ours is the one that is written.
_ACTIVATIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "gelu": ("gelu", "gelu_python"),
        "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
        "relu": ("relu",),
        "squared_relu": ("relu2",),
        "silu": ("silu", "swish"),
    }
)
# transformers' name of the activation inside a gated MLP.
_GATES: Mapping[str, str] = MappingProxyType({"swiglu": "silu", "geglu": "gelu", "reglu": "relu"})


@dataclass(frozen=True)
class HfConfig:
    """The values of a `config.json`, with its path for messages."""

    path: Path
    values: Mapping[str, Any]

    def integer(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number from `least` up. Raises: CheckpointError if it is missing without a default, or no such."""
        value = self.values.get(name)
        value = default if value is None else value
        if value is None or not is_whole_number(value, least, _MOST):
            raise CheckpointError(
                f"{self.path}: {name} is {value!r:.60} and must be a whole number from {least} to {_MOST}; correct it"
            )
        return int(value)

    def number(self, name: str, default: float) -> float:
        """A number from 0 up. Raises: CheckpointError if it is none."""
        value = self.values.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= sys.float_info.max:
            raise CheckpointError(f"{self.path}: {name} is {value!r:.60} and must be a number from 0 up; correct it")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """A truth value. Raises: CheckpointError if it is something else."""
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.path}: {name} is {value!r:.60} and must be true or false; correct it")
        return value

    def nested(self, name: str) -> HfConfig:
        """The object under `name`, empty where there is none. Raises: CheckpointError if it is something else."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise CheckpointError(f"{self.path}: {name} is {value!r:.60} and must be an object; correct it")
        return HfConfig(self.path, value or {})

    def labels(self) -> dict[str, str]:
        """Names of the classes of a classifier by their numbers; empty where none are given.

        Raises:
            CheckpointError: `id2label` is no object of names by numbers.
        """
        values = self.nested("id2label").values
        wrong = [key for key, label in values.items() if not (key.isdecimal() and isinstance(label, str | int))]
        if wrong:
            raise CheckpointError(
                f"{self.path}: id2label has {wrong[0]!r:.40} for {values[wrong[0]]!r:.40}, and must have names by the "
                "numbers of the classes; correct it"
            )
        return {key: str(label) for key, label in values.items()}

    def expect(self, name: str, *allowed: Any) -> None:
        """Refuse a model that computes something else than ours does; a field that is not there is taken as fine.

        Raises:
            CheckpointError: the field has another value.
        """
        value = self.values.get(name)
        if name in self.values and value not in allowed:
            wanted = " or ".join(map(repr, allowed))
            raise CheckpointError(
                f"{self.path}: a model with {name} {value!r:.60} cannot be converted; only {wanted} can"
            )

    def activation(self, name: str, default: str) -> str:
        """Our name of a plain activation. Raises: CheckpointError for one that we do not have."""
        value = self.values.get(name, default)
        for ours, theirs in _ACTIVATIONS.items():
            if value in theirs:
                return ours
        known = ", ".join(one for names in _ACTIVATIONS.values() for one in names)
        raise CheckpointError(f"{self.path}: {name} {value!r:.60} cannot be converted; only {known} can")


@dataclass(frozen=True)
class Family:
    """One kind of model there.

    Attributes:
        model_type: as `config.json` calls it.
        prefix: what the names of the bare model (without heads) leave out.
        to_model: our shape of the model that a `config.json` describes; raises CheckpointError for what we do not
            compute.
        to_hf: the fields of `config.json` that follow from our shape.
        misfits: what of our model has no place there, each as an option and its value; empty if all has.
        rows: the tensors of the model, given also how many classes its classifier has.
        class_name: transformers' class that has exactly these components.
        derived: patterns of names whose tensors follow from the others (masks, copies of a tied table).
        for_training: patterns of our names whose tensors only training reads, and which therefore do not leave.
        copies: tensors that are written a second time under another name: there -> of which; given the model.
        tied: tensors of a tied model that its files may have too and that must then be equal: there -> to which.
    """

    model_type: str
    prefix: str
    to_model: Callable[[HfConfig], ModelConfig]
    to_hf: Callable[[ModelConfig], dict[str, Any]]
    misfits: Callable[[ModelConfig], list[str]]
    rows: Callable[[ModelConfig, int], list[TensorRule]]
    class_name: Callable[[frozenset[Component]], str]
    derived: tuple[str, ...] = ()
    for_training: tuple[str, ...] = ()
    copies: Callable[[ModelConfig], Mapping[str, str]] = field(default=lambda model: {})
    tied: Mapping[str, str] = field(default_factory=dict)


def activation_there(ours: str) -> str:
    """transformers' name of a plain activation of ours."""
    return _ACTIVATIONS[ours][0]


def gate_there(ours: str) -> str:
    """transformers' name of the activation inside a gated MLP of ours."""
    return _GATES[ours]


def gated(hf_name: object, config: HfConfig) -> str:
    """Our name of a gated MLP whose activation transformers calls so. Raises: CheckpointError for an unknown one."""
    found = [ours for ours, theirs in _GATES.items() if theirs == hf_name]
    if not found:
        raise CheckpointError(
            f"{config.path}: hidden_act {hf_name!r:.60} cannot be converted; only {', '.join(_GATES.values())} can"
        )
    return found[0]


def check_num_layers(model: ModelConfig, num_tensors: int, path: Path) -> None:
    """Refuse more layers than there are tensors, before anything is made for each of them.

    Raises:
        CheckpointError: there are more; `path` is the file that says so.
    """
    if model.num_layers > num_tensors:
        raise CheckpointError(
            f"{path} describes a model of {model.num_layers} layers, but only {num_tensors} tensors are there; put the "
            "description and the weights of one model together"
        )


def option_misfits(model: ModelConfig, expected: Mapping[str, Any]) -> list[str]:
    """Fields of the model that do not have the value that a family needs, each as `--option value (only value)`."""
    found = []
    for name, wanted in expected.items():
        value = vars(model)[name]
        allowed = wanted if isinstance(wanted, tuple) else (wanted,)
        if value not in allowed:
            found.append(f"{name} {value} (there only {' or '.join(map(str, allowed))})")
    return found
