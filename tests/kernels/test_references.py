"""The torch references, in this process, on CPU: against float64 formulas, gradcheck and Hugging Face.

transformers' models take seconds to import, so the two tests that need them import them.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from megatron3d_kernels import ACTIVATIONS, GATED_ACTIVATIONS, KernelError, Registry
from megatron3d_kernels import cross_entropy as cross_entropy_file
from megatron3d_kernels import layer_norm as layer_norm_file
from megatron3d_kernels import rms_norm as rms_norm_file

from tests.kernels.cases import CASES
from tests.kernels.kernel_cases import DTYPES, assert_close, gate_formula, sharded_cross_entropy

REFERENCE = Registry("reference")
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_reference_equals_the_float64_formula(case: str, dtype: str) -> None:
    CASES[case](CPU, DTYPES[dtype], REFERENCE)


@pytest.mark.parametrize("case", CASES)
def test_default_registry_gives_the_same_on_cpu(case: str) -> None:
    CASES[case](CPU, torch.float32, Registry())


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_several_chunks_of_rows_equal_the_float64_formula(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in (layer_norm_file, rms_norm_file):
        monkeypatch.setattr(file, "NORM_CHUNK_ELEMENTS", 4 * 37)  # six rows of 37: a full chunk and a part of one
    for case in ("layer_norm_3x2x37", "rms_norm_3x2x37"):
        CASES[case](CPU, DTYPES[dtype], REFERENCE)


def test_rotary_equals_hugging_face_llama() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotary

    q, k = torch.randn(2, 3, 7, 16), torch.randn(2, 1, 7, 16)
    frequencies = 10000.0 ** (-torch.arange(0, 16, 2).float() / 16)
    angles = torch.arange(7)[None, :, None] * frequencies + torch.tensor([0.0, 2.0])[:, None, None]
    both = torch.cat([angles, angles], -1)
    want_q, want_k = llama_rotary(q, k, both.cos(), both.sin())
    # fp32 on both sides: two products and a sum, values up to about 5.
    torch.testing.assert_close(REFERENCE.apply_rotary(q, angles.cos(), angles.sin()), want_q, atol=2e-6, rtol=0)
    torch.testing.assert_close(REFERENCE.apply_rotary(k, angles.cos(), angles.sin()), want_k, atol=2e-6, rtol=0)


def test_interleaved_rotary_equals_hugging_face_gptj() -> None:
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as gptj_rotary

    x_BSND = torch.randn(2, 7, 3, 16)
    angles = torch.arange(7)[:, None] * 10000.0 ** (-torch.arange(0, 16, 2).float() / 16)
    want = gptj_rotary(x_BSND, angles.sin()[None], angles.cos()[None])
    got = REFERENCE.apply_rotary(x_BSND.transpose(1, 2), angles.cos(), angles.sin(), True).transpose(1, 2)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=0)


def test_rotary_keeps_the_order_of_a_transposed_input_in_memory() -> None:
    x_BNSD = torch.randn(5, 2, 3, 8).permute(1, 2, 0, 3)
    angles = torch.randn(5, 4)
    assert REFERENCE.apply_rotary(x_BNSD, angles.cos(), angles.sin()).stride() == x_BNSD.stride()


@pytest.mark.parametrize("kind", GATED_ACTIVATIONS)
def test_gated_activation_passes_gradcheck_in_float64(kind: str) -> None:
    gate, up = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda g, u: REFERENCE.gated_activation(g, u, kind), (gate, up))
    assert torch.autograd.gradcheck(lambda both: REFERENCE.fused_gated_activation(both, kind), (up,))


def test_cross_entropy_pieces_keep_float64() -> None:
    logits, target = torch.randn(2, 3, 24, dtype=torch.float64), torch.randint(0, 22, (2, 3))
    loss, _ = sharded_cross_entropy(
        logits, target, torch.ones(2, 3, dtype=torch.float64), (2, 12, 22), REFERENCE, in_place=False
    )
    want = F.cross_entropy(logits[..., :22].reshape(6, 22), target.reshape(6), reduction="none").view(2, 3)
    torch.testing.assert_close(loss, want, atol=1e-14, rtol=1e-14)


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activation_equals_its_formula(kind: str, dtype: str) -> None:
    x = torch.linspace(-6, 6, 301).to(DTYPES[dtype])
    wide = x.double()
    formulas = {
        "gelu": gate_formula(wide, "geglu"),
        "gelu_tanh": wide / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3))),
        "relu": wide.clamp(min=0),
        "squared_relu": wide.clamp(min=0) ** 2,
        "silu": gate_formula(wide, "swiglu"),
    }
    assert_close(REFERENCE.activation(x, kind), formulas[kind], DTYPES[dtype], kind)


@pytest.mark.parametrize("overwrite", [False, True])
def test_cross_entropy_reference_never_holds_the_logits_in_fp32(overwrite: bool) -> None:
    """The largest tensor that any operation makes stays at the chunk size, far below the logits."""
    logits = torch.randn(64, 32 * 1024, dtype=torch.bfloat16)
    target, numbers = torch.randint(0, 32 * 1024, (64,)), torch.ones(64)
    recorder = _LargestResult()
    with recorder:
        REFERENCE.local_softmax_sums(logits, target, 0, 32 * 1024, overwrite=overwrite)
        rows = (target, numbers, numbers, numbers, numbers)
        shard = {"vocab_start": 0, "num_valid": 32 * 1024}
        REFERENCE.cross_entropy_backward(logits, *rows, **shard, in_place=True, overwritten=overwrite)
    assert recorder.elements <= cross_entropy_file.CHUNK_ELEMENTS < logits.numel()


def test_cross_entropy_backward_in_place_allocates_far_less_than_the_logits() -> None:
    """Counted by the allocator, which sees what torch's operators make inside of them."""
    logits, numbers = torch.zeros(64, 32 * 1024, dtype=torch.bfloat16), torch.ones(64)
    rows = (torch.arange(64), numbers, numbers, numbers, numbers)
    shard = {"vocab_start": 0, "num_valid": 32 * 1024}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        REFERENCE.cross_entropy_backward(logits, *rows, **shard, in_place=True, overwritten=True)
    assert 0 < max(event.cpu_memory_usage for event in profile.events()) <= logits.nbytes / 2


