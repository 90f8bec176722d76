"""Clipping by the global gradient norm.

Source: Pascanu et al. 2013, algorithm 1.
"""

from __future__ import annotations

EPSILON = 1e-6  # Megatron-LM's and torch's, so that clipped runs compare with theirs


def clip_factor(norm: float, max_norm: float) -> float:
    """What to multiply gradients of this norm with so that it becomes at most `max_norm`; 0 clips nothing."""
    if max_norm <= 0.0:
        return 1.0
    return min(1.0, max_norm / (norm + EPSILON))
