"""Packed documents in one call: what the kernel is given is the plan, and what it gives comes back in place."""

from __future__ import annotations

import sys
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
import torch.nn.functional as F
from megatron3d_kernels.launch import KernelError
from megatron3d_kernels.packed import KERNELS, packed_attention, suits_packed
from megatron3d_kernels.rectangles import Plan, Rectangle, reference
from megatron3d_kernels.registry import Registry
from torch import Tensor
from torch.nn.attention import varlen


def documents(*lengths: int) -> tuple[Rectangle, ...]:
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    rows = [range(first, stop) for first, stop in pairwise(bounds)]
    return tuple(Rectangle(one, one, is_causal=True) for one in rows)


def one_by_one(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, other_bounds: Tensor, *sizes: int, **how: Any
) -> Tensor:
    """What torch documents of `varlen_attn`, and flash-attn of its function, a sequence at a time."""
    of_torch = {"window_size": (-1, 0)} | ({"enable_gqa": True} if q.shape != k.shape else {})
    assert how in (of_torch, {"causal": True}) and bounds.dtype is torch.int32
    assert torch.equal(bounds, other_bounds) and sizes == (int(bounds.diff().max()),) * 2
    parts = []
    for first, stop in zip(bounds.tolist(), bounds[1:].tolist()):
        rows = (x[first:stop].transpose(0, 1) for x in (q, k, v))
        parts.append(F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("plan", [[documents(3, 5, 1), documents(9)], [documents(4, 5)]])
@pytest.mark.parametrize("kernel", KERNELS)
def test_documents_of_all_samples_are_given_and_come_back_in_place(
    monkeypatch: pytest.MonkeyPatch, kernel: str, plan: Plan
) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=one_by_one))
    monkeypatch.setattr(varlen, "varlen_attn", create_autospec(varlen.varlen_attn, side_effect=one_by_one))
    torch.manual_seed(0)
    q, k, v = (torch.randn(9, 2, heads, 8).permute(1, 2, 0, 3) for heads in (4, 2, 2))
    torch.testing.assert_close(packed_attention(q, k, v, plan, kernel=kernel), reference(q, k, v, plan))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_torch_whose_kernel_shares_no_heads_is_given_a_copy_for_each(
    monkeypatch: pytest.MonkeyPatch, groups: int
) -> None:
    def of_torch_2_11(q: Tensor, k: Tensor, v: Tensor, *bounds: Any, window_size: tuple[int, int]) -> Tensor:
        assert q.shape == k.shape == v.shape
        return one_by_one(q, k, v, *bounds, window_size=window_size)

    monkeypatch.setattr(varlen, "varlen_attn", of_torch_2_11)
    torch.manual_seed(0)
    q, k, v = (torch.randn(9, 2, heads, 8).permute(1, 2, 0, 3) for heads in (4, groups, groups))
    plan = [documents(3, 5, 1), documents(9)]
    torch.testing.assert_close(packed_attention(q, k, v, plan), reference(q, k, v, plan))


def test_only_documents_in_16_bits_on_cuda_go_this_way() -> None:
    on_meta = torch.empty(1, 2, 9, 8, dtype=torch.bfloat16, device="meta")

    class OnCuda:
        """A tensor of which the device and the shape matter alone."""

        is_cuda, shape = True, on_meta.shape

        def __init__(self, dtype: torch.dtype) -> None:
            self.dtype = dtype

    def suits(plan: Plan, dtype: torch.dtype = torch.bfloat16) -> bool:
        return suits_packed(OnCuda(dtype), plan)  # type: ignore[arg-type]

    assert suits([documents(3, 6)]) and suits([documents(9)], torch.float16)
    assert not suits_packed(on_meta, [documents(3, 6)])
    assert not suits([documents(3, 6)], torch.float32)
    assert not suits([documents(3, 5)]) and not suits([documents(3, 6)[1:]])
    assert not suits([[*documents(3), Rectangle(range(3, 9), range(6), is_causal=False)]])
    assert not suits([[*documents(3), Rectangle(range(3, 9), range(6), is_causal=True)]])


def test_a_kernel_that_is_unknown_or_not_installed_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KernelError, match="no kernel 'flash' for packed documents; use one of torch, flash-attn"):
        Registry(packed="flash")
    monkeypatch.setattr("megatron3d_kernels.packed.find_spec", lambda _: None)
    with pytest.raises(KernelError, match="need the package flash-attn; install it, or use 'torch'"):
        Registry(packed="flash-attn")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is available")
@pytest.mark.parametrize("groups", [4, 2])
def test_the_kernel_of_a_gpu_gives_the_output_and_gradients_of_the_formula(groups: int) -> None:
    plan = [documents(3, 100, 25), documents(128)]
    torch.manual_seed(0)
    made = [torch.randn(128, 2, heads, 64, dtype=torch.bfloat16, device="cuda") for heads in (4, groups, groups, 4)]
    *q_k_v, grad = (x.permute(1, 2, 0, 3) for x in made)
    found = []
    for core, dtype in ((packed_attention, torch.bfloat16), (reference, torch.bfloat16), (reference, torch.float64)):
        given = [x.detach().to(dtype).requires_grad_() for x in q_k_v]
        y = core(*given, plan)
        found.append([x.double() for x in (y, *torch.autograd.grad(y, given, grad.to(dtype)))])
    for ours, theirs, exact in zip(*found):
        assert (ours - exact).norm() <= 1.3 * (theirs - exact).norm()