def test_a_sure_model_gets_the_gradient_of_its_target_as_exactly_as_without_overwriting() -> None:
    """1 - p is far smaller than the rounding of p to bf16 where the target is nearly certain."""
    logits = torch.zeros(1, 8, dtype=torch.bfloat16)
    logits[0, 3] = 9.0
    target, ones = torch.tensor([3]), torch.ones(1)
    want = (logits.double().softmax(-1) - F.one_hot(target, 8)).float()
    own_max, sum_exp, target_logit = REFERENCE.local_softmax_sums(logits, target, 0, 8, overwrite=True)
    rows = (target, own_max, sum_exp, target_logit, ones)
    grad = REFERENCE.cross_entropy_backward(logits, *rows, vocab_start=0, num_valid=8, overwritten=True)
    torch.testing.assert_close(grad.float(), want, rtol=2**-7, atol=0)


class _LargestResult(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the largest fp32 tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            self.elements = max(self.elements, result.numel())
        return result


def test_unsuitable_arguments_are_refused_with_their_values() -> None:
    x = torch.randn(2, 3, 4, 6)
    angles = torch.randn(4, 4)
    with pytest.raises(KernelError, match=r"cos \(4, 4\)"):
        REFERENCE.apply_rotary(x, angles, angles)
    with pytest.raises(KernelError, match=r"cos \(3, 3\)"):
        REFERENCE.apply_rotary(x, angles[:3, :3], angles[:3, :3])
    with pytest.raises(KernelError, match="'swish' does not exist; use one of gelu"):
        REFERENCE.activation(x, "swish")
    with pytest.raises(KernelError, match="'gelu' does not exist; use one of swiglu"):
        REFERENCE.fused_gated_activation(x, "gelu")
    with pytest.raises(KernelError, match="odd last dimension, 5"):
        REFERENCE.swiglu(x[..., :5])
    with pytest.raises(KernelError, match=r"\(2, 3, 4, 6\).*\(2, 3, 4, 5\)"):
        REFERENCE.gated_activation(x, x[..., :5], "swiglu")
    with pytest.raises(KernelError, match="num_valid is 7, but the shard has 6 columns"):
        REFERENCE.local_max(x, 7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_definitions_that_a_compiler_fuses_equal_the_float64_formula(
    case: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    CASES[case](CPU, DTYPES[dtype], Registry())


@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11 compiles these into wrong gradients, silently")
def test_references_trace_without_graph_breaks() -> None:
    """torch.compile must see through the choice of an implementation."""

    def block(x: torch.Tensor, weight: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        x = REFERENCE.rms_norm(x, weight) + REFERENCE.layer_norm(x, weight)
        return REFERENCE.apply_rotary(REFERENCE.fused_gated_activation(x, "swiglu"), angles.cos(), angles.sin())

    arguments = [torch.randn(2, 3, 4, 8, requires_grad=True), torch.randn(8, requires_grad=True), torch.randn(4, 2)]
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    want, got = block(*arguments), compiled(*arguments)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got.sum(), arguments[:2]), torch.autograd.grad(want.sum(), arguments[:2])):
        torch.testing.assert_close(a, b)
