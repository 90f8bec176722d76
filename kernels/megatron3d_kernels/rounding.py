"""Rounding of slowly moving averages to bf16 by a threshold that runs evenly through the interval from step to step.

A running average with coefficient 0.999 moves by a thousandth of itself at a step, and two neighbours in bf16 are four
to eight thousandths apart: rounded to the nearest, the second moment of Adam could rise but never fall. So a value is
rounded up at as many steps in a row as it lies far from the lower neighbour: the threshold runs through the van der
Corput sequence, which fills the interval evenly. It depends on the step alone, so a layout changes no bit.

Source: stochastic rounding as in Zamirai et al. 2021, section 4, with a threshold that is not random.
"""

from __future__ import annotations

import torch

_LOW_BITS = 16  # of an fp32 number that bf16 leaves out


def threshold(count: int) -> int:
    """The `count`-th number of the van der Corput sequence in base 2, as an integer of 16 bits."""
    return int(f"{count % (1 << _LOW_BITS):0{_LOW_BITS}b}"[::-1], 2)


def store_bf16(stored: torch.Tensor, values: torch.Tensor, *, count: int) -> None:
    """Store fp32 `values` at step `count`, using them up; nothing where `stored` is fp32, and so is `values` itself."""
    if stored.dtype == torch.float32:
        assert stored.data_ptr() == values.data_ptr(), "an fp32 moment is changed in place"
        return
    # Added to the bits of a number, the threshold carries into those that bf16 keeps where the rest is large enough.
    values.view(torch.int32).add_(threshold(count)).bitwise_and_(-(1 << _LOW_BITS))
    stored.copy_(values)
