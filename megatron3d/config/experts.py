"""What the options of experts mean: which layers have some, and how many, and which losses balance them.

Source: Megatron-LM's `--moe-layer-freq` for numbers and lists.
"""

from __future__ import annotations

import ast
import re
from functools import lru_cache

from megatron3d.config.sections.experts import BALANCE_LOSSES, DEFAULT_BALANCE_COEFFICIENT

_LONGEST = 4096  # layers of a list; a text such as [1]*10**9 would fill the memory
_SLICE = re.compile(r"[0-9]*::[0-9]*")


@lru_cache(maxsize=64)
def expert_layers(frequency: str, num_layers: int) -> tuple[bool, ...]:
    """Which layers have experts, by `--moe-layer-freq`: layers 0, n, 2n ... for a number, those of a slice such as
    1::2, else those with a 1.

    Raises:
        ValueError: the text is neither a positive number nor such a list; its message is what is wrong, a clause.
    """
    if frequency.strip().isdecimal():
        every = int(frequency)
        if every < 1:
            raise ValueError("counts layers from 1 on")
        return tuple(layer % every == 0 for layer in range(num_layers))
    if _SLICE.fullmatch(frequency.strip()):
        first, _, every = (int(word) if word else None for word in frequency.strip().split(":"))
        if every == 0:
            raise ValueError("counts layers from 1 on")
        chosen = range(num_layers)[first::every]
        return tuple(layer in chosen for layer in range(num_layers))
    try:
        pattern = _value(ast.parse(frequency.strip(), mode="eval").body)
    except (SyntaxError, RecursionError):
        pattern = None
    if not isinstance(pattern, list) or not all(one in (0, 1) for one in pattern):
        raise ValueError("is no number, no slice such as 1::2 and no list of zeros and ones such as ([0]*3+[1]*9)")
    if len(pattern) != num_layers:
        raise ValueError(f"is about {len(pattern)} layers, and there are {num_layers}")
    return tuple(one == 1 for one in pattern)


def _value(node: ast.expr) -> list[int] | int | None:
    """A list, a number, or a sum or product of them; None for anything else."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, int) and not isinstance(node.value, bool) else None
    if isinstance(node, ast.List):
        values = [_value(one) for one in node.elts]
        return [one for one in values if isinstance(one, int)] if all(isinstance(one, int) for one in values) else None
    if not isinstance(node, ast.BinOp):
        return None
    left, right = _value(node.left), _value(node.right)
    if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
        return [*left, *right]
    if isinstance(node.op, ast.Mult):
        many, times = (left, right) if isinstance(left, list) else (right, left)
        if isinstance(many, list) and isinstance(times, int) and len(many) * times <= _LONGEST:
            return many * times
    return None


def experts_by_layer(counts: tuple[str, ...], has_experts: tuple[bool, ...]) -> tuple[int, ...]:
    """How many experts each layer has, by `--num-experts` with several numbers, those of the layers with experts.

    Raises:
        ValueError: a word is no number of experts, or there are not as many as such layers; its message is what is
            wrong, a clause.
    """
    wrong = [word for word in counts if not (word.isdecimal() and int(word) > 1)]
    if wrong:
        raise ValueError(f"has {wrong[0]}, and each layer with experts has at least 2")
    if len(counts) != sum(has_experts):
        raise ValueError(f"has {len(counts)} numbers for the {sum(has_experts)} layers with experts (--moe-layer-freq)")
    given = iter(counts)
    return tuple(int(next(given)) if has else 0 for has in has_experts)


def balance_losses(kinds: tuple[str, ...], coefficients: tuple[str, ...]) -> tuple[tuple[str, float], ...]:
    """The losses that balance the load, with the weight of each; those of weight 0 are left out.

    Raises:
        ValueError: a kind or a weight is none, or there are not as many of these as of those; its message is a sentence
            without a full stop.
    """
    names = kinds or BALANCE_LOSSES[:1]
    if names == ("none",):
        return ()
    if "none" in names:
        raise ValueError(
            f"--moe-router-load-balancing-type {' '.join(names)} asks for losses and for none; give none alone, or "
            "leave it out"
        )
    unknown = [name for name in names if name not in BALANCE_LOSSES]
    if unknown:
        raise ValueError(
            f"--moe-router-load-balancing-type {' '.join(unknown)} is not among the losses of this version; use some "
            f"of {', '.join(BALANCE_LOSSES)}, or none"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"--moe-router-load-balancing-type {' '.join(names)} names a loss twice; name it once")
    texts = coefficients or (str(DEFAULT_BALANCE_COEFFICIENT),) * len(names)
    if len(texts) != len(names):
        raise ValueError(
            f"--moe-aux-loss-coeff {' '.join(texts)} has {len(texts)} weights for the {len(names)} losses of "
            f"--moe-router-load-balancing-type ({', '.join(names)}); give one for each"
        )
    weights = [_weight(text) for text in texts]
    return tuple((name, weight) for name, weight in zip(names, weights, strict=True) if weight)


def _weight(word: str) -> float:
    try:
        weight = float(word)
    except ValueError:
        weight = -1.0
    if not 0.0 <= weight < float("inf"):
        raise ValueError(f"--moe-aux-loss-coeff {word} is no weight of a loss; give a number of at least 0")
    return weight
