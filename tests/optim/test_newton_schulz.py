"""The Newton-Schulz iteration against singular values, and a whole Muon against torch's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from megatron3d.config.sections.optim import OptimConfig
from megatron3d.optim.build import build_optimizer, set_rates, state_bytes
from megatron3d.optim.muon import Muon
from megatron3d.optim.newton_schulz import COEFFICIENTS, orthogonalize, update_scale
from megatron3d.params.owned_slice import OwnedSlice
from megatron3d.params.spec import Init, ParamSpec

# Rounding of fp32, through a slope of up to 485 at singular values near 0.
FP32_TOLERANCE = 1e-4


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(
    st.integers(1, 12), st.integers(1, 12), st.sampled_from(list(COEFFICIENTS)), st.integers(1, 7), st.integers(0, 99)
)
@settings(max_examples=60)
def test_singular_values_go_through_the_polynomial_and_singular_vectors_stay(
    rows: int, columns: int, kind: str, num_steps: int, seed: int
) -> None:
    matrix = random(rows, columns, seed=seed)
    found = orthogonalize(matrix, coefficients=COEFFICIENTS[kind], num_steps=num_steps, dtype=torch.float32)
    u, s, vh = torch.linalg.svd(matrix.double() / matrix.double().norm(), full_matrices=False)
    for step in range(num_steps):
        a, b, c = COEFFICIENTS[kind][step % len(COEFFICIENTS[kind])]
        s = a * s + b * s**3 + c * s**5
    assert (found.double() - u * s @ vh).abs().max() < FP32_TOLERANCE


@pytest.mark.parametrize("kind", COEFFICIENTS)
@pytest.mark.parametrize("shape", [(64, 64), (32, 96), (96, 32)])
def test_five_iterations_bring_all_singular_values_near_one(kind: str, shape: tuple[int, int]) -> None:
    matrix = random(*shape, seed=5)
    found = orthogonalize(matrix, coefficients=COEFFICIENTS[kind], num_steps=5, dtype=torch.float32)
    values = torch.linalg.svdvals(found)
    before = torch.linalg.svdvals(matrix)
    well_above_zero = values[before > 0.03 * matrix.norm()]
    assert well_above_zero.min() > 0.6 and values.max() < 1.3


def test_a_matrix_of_zeros_stays_one() -> None:
    found = orthogonalize(torch.zeros(3, 4), coefficients=COEFFICIENTS["simple"], num_steps=5, dtype=torch.float32)
    assert torch.equal(found, torch.zeros(3, 4))


@pytest.mark.parametrize(
    ("mode", "wide", "tall"), [("shape_scaling", 1.0, 2.0), ("spectral", 8.0, 8.0), ("unit_rms_norm", 0.5, 2.0)]
)
def test_scales_are_those_of_megatron(mode: str, wide: float, tall: float) -> None:
    assert update_scale(16, 64, mode) == wide and update_scale(64, 16, mode) == tall


@given(st.integers(1, 300), st.integers(1, 300))
def test_a_spectral_scale_gives_an_orthogonal_matrix_elements_of_size_one(rows: int, columns: int) -> None:
    root_mean_square = (min(rows, columns) / (rows * columns)) ** 0.5
    assert update_scale(rows, columns, "spectral") * root_mean_square == pytest.approx(1.0)


class Alone:
    """The parameters of one process, each a flat parameter of its own."""

    def __init__(self, parameters: Sequence[nn.Parameter], specs: Sequence[ParamSpec]) -> None:
        self._portions = [
            OwnedSlice(spec, 1, 0, 0, spec.numel, parameter, 0)
            for parameter, spec in zip(parameters, specs, strict=True)
        ]

    def owned_slices(self) -> Sequence[OwnedSlice]:
        return self._portions

    def sum_over_ranks(self, shares: Sequence[Tensor]) -> list[Tensor]:
        return list(shares)

    def map_full(
        self,
        owned_slices: Sequence[OwnedSlice],
        values: Sequence[Tensor],
        function: Callable[[ParamSpec, Tensor], Tensor],
    ) -> None:
        for owned, value in zip(owned_slices, values, strict=True):
            value.copy_(function(owned.spec, value.view(owned.spec.shape)).flatten())


def test_a_whole_muon_equals_torch_with_its_choices() -> None:
    """torch's iteration is in bf16 with the coefficients "simple" and Nesterov's momentum."""
    config = OptimConfig(
        lr=1e-3,
        optimizer="muon",
        muon_momentum=0.95,
        muon_nesterov=True,
        muon_scale_mode="shape_scaling",
        muon_coefficient_type="simple",
        muon_fp32_matmul_prec="medium",
    )
    shapes = [(12, 20), (20, 12), (9, 9)]
    specs = [ParamSpec(f"p{i}", shape, Init("zeros"), decays=True) for i, shape in enumerate(shapes)]
    parts = [nn.Parameter(random(*shape, seed=i).flatten()) for i, shape in enumerate(shapes)]
    whole = [nn.Parameter(random(*shape, seed=i)) for i, shape in enumerate(shapes)]
    optimizer = build_optimizer(config, [(part, True) for part in parts], Alone(parts, specs))
    reference = torch.optim.Muon(whole, lr=0.1, weight_decay=0.2, momentum=0.95)
    for step in range(5):
        for number, (part, one) in enumerate(zip(parts, whole, strict=True)):
            grad = random(*shapes[number], seed=50 + 10 * step + number)
            part.grad, one.grad = grad.flatten().clone(), grad
        set_rates(optimizer, lr=0.1, weight_decay=0.2)
        optimizer.step()
        reference.step()
    for part, one in zip(parts, whole, strict=True):
        torch.testing.assert_close(part.view(one.shape), one, rtol=1e-5, atol=1e-5)


def test_fused_parts_are_matrices_of_their_own_unless_told_otherwise() -> None:
    spec = ParamSpec("qkv", (8, 6), Init("zeros"), decays=True, tp_dim=0, parts=(4, 2, 2))
    matrix = random(8, 6, seed=1)

    def orthogonal(config: OptimConfig) -> Tensor:
        return Muon([{"params": []}], config, Alone([], [])).orthogonal(spec, matrix)

    split, fused = OptimConfig(lr=1e-3, optimizer="muon"), OptimConfig(lr=1e-3, optimizer="muon", muon_split_qkv=False)
    found, steps = orthogonal(split), {"coefficients": COEFFICIENTS["quintic"], "num_steps": 5, "dtype": torch.float32}
    for part, (low, high) in zip(found.split([4, 2, 2]), [(0, 4), (4, 6), (6, 8)], strict=True):
        torch.testing.assert_close(part, orthogonalize(matrix[low:high], **steps) * 6**0.5)
    torch.testing.assert_close(orthogonal(fused), orthogonalize(matrix, **steps) * 8**0.5)


def test_muon_keeps_one_moment_of_hidden_matrices_and_two_of_everything_else() -> None:
    specs = [
        ParamSpec("matrix", (6, 5), Init("zeros"), decays=True),
        ParamSpec("table", (7, 5), Init("zeros"), decays=True, is_table=True),
        ParamSpec("bias", (6,), Init("zeros"), decays=False),
    ]
    parts = [nn.Parameter(torch.zeros(spec.numel)) for spec in specs]
    flat_parameters = [(part, spec.decays) for part, spec in zip(parts, specs, strict=True)]
    optimizer = build_optimizer(OptimConfig(lr=1e-3, optimizer="muon"), flat_parameters, Alone(parts, specs))
    names = [sorted(name for name in optimizer.state[part] if name != "step") for part in parts]
    assert names == [["momentum_buffer"], ["exp_avg", "exp_avg_sq"], ["exp_avg", "exp_avg_sq"]]
    assert state_bytes(optimizer) == 4 * (30 + 2 * 35 + 2 * 6)
    adafactor = build_optimizer(OptimConfig(lr=1e-3, optimizer="adafactor"), flat_parameters, Alone(parts, specs))
    assert state_bytes(adafactor) == 4 * (6 + 5 + 7 + 5 + 6), "a number per row and column, and the vector"
