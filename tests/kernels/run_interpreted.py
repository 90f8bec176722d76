"""Run kernel cases (all, or those named) on Triton in this process's interpreter and print what went wrong as JSON.

A program of its own, started with TRITON_INTERPRET=1: Triton reads that when it is imported, and the tests of other
rooms, in the process that runs pytest, shall not depend on it.
"""

from __future__ import annotations

import json
import sys
import traceback

import torch
from megatron3d_kernels import (
    Registry,
    activation,
    gated_activation,
    layer_norm,
    query_key_norm,
    query_key_value,
    residual_norm,
    rms_norm,
)

from tests.kernels.cases import CASES
from tests.kernels.kernel_cases import DTYPES


def outcome(case: str, dtype: str) -> str:
    """Nothing where the case holds, else its traceback."""
    try:
        CASES[case](torch.device("cpu"), DTYPES[dtype], Registry("triton"))
    except Exception:
        return traceback.format_exc()
    return ""


if __name__ == "__main__":
    # Fewer programs than rows, so that the few rows an interpreter can bear make a program loop over several.
    for file in (layer_norm, residual_norm, rms_norm):
        file.BACKWARD_PROGRAMS = 4
    for file in (activation, gated_activation, query_key_norm, query_key_value):
        file.SUM_PROGRAMS = 4
    json.dump(
        {f"{case}-{dtype}": outcome(case, dtype) for case in sys.argv[1:] or CASES for dtype in DTYPES}, sys.stdout
    )
