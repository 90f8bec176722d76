"""The optimizers a run can choose from, and what others must know of each: the state it keeps, what an element needs.

Checks, memory predictions and offloading read this table, so that an optimizer is described once, here, and built in
`optim/build.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class UpdateRule:
    """One optimizer.

    Attributes:
        states: the tensors with an element for each element of a parameter, by torch's names; `exp_avg` has the dtype
            of --exp-avg-dtype, `exp_avg_sq` that of --exp-avg-sq-dtype, all others are fp32.
        is_elementwise: whether the update of an element needs that element alone. Other optimizers exchange parts of
            full parameters between ranks in every step, which a GPU's collectives cannot do in host memory.
        scratch_numbers: fp32 numbers for each element of a chunk that an update holds beside state and gradient.
    """

    states: tuple[str, ...]
    is_elementwise: bool = True
    scratch_numbers: int = 0


# Of adafactor and muon, `states` leaves out what depends on a parameter's shape.
UPDATE_RULES: Mapping[str, UpdateRule] = MappingProxyType(
    {
        "adam": UpdateRule(("exp_avg", "exp_avg_sq")),
        "adamw": UpdateRule(("exp_avg", "exp_avg_sq")),
        "sgd": UpdateRule(("momentum_buffer",)),
        "lion": UpdateRule(("exp_avg",), scratch_numbers=1),
        "adafactor": UpdateRule((), is_elementwise=False),
        "lamb": UpdateRule(("exp_avg", "exp_avg_sq"), is_elementwise=False, scratch_numbers=2),
        "muon": UpdateRule(("momentum_buffer",), is_elementwise=False),
    }
)


def optimizers_with(state: str) -> tuple[str, ...]:
    """The optimizers that keep such a state for each element."""
    return tuple(name for name, rule in UPDATE_RULES.items() if state in rule.states)


def elementwise_optimizers() -> tuple[str, ...]:
    """The optimizers whose update of an element needs that element alone."""
    return tuple(name for name, rule in UPDATE_RULES.items() if rule.is_elementwise)
