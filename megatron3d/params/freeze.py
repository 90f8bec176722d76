"""Freezing: parameters whose full names match a pattern do not train.

This is a pass: a function that changes declared modules while they are on the meta device, after the model has been
built and before its parameters get memory. A pass may replace specs, as here, and modules: an adapter replaces a linear
layer by one that has it as a child and declares its own small matrices, and everything that is derived from specs
(buffers, gradients, the optimizer, checkpoints, the memory ledger) follows.

Patterns are those of a shell, over full names such as `layers.3.mlp.up.weight`: `*` stands for any characters, dots
too, `?` for one, and `[0-3]` for one of a set.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn

from megatron3d.errors import ConfigError
from megatron3d.params.module import declared_parameters

_LISTED = 6  # names of parameters in a message


def is_frozen(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns matches a parameter's full name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def freeze(root: nn.Module, patterns: Sequence[str]) -> None:
    """Declare the parameters below `root` that a pattern matches as ones that do not train."""
    for name, declared in declared_parameters(root).items() if patterns else ():
        if is_frozen(name, patterns):
            owner, attribute = declared.owner, declared.attribute
            owner.specs[attribute] = replace(owner.specs[attribute], trains=False)
            declared.parameter.requires_grad_(False)


def require_sensible(patterns: Sequence[str], names: Collection[str]) -> None:
    """Check patterns against the full names of all parameters of a model.

    Raises:
        ConfigError: a pattern matches none of them, or nothing is left that trains; with all problems.
    """
    problems = [
        f"--freeze-params {pattern} matches no parameter of this model; its names are such as {_examples(names)}."
        for pattern in patterns
        if not any(fnmatchcase(name, pattern) for name in names)
    ]
    if patterns and all(is_frozen(name, patterns) for name in names):
        problems.append(
            f"--freeze-params {' '.join(patterns)} matches every parameter, so that nothing trains; leave some out."
        )
    if problems:
        raise ConfigError("\n".join(problems))


def _examples(names: Collection[str]) -> str:
    """One name of each kind of module, the first ones."""
    kinds = {name.split(".")[0] + name.split(".")[-2]: name for name in reversed([*names])}
    return ", ".join([*reversed(kinds.values())][:_LISTED])
