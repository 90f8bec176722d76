"""Refusing to save what is not finite: a checkpoint with a NaN in it can only spread the NaN.

A step looks at its loss and gradients, which are those of the weights before the update; what the update made of the
weights and of the optimizer's state is looked at here, on its way into a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron3d.errors import NumericsError
from megatron3d.params.boxes import ShardView

_NAMES_SHOWN = 3


def require_finite(tensors: Mapping[str, ShardView], *, step: int, root: Path) -> None:
    """Look at everything that this rank is about to save.

    Args:
        tensors: what a checkpoint will hold, by its names there.
        step: of the checkpoint.
        root: the --save directory.

    Raises:
        NumericsError: some of it is NaN or infinite; the tensors are named.
    """
    held = {name: view.data for name, view in tensors.items() if view.data.is_floating_point() and view.data.numel()}
    if not held:
        return
    wrong = [name for name, is_finite in zip(held, _are_finite(list(held.values())), strict=True) if not is_finite]
    if wrong:
        raise not_finite(wrong, step=step, root=root)


def not_finite(names: Sequence[str], *, step: int, root: Path) -> NumericsError:
    """The error for these tensors."""
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return NumericsError(
        f"{', '.join(names[:_NAMES_SHOWN])}{more} would be saved with NaN or infinite values after step {step}, so "
        f"nothing is saved; the earlier checkpoints in {root} stand: start again from them, with a lower --lr or "
        "without the samples of the last steps (--iterations-to-skip)"
    )


def _are_finite(held: list[Tensor]) -> list[bool]:
    """Whether each has finite elements alone: by its extremes, to which NaN spreads and which need no memory."""
    extremes = [torch.stack(torch.aminmax(one.float() if one.itemsize == 1 else one)).double() for one in held]
    return torch.stack(extremes).isfinite().all(dim=1).tolist()
