"""Bytes and dtypes by the names that the configuration has for them."""

from __future__ import annotations

import torch

FP32 = 4
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
