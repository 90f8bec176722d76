"""The kernels on a GPU: what the default rule picks there is Triton, and it holds every case."""

from __future__ import annotations

import pytest
import torch
from megatron3d_kernels import KERNEL_NAMES, Registry, products

from tests.kernels.cases import CASES
from tests.kernels.kernel_cases import DTYPES, layer_norm_case, rms_norm_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is available"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_compiled_triton_equals_the_float64_formula(case: str, dtype: str) -> None:
    CASES[case](torch.device("cuda"), DTYPES[dtype], Registry("triton"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_reference_on_a_gpu_equals_the_float64_formula(case: str, dtype: str) -> None:
    CASES[case](torch.device("cuda"), DTYPES[dtype], Registry("reference"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_more_rows_than_backward_programs(dtype: str) -> None:
    for case in (layer_norm_case, rms_norm_case):
        case((1200, 33), torch.device("cuda"), DTYPES[dtype], Registry("triton"))


@pytest.mark.parametrize("kernel", KERNEL_NAMES)
def test_default_rule_picks_triton_on_a_gpu(kernel: str) -> None:
    assert Registry().choose(kernel, "cuda", torch.bfloat16).implementation == "triton"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weight_gradients_are_added_to_fp32_buffers_inside_of_the_product(dtype: str) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    assert products.adds_in_fp32(device)
    grad, x = (torch.randn(300, width, device=device).to(DTYPES[dtype]) for width in (136, 72))
    wanted, largest = grad.double().t() @ x.double(), grad.double().t().abs() @ x.double().abs()
    for first in (1.0, 0.0):
        buffer = torch.full((136, 72), first or torch.nan, device=device)
        Registry().add_weight_gradient(buffer, grad, x, overwrites=first == 0)
        assert bool(((buffer.double() - first - wanted).abs() <= 3e-6 * (1 + largest)).all())
