"""Family: all that conversion must know of one kind of Hugging Face model, as a value; and its `config.json`, read.

A family is a row of functions between `config.json` and `ModelConfig`, and the rows of its tensors. The files in
`maps/` are these values and nothing else; `hf.py` does the work with whichever fits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron3d.config.model import ModelConfig
from megatron3d.convert.rows import Piece, Row
from megatron3d.errors import CheckpointError

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

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive whole number. Raises: CheckpointError if it is missing without a default, or no such number."""
        value = self.values.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{self.path}: {name} is {value!r} and must be a whole number from 1 up; correct it")
        return value

    def number(self, name: str, default: float) -> float:
        """A number from 0 up. Raises: CheckpointError if it is none."""
        value = self.values.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise CheckpointError(f"{self.path}: {name} is {value!r} and must be a number from 0 up; correct it")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """A truth value."""
        value = self.values.get(name)
        return default if value is None else bool(value)

    def expect(self, name: str, *allowed: Any) -> None:
        """Refuse a model that computes something else than ours does; a field that is not there is taken as fine.

        Raises:
            CheckpointError: the field has another value.
        """
        value = self.values.get(name)
        if name in self.values and value not in allowed:
            wanted = " or ".join(map(repr, allowed))
            raise CheckpointError(f"{self.path}: a model with {name} {value!r} cannot be converted; only {wanted} can")

    def activation(self, name: str, default: str) -> str:
        """Our name of a plain activation. Raises: CheckpointError for one that we do not have."""
        value = self.values.get(name, default)
        for ours, theirs in _ACTIVATIONS.items():
            if value in theirs:
                return ours
        known = ", ".join(one for names in _ACTIVATIONS.values() for one in names)
        raise CheckpointError(f"{self.path}: {name} {value!r} cannot be converted; only {known} can")


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
        class_name: transformers' class that has exactly these pieces.
        derived: patterns of names whose tensors follow from the others (masks, copies of a tied table).
        copies: tensors that are written a second time under another name: there -> of which; given the model.
    """

    model_type: str
    prefix: str
    to_model: Callable[[HfConfig], ModelConfig]
    to_hf: Callable[[ModelConfig], dict[str, Any]]
    misfits: Callable[[ModelConfig], list[str]]
    rows: Callable[[ModelConfig, int], list[Row]]
    class_name: Callable[[frozenset[Piece]], str]
    derived: tuple[str, ...] = ()
    copies: Callable[[ModelConfig], Mapping[str, str]] = field(default=lambda model: {})


def activation_there(ours: str) -> str:
    """transformers' name of a plain activation of ours."""
    return _ACTIVATIONS[ours][0]


def gate_there(ours: str) -> str:
    """transformers' name of the activation inside a gated MLP of ours."""
    return _GATES[ours]


def gated(hf_name: str, config: HfConfig) -> str:
    """Our name of a gated MLP whose activation transformers calls so. Raises: CheckpointError for an unknown one."""
    found = [ours for ours, theirs in _GATES.items() if theirs == hf_name]
    if not found:
        raise CheckpointError(
            f"{config.path}: hidden_act {hf_name!r} cannot be converted; only {', '.join(_GATES.values())} can"
        )
    return found[0]


def option_misfits(model: ModelConfig, expected: Mapping[str, Any]) -> list[str]:
    """Fields of the model that do not have the value that a family needs, each as `--option value (only value)`."""
    found = []
    for name, wanted in expected.items():
        value = vars(model)[name]
        allowed = wanted if isinstance(wanted, tuple) else (wanted,)
        if value not in allowed:
            found.append(f"{name} {value} (there only {' or '.join(map(str, allowed))})")
    return found
