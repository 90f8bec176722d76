"""Packed documents: samples of several documents, whose tokens attend to those before them in their own document.

What attends to what is a list of causal squares, one a document, made on the host before the samples move to a device.
So no mask of the size of the scores exists (`megatron3d_kernels/rectangles.py`).

Shapes: B samples, S positions of a sample, R positions of it that a layer sees.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from megatron3d_kernels.rectangles import Plan, Rectangle
from torch import Tensor

Rectangles = Plan
"""What attends to what in the samples of a micro-batch, as the kernel takes it."""


def document_rectangles(documents_BS: Tensor) -> Rectangles:
    """The causal squares of each sample, in order, which cover every position.

    Args:
        documents_BS: number of the document of each position, int64 on the host; positions of a document stand
            together.
    """
    return tuple(_squares(np.flatnonzero(np.diff(row)) + 1, len(row)) for row in documents_BS.numpy())


def kept_rectangles(plan: Rectangles, kept_BR: Tensor) -> Rectangles:
    """What is left of the rectangles of samples of which a layer sees some positions, counted among those.

    Args:
        plan: the rectangles of whole samples.
        kept_BR: the positions, int64 on the host, each row ascending.
    """
    of_samples = plan if len(plan) > 1 else [plan[0]] * len(kept_BR)
    return tuple(
        tuple(Rectangle(_among(kept_R, one.queries), _among(kept_R, one.keys), one.is_causal) for one in rectangles)
        for rectangles, kept_R in zip(of_samples, kept_BR.numpy(), strict=True)
    )


def _squares(starts: np.ndarray, length: int) -> tuple[Rectangle, ...]:
    bounds = [0, *starts.tolist(), length]
    ranges = [range(first, stop) for first, stop in pairwise(bounds)]
    return tuple(Rectangle(rows, rows, is_causal=True) for rows in ranges)


def _among(kept_R: np.ndarray, rows: range) -> range:
    first, stop = np.searchsorted(kept_R, (rows.start, rows.stop)).tolist()
    return range(first, stop)
