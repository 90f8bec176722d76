"""All cases of kernels by name, for whoever runs them: references, interpreter, GPU."""

from __future__ import annotations

from tests.kernels import kernel_cases
from tests.kernels.head_norm_cases import head_norm_cases
from tests.kernels.not_finite_cases import NOT_FINITE_CASES
from tests.kernels.residual_cases import residual_cases

CASES = {**kernel_cases.CASES, **residual_cases(), **head_norm_cases(), **NOT_FINITE_CASES}
