"""Compile every Triton kernel for NVIDIA GPUs, on a machine that has none, and print what failed as JSON.

A program of its own, started without Triton's interpreter. The kernel functions run on CPU tensors with `launch`
replaced by a compilation to machine code from the very arguments of the launch; the numbers they return are nonsense
and unused. So this shows that kernels are valid beyond what the interpreter forgives, not that they are right.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from itertools import product
from typing import Any

import torch
import triton
from megatron3d_kernels import ACTIVATIONS, GATED_ACTIVATIONS, KERNEL_NAMES, Registry
from megatron3d_kernels.adam import AdamStep, AdamTensors
from megatron3d_kernels.dropout import RowDropout
from megatron3d_kernels.fp8 import E4M3, E5M2
from megatron3d_kernels.fp8_cast import Orientations
from megatron3d_kernels.launch import TRITON, TritonSupport
from megatron3d_kernels.query_key_norm import HeadNorms
from megatron3d_kernels.residual_norm import RowNorm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

MODULES = [import_module(f"megatron3d_kernels.{name}") for name in KERNEL_NAMES]
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int16: "*i16",
}
TYPES |= {torch.int32: "*i32", E4M3: "*fp8e4nv", E5M2: "*fp8e5"}
OLDEST_WITH_FP8 = 89


class Compilations:
    """Compiles each different launch once and keeps the failures."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        self.outcomes: dict[str, str] = {}

    def launch(
        self, kernel: Any, grid: tuple[int, ...], *arguments: Any, device: torch.device, **constants: Any
    ) -> None:
        """Stand in for `megatron3d_kernels.launch.launch`."""
        num_warps = constants.pop("num_warps")
        assert [*kernel.arg_names[len(arguments) :]] == list(constants), f"{kernel.__name__}: {list(constants)}"
        given = dict(zip(kernel.arg_names, arguments))
        # Triton's launcher makes an integer that is 1 a compile-time constant.
        known = {name: value for name, value in given.items() if isinstance(value, int) and value == 1} | constants
        signature = {name: type_of(value) for name, value in given.items()} | dict.fromkeys(known, "constexpr")
        label = f"{kernel.__module__}.{kernel.__name__} {signature} {constants} sm_{self.target.arch}"
        if label in self.outcomes:
            return
        source = ASTSource(fn=kernel, signature=signature, constexprs=known)
        try:
            binary = triton.compile(source, target=self.target, options={"num_warps": num_warps})
            self.outcomes[label] = "" if len(binary.asm["cubin"]) > 0 else "no machine code"
        except Exception as problem:
            self.outcomes[label] = repr(problem)


def type_of(argument: object) -> str:
    """Triton's name for the type of a launch argument."""
    if isinstance(argument, torch.Tensor):
        return TYPES[argument.dtype]
    return "fp32" if isinstance(argument, float) else "i64" if int(str(argument)) >= 1 << 31 else "i32"


