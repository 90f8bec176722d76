"""Cases of the kernel that normalises each head's queries and keys; see `kernel_cases.py` for what a case is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from megatron3d_kernels import Registry
from megatron3d_kernels.query_key_norm import HeadNorms
from torch import Tensor

from tests.kernels.kernel_cases import (
    Case,
    assert_close,
    layer_norm_formula,
    random,
    rms_norm_formula,
    rotary_formula,
)

EPS = 1e-5
ROUNDED = 8.0
"""Roundings of the largest value that a composition may be off by: each of its steps rounds, forward and backward."""


def head_norms_case(
    heads: tuple[int, int],
    size: int,
    rotated: int,
    interleaved: bool,
    is_rms: bool,
    device: torch.device,
    dtype: torch.dtype,
    registry: Registry,
) -> None:
    """Values, the one gradient of [S, B, O], the bias's and those of the norms, whose parameters are wider."""
    sequence, batch = 3, 3
    queries, keys = heads
    given = random((sequence, batch, (queries + 2 * keys) * size), device, dtype, seed=2) + (0 if is_rms else 1)
    parameters = [random((size,), device, torch.float32, seed=3 + place) + 1 for place in range(2 if is_rms else 4)]
    frequencies = 10000.0 ** (-torch.arange(0, rotated, 2, dtype=torch.float64) / max(rotated, 1))
    angles = torch.tensor([[0, 1, 2], [0, 1, 0], [5, 6, 7]])[..., None] * frequencies
    rotary = (angles.cos().float().to(device), angles.sin().float().to(device)) if rotated else None
    turn = partial(rotary_formula, angles=angles.unsqueeze(1).to(device), interleaved=interleaved)
    wide = [one.detach().double().requires_grad_() for one in (given, *parameters)]
    wanted = wanted_heads(wide, heads, turn if rotated else None, is_rms)

    leaf, bias = given.clone().requires_grad_(), random(given.shape[2:], device, dtype, seed=9).requires_grad_()
    leaves = [one.clone().requires_grad_() for one in parameters]
    norms = HeadNorms((leaves[0], leaves[1]), None if is_rms else (leaves[2], leaves[3]), EPS, is_rms)
    got = registry.normalised_query_key_value(leaf, heads, norms, rotary, interleaved=interleaved, bias=bias)
    for name, one, want in zip(("q", "k", "v"), got, wanted, strict=True):
        assert_close(one, want, dtype, f"{heads}: {name}", floor=3.0, rounded=rounding(dtype))
    assert torch.equal(leaf, given), "the projection's output was overwritten"

    grads = [random(tuple(one.shape), device, dtype, seed=17 + place) for place, one in enumerate(got)]
    grads[0] = grads[0].transpose(1, 2).contiguous().transpose(1, 2)
    grads[2] = grads[2][:, :1, :1].expand(grads[2].shape)
    grad, grad_bias, *of_norms = torch.autograd.grad(got, [leaf, bias, *leaves], grads)
    want_grad, *want_of_norms = torch.autograd.grad(wanted, wide, [one.double() for one in grads])
    assert_close(grad, want_grad, dtype, f"{heads}: gradient", floor=10.0, rounded=rounding(dtype))
    rows = grad.double().flatten(0, 1)
    assert_close(grad_bias, rows.sum(0), dtype, f"{heads}: gradient of the bias", floor=float(rows.abs().sum(0).max()))
    for place, (one, want) in enumerate(zip(of_norms, want_of_norms, strict=True)):
        # Rounded steps before the sum are of the inputs' dtype.
        loose = rounding(dtype) * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
        assert_close(one, want, torch.float32, f"{heads}: gradient of parameter {place}", floor=60.0, rounded=loose)
    alone = registry.normalised_query_key_value(leaf, heads, norms, rotary, interleaved=interleaved)
    assert torch.equal(torch.autograd.grad(alone, leaf, grads)[0], grad), "alone, the gradient is another"


def wanted_heads(
    wide: list[Tensor], heads: tuple[int, int], turn: Callable[[Tensor], Tensor] | None, is_rms: bool
) -> list[Tensor]:
    """Queries, keys and values by the formulas, of the projection's output, two weights and perhaps two biases."""
    queries, keys = heads
    x, *parameters = wide
    all_heads = x.unflatten(-1, (queries + 2 * keys, -1)).permute(1, 2, 0, 3)
    wanted = [all_heads[:, :queries], all_heads[:, queries : queries + keys], all_heads[:, queries + keys :]]
    for place in range(2):
        if is_rms:
            wanted[place] = rms_norm_formula(wanted[place], parameters[place], eps=EPS)
        else:
            wanted[place] = layer_norm_formula(wanted[place], *parameters[place::2], eps=EPS)
        wanted[place] = wanted[place] if turn is None else turn(wanted[place])
    return wanted


def rounding(dtype: torch.dtype) -> float:
    """None that counts in fp32, whose noise is allowed for."""
    return 0.0 if dtype == torch.float32 else ROUNDED


def head_norm_cases() -> dict[str, Case]:
    """Odd sizes, more heads than a program takes, heads turned not at all, in part and whole."""
    cases: dict[str, Case] = {}
    for heads, size, rotated, interleaved, is_rms in (
        ((3, 3), 12, 0, False, False),
        ((4, 1), 12, 12, False, True),
        ((7, 2), 130, 64, False, True),
        ((5, 5), 12, 8, True, False),
    ):
        name = f"head_{'rms' if is_rms else 'layer'}_norms_{heads[0]}_{heads[1]}_heads_{rotated}_of_{size}_turned"
        cases[name] = partial(head_norms_case, heads, size, rotated, interleaved, is_rms)
    return cases
