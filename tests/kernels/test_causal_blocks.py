"""Attention whose backward goes over blocks: against the formula in float64, at every shape of its loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron3d_kernels import causal_blocks as file
from megatron3d_kernels.registry import Registry
from torch import Tensor


def inputs(samples: int, heads: int, groups: int, length: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values as a layer has them: [S, B, N, D] in memory, with scores that single out some keys."""
    torch.manual_seed(length)
    shapes = [(length, samples, n, size) for n in (heads, groups, groups)]
    return [(1.5 * torch.randn(shape)).to(dtype).permute(1, 2, 0, 3).requires_grad_() for shape in shapes]


def gradients(core, q_k_v: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
    """Output and gradients of a core."""
    y = core(*q_k_v)
    return (y, *torch.autograd.grad(y, q_k_v, grad.to(y.dtype)))


def in_float64(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula, with every score written out."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    return scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf).softmax(-1) @ v


def unfused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As most frameworks compose it in a narrow dtype: products in that, the softmax in fp32."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.transpose(-2, -1)).float() / q.shape[-1] ** 0.5
    return scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf).softmax(-1).to(q.dtype) @ v


def errors(found: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> list[float]:
    """Of the output and each gradient, relative to its norm (of one position, dq and dk are 0)."""
    pairs = [(a.detach().double(), b.detach()) for a, b in zip(found, want)]
    return [float((a - b).norm() / b.norm().clamp(min=1.0)) for a, b in pairs]


@given(
    samples=st.integers(1, 3),
    groups=st.integers(1, 2),
    per_group=st.integers(1, 3),
    length=st.integers(1, 40),
    size=st.sampled_from([4, 8, 24]),
    block=st.sampled_from([1, 7, 16, 64]),
    elements=st.sampled_from([1, 300, 1 << 20]),
)
@settings(max_examples=40, deadline=None)
def test_fp32_gradients_are_those_of_the_formula_whatever_the_blocks(
    samples: int, groups: int, per_group: int, length: int, size: int, block: int, elements: int
) -> None:
    q_k_v = inputs(samples, groups * per_group, groups, length, size, torch.float32)
    grad = torch.randn(q_k_v[0].shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file, "KEY_BLOCK", block)
        patch.setattr(file, "BLOCK_ELEMENTS", elements)
        found = gradients(file.causal_blocks, q_k_v, grad)
    want = gradients(in_float64, [x.detach().double().requires_grad_() for x in q_k_v], grad)
    assert max(errors(found, want)) < 1e-5


@pytest.mark.parametrize(("length", "size", "groups"), [(32, 16, 4), (200, 64, 2), (512, 64, 4)])
def test_bf16_output_and_gradients_are_about_as_exact_as_those_of_the_unfused_core(
    length: int, size: int, groups: int
) -> None:
    q_k_v = inputs(2, 4, groups, length, size, torch.bfloat16)
    grad = torch.randn(q_k_v[0].shape)
    want = gradients(in_float64, [x.detach().double().requires_grad_() for x in q_k_v], grad.bfloat16())
    ours = errors(gradients(file.causal_blocks, q_k_v, grad), want)
    theirs = errors(gradients(unfused, q_k_v, grad), want)
    assert all(mine <= 1.3 * other for mine, other in zip(ours, theirs)), (ours, theirs)
    assert sum(ours) < sum(theirs)


def test_the_registry_takes_blocks_for_narrow_dtypes_up_to_a_length_and_only_where_a_gradient_is_wanted() -> None:
    def takes_blocks(q_k_v: list[Tensor], **changed: object) -> bool:
        arguments = {"mask": None, "probability": 0.0, "is_causal": True} | changed
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("megatron3d_kernels.attention.causal_blocks", lambda *_: "blocks")
            return Registry().attention(*q_k_v, **arguments) == "blocks"  # type: ignore[arg-type]

    narrow = inputs(1, 2, 1, 16, 8, torch.bfloat16)
    assert takes_blocks(narrow)
    assert not takes_blocks(narrow, is_causal=False)
    assert not takes_blocks(narrow, mask=torch.ones(1, 1, 16, 16, dtype=torch.bool), is_causal=False)
    assert not takes_blocks([x.detach() for x in narrow])
    with torch.no_grad():
        assert not takes_blocks(narrow)
    assert not takes_blocks(inputs(1, 2, 1, 16, 8, torch.float32))
    assert takes_blocks(inputs(1, 2, 1, 512, 8, torch.bfloat16))
    assert not takes_blocks(inputs(1, 2, 1, 513, 8, torch.bfloat16))


def test_nothing_of_the_size_of_the_scores_is_kept_for_the_backward() -> None:
    q_k_v = inputs(1, 2, 2, 256, 8, torch.bfloat16)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
        file.causal_blocks(*q_k_v)
    assert sum(sizes) == 4 * q_k_v[0].numel() + 2 * 256
