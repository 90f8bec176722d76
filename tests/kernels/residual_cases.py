"""What sums, norms and dropout of the residual stream must do, as cases like those of `kernel_cases.py`.

The formula takes dropout's mask from `keep_mask`, which `test_dropout.py` holds to its definition, and normalises the
sum as the kernel rounded it: Triton's interpreter truncates to bf16 where a GPU rounds to nearest.
"""

from __future__ import annotations

from functools import partial

import torch
from megatron3d_kernels import Registry
from megatron3d_kernels.dropout import RowDropout, child_keys, keep_mask, kept_scale
from megatron3d_kernels.residual_norm import RowNorm
from torch import Tensor

from tests.kernels.kernel_cases import (
    Case,
    check,
    check_alone,
    layer_norm_floor,
    layer_norm_formula,
    layouts,
    random,
    rms_norm_formula,
)

PROBABILITY = 0.3


def keys_of(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """A key for each row of a tensor."""
    rows = torch.Size(shape[:-1]).numel()
    return child_keys(-3, torch.arange(rows, device=device)).view(shape[:-1])


def dropped(x: Tensor, keys: Tensor) -> Tensor:
    """What dropout of x is, in the dtype of x."""
    return x * keep_mask(keys, x.shape[-1], PROBABILITY) * kept_scale(PROBABILITY)


def with_values(x: Tensor, values: Tensor) -> Tensor:
    """Other values with the gradient of x."""
    return x + (values.double() - x).detach()


def forked_norm_case(
    is_rms: bool, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, registry: Registry
) -> None:
    """Both results, each with a gradient of its own; then the norm alone, as where the residual is not used."""
    weight, bias = random(shape[-1:], device, dtype, seed=3) + 1, random(shape[-1:], device, dtype, seed=4)

    def operation(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.stack(registry.forked_norm(x, row_norm(is_rms, *parameters)))

    def formula(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.stack([x, norm_formula(is_rms, x, *parameters)])

    for layout, x in layouts(shape, device, dtype).items():
        parameters = [weight] if is_rms else [weight, bias]
        floor = floor_of(is_rms, x)
        check(operation, formula, [x, *parameters], f"{shape}, {layout}", floor=floor, rounded=inside(registry, dtype))
    norm_alone = lambda *inputs: operation(*inputs)[1]  # noqa: E731
    check(
        norm_alone,
        lambda *inputs: formula(*inputs)[1],
        [x, *parameters],
        f"{shape}, norm alone",
        floor=floor,
        rounded=inside(registry, dtype),
    )
    stream_alone = lambda *inputs: operation(*inputs)[0]  # noqa: E731
    check(stream_alone, lambda x, *rest: x + 0 * sum(one.sum() for one in rest), [x, *parameters], f"{shape}, stream")


def copied_norm_case(
    is_rms: bool, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, registry: Registry
) -> None:
    """A copy plus a bias that gets no gradient; what is written to the copy reaches neither x nor the backward."""
    weight, bias = random(shape[-1:], device, dtype, seed=3) + 1, random(shape[-1:], device, dtype, seed=4)
    ahead, norm_bias = random(shape[-1:], device, dtype, seed=5).requires_grad_(), None if is_rms else bias

    def operation(x: Tensor, weight: Tensor) -> Tensor:
        first, normed = registry.forked_norm(x, row_norm(is_rms, weight, norm_bias), copies=True, bias=ahead)
        return torch.stack([first.mul_(2), normed])

    def formula(x: Tensor, weight: Tensor) -> Tensor:
        wide = None if norm_bias is None else norm_bias.double()
        return torch.stack([2 * (x + ahead.detach().double()), norm_formula(is_rms, x, weight, wide)])

    for layout, x in layouts(shape, device, dtype).items():
        given, floor = x.clone(), floor_of(is_rms, x)
        check(operation, formula, [x, weight], f"{shape}, {layout}", floor=floor, rounded=inside(registry, dtype))
        assert torch.equal(x, given) and ahead.grad is None


def inside(registry: Registry, dtype: torch.dtype) -> float:
    """The share of the largest value up to which the reference, a composition, rounds inside to the dtype; Triton
    rounds results alone."""
    return 1.0 if registry.choose("residual_norm", "cpu", dtype).implementation == "reference" else 0.0


def row_norm(is_rms: bool, weight: Tensor, bias: Tensor | None = None) -> RowNorm:
    """The norm under test."""
    return RowNorm(weight, bias, 1e-5, is_rms)


def norm_formula(is_rms: bool, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """In the dtype of x."""
    return rms_norm_formula(x, weight, eps=1e-5) if is_rms else layer_norm_formula(x, weight, bias, eps=1e-5)


def added_norm_case(
    is_rms: bool,
    drops: bool,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    registry: Registry,
) -> None:
    """The sum and its norm of all layouts of a branch, with and without a bias of it."""
    residual = random(shape, device, dtype, seed=5)
    norm = [random(shape[-1:], device, dtype, seed=3) + 1]
    norm += [] if is_rms else [random(shape[-1:], device, dtype, seed=4)]
    branch_bias = random(shape[-1:], device, dtype, seed=6)
    dropping = RowDropout(keys_of(shape, device), PROBABILITY) if drops else None

    def operation(residual: Tensor, branch: Tensor, *rest: Tensor) -> Tensor:
        bias, weights = (rest[0] if len(rest) > len(norm) else None), rest[-len(norm) :]
        given = row_norm(is_rms, *weights)
        return torch.stack(registry.added_norm(residual, branch, given, bias=bias, dropping=dropping))

    def formula(residual: Tensor, branch: Tensor, *rest: Tensor) -> Tensor:
        bias, weights = rest[: -len(norm)], rest[-len(norm) :]
        branch = sum(bias, branch)
        summed = residual + (dropped(branch, dropping.keys) if dropping else branch)
        normalised = with_values(summed, narrow_sum)
        return torch.stack([summed, norm_formula(is_rms, normalised, *weights)])

    narrow_sum: Tensor
    for layout, branch in layouts(shape, device, dtype).items():
        has_bias = layout != "contiguous"
        inputs = [residual, branch, *([branch_bias] if has_bias else []), *norm]
        narrow_sum = operation(*inputs)[0]
        floor = floor_of(is_rms, narrow_sum)
        check(operation, formula, inputs, f"{shape}, {layout}", floor=floor, rounded=inside(registry, dtype))


def floor_of(is_rms: bool, x: Tensor) -> float:
    """As in the cases of the norms by themselves."""
    return 4.0 if is_rms else 4 * layer_norm_floor(x)


def dropout_case(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, registry: Registry) -> None:
    """The bits are those of the reference, whatever the layout; values and gradients, with a residual too."""
    keys, residual = keys_of(shape, device), random(shape, device, dtype, seed=5)
    ones = torch.ones(shape, device=device, dtype=dtype)
    assert torch.equal(registry.dropout(ones, keys, PROBABILITY) > 0, keep_mask(keys, shape[-1], PROBABILITY))
    operation = partial(registry.dropout, keys=keys, probability=PROBABILITY)
    with_residual = lambda x, residual: operation(x, residual=residual)  # noqa: E731
    for layout, x in layouts(shape, device, dtype).items():
        check(operation, partial(dropped, keys=keys), [x], f"{shape}, {layout}")
        sums = lambda x, r: r + dropped(x, keys)  # noqa: E731
        name = f"{shape}, {layout}, residual"
        check(with_residual, sums, [x, residual], name, rounded=inside(registry, dtype))


def row_keys_case(device: torch.device, dtype: torch.dtype, registry: Registry) -> None:
    """Keys of samples and positions are keys of keys, whether samples have the same positions or their own."""
    x = random((7, 3, 4), device, dtype)
    for positions_SB in (torch.arange(5, 12).unsqueeze(1), (torch.arange(21) ** 3).view(3, 7).t()):
        for key, first in ((-(1 << 63), 0), (7 << 50, 1000), (5, 1)):
            keys_B = child_keys(key, torch.arange(first, first + 3))
            found = registry.row_keys(x, key, first, positions_SB.to(device))
            assert torch.equal(found.cpu(), child_keys(keys_B, positions_SB))


def residual_norms_accept_other_parameter_dtype(device: torch.device, dtype: torch.dtype, registry: Registry) -> None:
    """Parameters in fp32 beside a narrower stream are used as they are, and get gradients of their own dtype."""
    x, weight = random((5, 33), device, dtype), random((33,), device, torch.float32, seed=3)
    bias = random((33,), device, torch.float32, seed=4)
    operation = lambda x, w, b: torch.stack(registry.forked_norm(x, row_norm(False, w, b)))  # noqa: E731
    formula = lambda x, w, b: torch.stack([x, norm_formula(False, x, w, b)])  # noqa: E731
    check(operation, formula, [x, weight, bias], "forked", floor=layer_norm_floor(x), rounded=inside(registry, dtype))


def residual_gradients_do_not_depend_on_which_are_needed(
    device: torch.device, dtype: torch.dtype, registry: Registry
) -> None:
    """Frozen norms, biases and branches, one gradient at a time."""
    x, y, (weight, bias, branch_bias) = (random((3, 5), device, dtype, seed=n) for n in range(3))
    dropping = RowDropout(keys_of((3, 5), device), PROBABILITY)
    for drop in (None, dropping):
        added = lambda x, y, b, w, s, drop=drop: torch.stack(  # noqa: E731
            registry.added_norm(x, y, row_norm(False, w, s), bias=b, dropping=drop)
        )
        check_alone(added, [x, y, branch_bias, weight, bias], f"added_norm, {drop is not None}")
    check_alone(lambda x, w: torch.stack(registry.forked_norm(x, row_norm(True, w))), [x, weight], "forked_norm")
    check_alone(lambda x, r: registry.dropout(x, dropping.keys, 0.3, residual=r), [x, y], "dropout")


def empty_residual_rows_stay_empty(device: torch.device, dtype: torch.dtype, registry: Registry) -> None:
    """No rows give no rows, and parameter gradients of 0."""
    x = torch.empty(0, 2, 6, device=device, dtype=dtype, requires_grad=True)
    weight = torch.ones(6, device=device, dtype=dtype, requires_grad=True)
    summed, normed = registry.added_norm(x, x, row_norm(False, weight, weight))
    (summed + normed).sum().backward()
    assert summed.shape == normed.shape == (0, 2, 6) and weight.grad is not None
    assert weight.grad.tolist() == [0.0] * 6
    assert registry.dropout(x, keys_of((0, 2, 6), device), 0.3).shape == (0, 2, 6)


def residual_cases() -> dict[str, Case]:
    """All cases by name."""
    cases: dict[str, Case] = {
        "residual_gradients_alone": residual_gradients_do_not_depend_on_which_are_needed,
        "dropout_row_keys": row_keys_case,
        "residual_empty_rows": empty_residual_rows_stay_empty,
        "residual_norms_fp32_parameters": residual_norms_accept_other_parameter_dtype,
    }
    for shape in ((1, 1), (3, 2, 37), (1, 1030)):
        name = "x".join(map(str, shape))
        cases[f"dropout_{name}"] = partial(dropout_case, shape)
        for is_rms in (False, True):
            kind = "rms" if is_rms else "layer"
            cases[f"forked_{kind}_norm_{name}"] = partial(forked_norm_case, is_rms, shape)
            cases[f"copied_{kind}_norm_{name}"] = partial(copied_norm_case, is_rms, shape)
            for drops in (False, True):
                dropping = "dropped_" if drops else ""
                cases[f"{dropping}added_{kind}_norm_{name}"] = partial(added_norm_case, is_rms, drops, shape)
    return cases
