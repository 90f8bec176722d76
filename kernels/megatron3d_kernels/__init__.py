"""Kernels of a transformer, each as plain torch and, beside it, as Triton; usable without the rest of the project.

Start with `registry.py` (all kernels behind one value) and `selection.py` (which implementation runs, and why); each
kernel is one file. `python -m megatron3d_kernels.bench` measures them.
"""

from __future__ import annotations

from megatron3d_kernels.activation import ACTIVATIONS
from megatron3d_kernels.gated_activation import GATED_ACTIVATIONS
from megatron3d_kernels.launch import KernelError, TritonSupport
from megatron3d_kernels.registry import Registry
from megatron3d_kernels.selection import KERNEL_NAMES

__all__ = ["ACTIVATIONS", "GATED_ACTIVATIONS", "KERNEL_NAMES", "KernelError", "Registry", "TritonSupport"]
