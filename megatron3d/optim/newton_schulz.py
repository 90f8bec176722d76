"""Orthogonalising a matrix by Newton-Schulz iteration: products of matrices alone.

With X = U S V^T, one iteration a X + b (X X^T) X + c (X X^T)^2 X is U p(S) V^T with p(s) = a s + b s^3 + c s^5. The
coefficients drive every singular value in (0, 1] into a band around 1 in a few iterations instead of to 1 in many.

Source: Jordan et al. 2024 (Muon, kellerjordan.github.io/posts/muon), which also gives the coefficients "simple". Those
of "quintic" differ by iteration: Cesista, You and Jordan 2025 (leloykun.github.io/ponder/muon-opt-coeffs).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

EPSILON = 1e-7  # least norm to divide by, as in the authors' and torch's code

Coefficients = tuple[tuple[float, float, float], ...]
COEFFICIENTS: Mapping[str, Coefficients] = MappingProxyType(
    {
        "simple": ((3.4445, -4.7750, 2.0315),),
        "quintic": (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
    }
)


def orthogonalize(matrix: Tensor, *, coefficients: Coefficients, num_steps: int, dtype: torch.dtype) -> Tensor:
    """A matrix with about the singular vectors of `matrix` and singular values around 1, in fp32.

    Args:
        matrix: [A, B].
        coefficients: (a, b, c) of each iteration, taken around again where there are more iterations.
        num_steps: iterations.
        dtype: in which products are computed; bf16 is faster, but its rounding shows in the third digit.
    """
    x = matrix.to(dtype)
    is_tall = matrix.shape[0] > matrix.shape[1]
    if is_tall:
        x = x.T
    x = x / x.norm().clamp(min=EPSILON)  # now no singular value is above 1
    for number in range(num_steps):
        a, b, c = coefficients[number % len(coefficients)]
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if is_tall else x).float()


def update_scale(rows: int, columns: int, mode: str) -> float:
    """What an orthogonal matrix [rows, columns] (outputs, inputs) is multiplied by, by Megatron-LM's name of the mode.

    "shape_scaling" is Jordan's sqrt(max(1, rows / columns)); "spectral", sqrt(max(rows, columns)), gives all shapes an
    update of root mean square 1, and so 0.2 of it (Liu et al. 2025, Moonlight, section 2.2) about that of AdamW;
    "unit_rms_norm" is sqrt(rows / columns), the operator norm between root mean squares (Pethick et al. 2025, Scion).
    """
    if mode == "shape_scaling":
        return max(1.0, rows / columns) ** 0.5
    if mode == "unit_rms_norm":
        return (rows / columns) ** 0.5
    assert mode == "spectral", f"{mode} is no scale mode"
    return max(rows, columns) ** 0.5
