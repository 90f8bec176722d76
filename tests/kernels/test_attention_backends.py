"""Which of torch's attention kernels may run, and that what is asked for is what runs."""

from __future__ import annotations

from itertools import product
from math import sqrt

import pytest
import torch
from megatron3d_kernels import KernelError, Registry, attention
from megatron3d_kernels.attention_backends import BACKENDS, AttentionCase, AttentionChoice, kernels_for, within
from torch import Tensor

A100, H100 = (8, 0), (9, 0)
BF16 = torch.bfloat16


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("case", "kernels"),
    [
        (AttentionCase("cuda", BF16, H100), ("fused", "flash", "efficient")),
        (AttentionCase("cuda", BF16, A100), ("flash", "efficient")),
        (AttentionCase("cuda", BF16, H100, drops=True), ("flash", "efficient")),
        (AttentionCase("cuda", BF16, H100, masked=True), ("fused", "efficient")),
        (AttentionCase("cuda", torch.float16, A100, masked=True), ("efficient",)),
        (AttentionCase("cuda", torch.float32, H100), ("efficient",)),
        (AttentionCase("cpu", torch.float32), ("flash", "math")),
    ],
)
def test_the_preferred_kernel_is_that_of_the_table(case: AttentionCase, kernels: tuple[str, ...]) -> None:
    assert kernels_for(case) == kernels


def test_no_scores_are_held_on_a_gpu_unless_that_is_asked_for_or_the_inputs_are_in_fp64() -> None:
    dtypes = (torch.float64, torch.float32, torch.float16, BF16)
    for dtype, capability, masked, drops in product(dtypes, (A100, H100), (False, True), (False, True)):
        case = AttentionCase("cuda", dtype, capability, masked, drops)
        assert ("math" in kernels_for(case)) == (dtype == torch.float64), case
        assert kernels_for(case, "unfused") == kernels_for(case, "local") == ("math",)


@pytest.mark.parametrize(
    ("case", "backend", "reason"),
    [
        (AttentionCase("cpu", BF16), "fused", "cuDNN's, which has no kernel for a cpu device"),
        (AttentionCase("cpu", BF16, drops=True), "flash", "drops no probabilities on a cpu device"),
        (AttentionCase("cuda", torch.float32, H100), "flash", "16 bits, and the inputs are float32"),
        (AttentionCase("cuda", torch.float32, H100), "fused", "16 bits, and the inputs are float32"),
        (AttentionCase("cuda", BF16, H100, masked=True), "flash", "takes no mask"),
    ],
)
def test_a_backend_that_cannot_run_is_refused(case: AttentionCase, backend: str, reason: str) -> None:
    with pytest.raises(KernelError, match=f"'{backend}'.*{reason}.*use 'auto'"):
        kernels_for(case, backend)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(KernelError, match=f"'xformers'; use one of {', '.join(BACKENDS)}"):
        AttentionChoice("xformers")


def formula(q_BNSD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, may_attend: Tensor) -> Tensor:
    """Vaswani et al. 2017, equation 1, with heads that share keys."""
    k, v = (x.repeat_interleave(q_BNSD.shape[1] // x.shape[1], dim=1) for x in (k_BGTD, v_BGTD))
    scores = (q_BNSD @ k.transpose(-2, -1) / sqrt(q_BNSD.shape[-1])).masked_fill(~may_attend, -torch.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("backend", ["flash", "unfused", "local"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_formula(backend: str, masked: bool, dtype: torch.dtype) -> None:
    given = [random(2, 6, 33, 8, seed=1), random(2, 3, 33, 8, seed=2), random(2, 3, 33, 8, seed=3)]
    leaves = [x.to(dtype).requires_grad_() for x in given]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    padding = torch.arange(33) < torch.tensor([[[[20]]], [[[33]]]])
    may_attend = padding if masked else torch.ones(33, 33, dtype=torch.bool).tril()
    kernels = Registry(attention=AttentionChoice(backend))
    q, k, v = leaves
    y = kernels.attention(q, k, v, mask=padding if masked else None, probability=0.0, is_causal=not masked)
    assert y.grad_fn is not None
    assert ("Flash" in y.grad_fn.name()) == (backend == "flash"), y.grad_fn.name()
    want = formula(wide[0], wide[1], wide[2], may_attend)
    grad = random(*want.shape, seed=4)
    noise = 2e-6 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(y.double(), want, atol=noise, rtol=noise)
    for got, expected in zip(torch.autograd.grad(y, leaves, grad.to(dtype)), torch.autograd.grad(want, wide, grad)):
        torch.testing.assert_close(got.double(), expected, atol=4 * noise, rtol=4 * noise)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], ...]]:
    """Attention on a CPU takes itself to be on an H100, and notes the shapes that torch is given."""
    calls: list[tuple[tuple[int, ...], ...]] = []
    run = attention._torch

    def noted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *how: object) -> Tensor:
        calls.append((tuple(q.shape), tuple(k.shape), () if mask is None else tuple(mask.shape)))
        return run(q, k, v, mask, *how)  # pyright: ignore[reportArgumentType]

    def case_of(q: Tensor, *, capability: tuple[int, int], masked: bool, drops: bool) -> AttentionCase:
        return AttentionCase("cuda", q.dtype, H100, masked, drops)

    monkeypatch.setattr(attention, "_torch", noted)
    monkeypatch.setattr(attention, "case_of", case_of)
    monkeypatch.setattr(attention, "AUTO", "")  # which a CPU handles by itself
    return calls


def test_where_no_kernel_takes_the_inputs_the_error_says_so(as_on_a_gpu: list[object]) -> None:
    q = random(1, 2, 4, 8, seed=0).float()
    with pytest.raises(KernelError, match=r"memory-efficient kernel takes no queries \(1, 2, 4, 8\).*unfused"):
        attention.attention(q, q, q, mask=None, probability=0.0, is_causal=True)
    assert len(as_on_a_gpu) == 1


def test_a_mask_of_padding_stays_small_and_shared_heads_are_repeated_for_the_kernel_that_needs_it(
    as_on_a_gpu: list[tuple[tuple[int, ...], ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "within", lambda kernels: within(("flash",)))  # a CPU's
    q, k = random(2, 4, 16, 8, seed=0).to(BF16), random(2, 2, 16, 8, seed=1).to(BF16)
    mask = torch.ones(2, 1, 1, 16, dtype=torch.bool)
    attention.attention(q, k, k, mask=mask, probability=0.0, is_causal=False)
    attention.attention(q, k, k, mask=None, probability=0.0, is_causal=True)
    assert as_on_a_gpu == [((2, 4, 16, 8), (2, 4, 16, 8), (2, 1, 1, 16)), ((2, 4, 16, 8), (2, 2, 16, 8), ())]
