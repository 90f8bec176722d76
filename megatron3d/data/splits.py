"""`--split`: which documents of a corpus are for training, validation and test."""

from __future__ import annotations

import math

from megatron3d.errors import ConfigError

SPLIT_NAMES = ("train", "valid", "test")


def parse_split(text: str) -> tuple[float, float, float]:
    """The three shares of a split like "969,30,1", summing to 1; missing ones are 0.

    Raises: ConfigError if these are not one to three numbers from 0 up with a positive sum.
    """
    try:
        shares = [float(word) for word in text.replace("/", ",").split(",") if word.strip()]
    except ValueError:
        shares = []
    total = sum(shares)
    if not 1 <= len(shares) <= 3 or min(shares) < 0 or not math.isfinite(total) or total <= 0:
        raise ConfigError(
            f"--split {text!r} is not one to three numbers from 0 up with a positive sum; give the shares of the "
            f"documents for training, validation and test, such as 969,30,1."
        )
    train, valid, test = (share / total for share in [*shares, 0.0, 0.0][:3])
    return train, valid, test


def split_documents(num_documents: int, split: str) -> tuple[range, range, range]:
    """Cut range(num_documents) in three; each bound is the rounded share of all before it, as in Megatron-LM."""
    train, valid, _ = parse_split(split)
    # a sum such as 0.969 + 0.03 + 0.001 may miss 1 by a rounding error: the last bound is set, not computed
    first_bound = round(train * num_documents)
    second_bound = round((train + valid) * num_documents)
    return range(first_bound), range(first_bound, second_bound), range(second_bound, num_documents)