def use_all_kernels(registry: Registry, dtype: torch.dtype, width: int) -> None:
    """Every kernel with every set of compile-time constants that a model meets, on rows of `width` (even)."""
    x = torch.randn(4, width, dtype=dtype, requires_grad=True)
    weight, bias = (torch.ones(width, dtype=dtype, requires_grad=True) for _ in range(2))
    for y in (registry.layer_norm(x, weight, bias), registry.layer_norm(x, weight), registry.rms_norm(x, weight)):
        y.backward(torch.ones_like(x))
    use_residual_kernels(registry, x, weight, bias)
    for kind in GATED_ACTIVATIONS:
        for one in (None, bias):
            registry.fused_gated_activation(x, kind, bias=one).backward(torch.ones(4, width // 2, dtype=dtype))
    for kind in ACTIVATIONS:
        for one in (None, bias):
            registry.activation(x, kind, bias=one).backward(torch.ones_like(x))
    use_query_key_value(registry, dtype, width)
    use_head_norms(registry, dtype, width)
    for interleaved in (False, True):
        for rotated, heads in ((width, 1), (width // 2, 3)):
            q, angles = torch.randn(1, heads, 4, width, dtype=dtype, requires_grad=True), torch.randn(4, rotated // 2)
            registry.apply_rotary(q, angles, angles, interleaved).backward(torch.ones_like(q))
    target, row = torch.zeros(4, dtype=torch.int64), torch.ones(4)
    registry.local_max(x, width - 1)
    registry.local_softmax_sums(x, target, 0, width - 1)
    for average, square, copy in product(*[(torch.float32, torch.bfloat16)] * 2, (None, dtype)):
        tensors = [torch.zeros(width, dtype=one) for one in (torch.float32, torch.float32, average, square)]
        into = None if copy is None else torch.zeros(width, dtype=copy)
        for decoupled in (True, False):
            registry.adam([AdamTensors(*tensors, into)], AdamStep(0.1, 0.1, 0.9, 0.99, 1e-8, 3, decoupled))
    registry.cross_entropy_backward(x, target, row, row, row, row, vocab_start=0, num_valid=width - 1)


def use_residual_kernels(registry: Registry, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Norms beside the stream and of sums, with what a sum may have; dropout by itself."""
    keys = torch.zeros(len(x), dtype=torch.int64)
    for norm in (RowNorm(weight, bias, 1e-5, False), RowNorm(weight, None, 1e-5, True)):
        torch.stack(registry.forked_norm(x, norm)).sum().backward()
        for ahead in (None, bias):
            registry.forked_norm(x, norm, copies=True, bias=ahead)
        for branch_bias in (None, bias):
            for dropping in (None, RowDropout(keys, 0.1)):
                pair = registry.added_norm(x, x, norm, bias=branch_bias, dropping=dropping)
                torch.stack(pair).sum().backward()
                registry.added_norm(x, x, norm, bias=branch_bias, dropping=dropping)[1].sum().backward()
    hidden = x.detach().unsqueeze(1)
    registry.row_keys(hidden, 1 << 40, 3, torch.zeros(4, 1, dtype=torch.int64))
    for residual in (None, x):
        registry.dropout(x, keys, 0.1, residual=residual).sum().backward()


def use_query_key_value(registry: Registry, dtype: torch.dtype, width: int) -> None:
    """With and without rotary positions on all or half of a head of `width`, and the gradient of a bias."""
    for rotated, interleaved in ((0, False), (width, False), (width // 2, True)):
        angles = torch.randn(4, rotated // 2)
        rotary = (angles, angles) if rotated // 2 else None
        for bias in (None, torch.ones(5 * width, dtype=dtype, requires_grad=True)):
            leaf = torch.randn(4, 2, 5 * width, dtype=dtype, requires_grad=True)
            heads = registry.query_key_value(leaf * 1, (3, 1), rotary, interleaved=interleaved, bias=bias)
            torch.autograd.backward(heads, [torch.ones_like(one) for one in heads])


def use_head_norms(registry: Registry, dtype: torch.dtype, width: int) -> None:
    """The same with norms of heads of `width`, whose parameters are frozen or not."""
    frozen, free = torch.ones(width), torch.ones(width, requires_grad=True)
    kinds = (HeadNorms((free, free), (free, free), 1e-5, False), HeadNorms((frozen, frozen), None, 1e-5, True))
    bias = torch.ones(5 * width, dtype=dtype, requires_grad=True)
    for rotated, interleaved, norms in product((0, width), (False, True), kinds):
        angles = torch.randn(4, rotated // 2)
        rotary = (angles, angles) if rotated // 2 else None
        leaf = torch.randn(4, 2, 5 * width, dtype=dtype, requires_grad=True)
        for one in (None, bias):
            arguments = (leaf, (3, 1), norms, rotary)
            heads = registry.normalised_query_key_value(*arguments, interleaved=interleaved, bias=one)
            torch.autograd.backward(heads, [torch.ones_like(head) for head in heads])


def use_fp8_kernels(registry: Registry, dtype: torch.dtype, width: int) -> None:
    """The same of the casts to fp8, which older GPUs have no numbers for."""
    x = torch.randn(4, width, dtype=dtype)
    amax = registry.fp8_amax_bits(x)
    for to in (E4M3, E5M2):
        for wanted in (Orientations(), Orientations(rows=False), Orientations(columns=False)):
            registry.fp8_cast_tensor(x, amax, to, wanted)
            for square in (True, False):
                registry.fp8_cast_blocks(x, to, wanted, square=square)


if __name__ == "__main__":
    assert not TRITON.interpreted, "run this without TRITON_INTERPRET"
    compilations = Compilations(GPUTarget("cuda", int(sys.argv[1]), 32))
    for module in MODULES:
        vars(module)["launch"] = compilations.launch
    forced = Registry("triton", support=TritonSupport(installed=True, interpreted=True, detail="compiled only"))
    use_all_kernels(forced, torch.bfloat16, 96)
    use_all_kernels(forced, torch.float16, 2)
    if has_fp8 := int(sys.argv[1]) >= OLDEST_WITH_FP8:
        use_fp8_kernels(forced, torch.bfloat16, 96)
    modules = [module for module in MODULES if has_fp8 or not module.__name__.endswith("fp8_cast")]
    kernels = [f"{m.__name__}.{name}" for m in modules for name in vars(m) if name.endswith("_kernel")]
    json.dump({"kernels": kernels, "outcomes": compilations.outcomes}, sys.stdout)
