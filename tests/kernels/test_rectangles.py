"""Attention over rectangles: against the formula with every score written out, whatever the plan."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron3d_kernels import rectangles as file
from megatron3d_kernels.launch import KernelError
from megatron3d_kernels.rectangles import Plan, Rectangle
from megatron3d_kernels.registry import Registry
from torch import Tensor

Core = Callable[[Tensor, Tensor, Tensor, Plan], Tensor]


def square(first: int, length: int, first_key: int | None = None) -> Rectangle:
    key = first if first_key is None else first_key
    return Rectangle(range(first, first + length), range(key, key + length), is_causal=True)


def full(queries: range, keys: range) -> Rectangle:
    return Rectangle(queries, keys, is_causal=False)


def inputs(
    queries: int, keys: int, *, samples: int = 1, groups: int = 2, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Of four query heads of size 8, [S, B, N, D] in memory as a layer has them, and the gradient of the output."""
    torch.manual_seed(queries + keys)
    shapes = [(queries, 4), (keys, groups), (keys, groups), (queries, 4)]
    made = [(1.5 * torch.randn(rows, samples, heads, 8)).to(dtype).permute(1, 2, 0, 3) for rows, heads in shapes]
    return [x.requires_grad_() for x in made[:3]] + made[3:]


def results(core: Core, q_k_v_grad: list[Tensor], plan: Plan) -> tuple[Tensor, ...]:
    """Output and gradients of q, k and v."""
    *q_k_v, grad = q_k_v_grad
    y = core(*q_k_v, plan)
    return (y, *torch.autograd.grad(y, q_k_v, grad.to(y.dtype)))


def errors(found: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> list[float]:
    """Of the output and each gradient, relative to its norm."""
    pairs = [(a.detach().double(), b.detach()) for a, b in zip(found, want)]
    return [float((a - b).norm() / b.norm().clamp(min=1.0)) for a, b in pairs]


def exact(q_k_v_grad: list[Tensor], plan: Plan) -> tuple[Tensor, ...]:
    *q_k_v, grad = (x.detach().double() for x in q_k_v_grad)
    return results(file.reference, [*(x.requires_grad_() for x in q_k_v), grad], plan)


@st.composite
def plans(draw: st.DrawFn) -> tuple[Plan, int, int]:
    """Rectangles without a common score, their queries and keys: in each band of queries, stretches of keys between
    gaps, full or causal squares, in any order; and the numbers of queries and keys."""
    keys = draw(st.integers(1, 40))

    def rectangles() -> tuple[Rectangle, ...]:
        made, query = [], 0
        for _ in range(draw(st.integers(0, 4))):
            query += draw(st.integers(0, 2))
            height, key = draw(st.integers(0, 12)), draw(st.integers(0, 3))
            while key < keys and draw(st.booleans()):
                width = draw(st.integers(0, keys - key))
                causal = width == height and draw(st.booleans())
                made.append(Rectangle(range(query, query + height), range(key, key + width), causal))
                key += width + draw(st.integers(0, 2))
            query += height
        return tuple(draw(st.permutations(made)))

    plan = tuple(rectangles() for _ in range(draw(st.integers(1, 3))))
    queries = max((r.queries.stop for of_sample in plan for r in of_sample), default=0)
    return plan, queries + draw(st.integers(1, 3)), keys


@given(plan_and_sizes=plans(), groups=st.sampled_from([1, 2, 4]))
@settings(max_examples=25, deadline=None)
def test_any_plan_gives_the_output_and_gradients_of_the_formula(
    plan_and_sizes: tuple[Plan, int, int], groups: int
) -> None:
    plan, queries, keys = plan_and_sizes
    given = inputs(queries, keys, samples=len(plan), groups=groups)
    assert max(errors(results(file.rectangle_attention, given, plan), exact(given, plan))) < 1e-5


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12), together=st.sampled_from([1, 16, 64]))
@settings(max_examples=12, deadline=None)
def test_documents_attend_to_themselves_whatever_shares_a_call(lengths: list[int], together: int) -> None:
    firsts = [sum(lengths[:n]) for n in range(len(lengths))]
    plan = [[square(first, length) for first, length in zip(firsts, lengths)]]
    given = inputs(sum(lengths), sum(lengths), samples=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file, "ROWS_TOGETHER", together)
        found = results(Registry().rectangle_attention, given, plan)
    assert max(errors(found, exact(given, plan))) < 1e-5


def test_short_documents_share_calls_with_small_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    of_call = file.ops.forward
    monkeypatch.setattr(
        file.ops, "forward", lambda q, *rest, **how: (rows.append(q.shape[2]), of_call(q, *rest, **how))[1]
    )
    file.forward(*inputs(1000, 1000)[:3], [[square(first, 4) for first in range(0, 1000, 4)]])
    assert rows == [64] * 15 + [40]


@pytest.mark.parametrize(
    "plan",
    [
        [[square(0, 40), square(40, 80)]],
        [[full(range(60, 120), range(60)), square(60, 60, 60)]],
        [[*(square(n, 9) for n in range(0, 117, 9))]],
    ],
)
def test_bf16_is_about_as_exact_as_the_formula_in_bf16(plan: Plan) -> None:
    """Products of probabilities in bf16 round as the formula's; nine positions a document have few to average over."""
    given = inputs(120, 120, dtype=torch.bfloat16)
    want = exact(given, plan)
    ours = errors(results(file.rectangle_attention, given, plan), want)
    theirs = errors(results(file.reference, given, plan), want)
    assert all(mine <= 1.5 * other for mine, other in zip(ours, theirs)), (ours, theirs)


def test_gradients_of_bf16_keys_in_many_rectangles_are_summed_in_fp32() -> None:
    given = inputs(2048, 8, groups=4, dtype=torch.bfloat16)
    one, many = [[full(range(2048), range(8))]], [[full(range(n, n + 8), range(8)) for n in range(0, 2048, 8)]]
    want = exact(given, one)
    ours, theirs = (errors(results(file.rectangle_attention, given, plan), want)[2:] for plan in (many, one))
    assert all(mine <= 1.3 * other for mine, other in zip(ours, theirs)), (ours, theirs)


def test_halves_computed_at_different_times_merge_to_the_whole() -> None:
    """As the steps of a ring: keys come in two parts, and the backward of each has the global output and log-sum."""
    q, k, v, grad = (x.detach() for x in inputs(64, 64))
    early = k[:, :, :24], v[:, :, :24], [[square(0, 24), full(range(24, 64), range(24))]]
    late = k[:, :, 24:], v[:, :, 24:], [[square(24, 40, first_key=0)]]
    out, log_sum = file.forward(q, *early)
    file.merge_(out, log_sum, *file.forward(q, *late))
    whole, log_sum_of_whole = file.forward(q, k, v, [[square(0, 64)]])
    torch.testing.assert_close((out, log_sum), (whole, log_sum_of_whole), rtol=1e-5, atol=1e-5)

    dq, dk, dv = file.backward(grad, q, k, v, whole, log_sum_of_whole, plan=[[square(0, 64)]])
    found = [file.backward(grad, q, k, v, out, log_sum, plan=plan) for k, v, plan in (early, late)]
    torch.testing.assert_close(found[0][0] + found[1][0], dq, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([dk for _, dk, _ in found], dim=2), dk, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([dv for _, _, dv in found], dim=2), dv, rtol=1e-5, atol=1e-5)


def test_a_query_in_no_rectangle_gets_zeros_and_stays_so_when_merged() -> None:
    q, k, v = (x.detach() for x in inputs(6, 4)[:3])
    out, log_sum = file.forward(q, k, v, [[full(range(2, 4), range(4))]])
    file.merge_(out, log_sum, *file.forward(q, k, v, [[]]))
    assert not out[:, :, [0, 1, 4, 5]].any() and out[:, :, 2:4].all()
    assert log_sum[0, 0].isinf().tolist() == [True, True, False, False, True, True]


def test_nothing_of_the_size_of_the_scores_is_kept_for_the_backward() -> None:
    q, k, v, _ = inputs(256, 256, groups=4)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
        file.rectangle_attention(q, k, v, [[square(0, 100), square(100, 156)]])
    assert sum(sizes) == 4 * q.numel() + 4 * 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_operators_take_the_arguments_and_give_the_shapes_of_the_cpu_ones(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """On meta tensors, so nothing about values."""
    monkeypatch.setattr(file.ops, "_on_cuda", lambda _: True)
    plan = [[square(0, 8), square(8, 8), full(range(16, 30), range(10)), square(16, 14, first_key=10)]]
    q, k, v = (torch.empty(2, heads, 30, 12, dtype=dtype, device="meta") for heads in (4, 2, 2))
    out, log_sum = file.forward(q, k, v, plan)
    gradients = file.backward(torch.empty_like(q), q, k, v, out, log_sum, plan=plan)
    assert [x.shape for x in (out, *gradients)] == [q.shape, q.shape, k.shape, v.shape]
    assert log_sum.shape == q.shape[:3] and {x.dtype for x in (out, *gradients)} == {dtype}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is available")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_gives_the_output_and_gradients_of_the_formula(dtype: torch.dtype) -> None:
    plan = [[square(0, 8), square(8, 8), full(range(16, 100), range(10)), square(16, 84, first_key=10)]]
    given = [x.detach().cuda() for x in inputs(100, 100, dtype=dtype)]
    given = [*(x.requires_grad_() for x in given[:3]), given[3]]
    want = exact(given, plan)
    ours, theirs = (errors(results(core, given, plan), want) for core in (file.rectangle_attention, file.reference))
    assert all(mine <= 1.3 * other + 1e-5 for mine, other in zip(ours, theirs)), (ours, theirs)


def test_bad_plans_are_refused_in_a_sentence() -> None:
    with pytest.raises(KernelError, match="3 queries and 4 keys"):
        Rectangle(range(3), range(4), is_causal=True)
    with pytest.raises(KernelError, match="plan for 2 samples was given with tensors of 3"):
        file.rectangle_attention(*inputs(4, 4, samples=3)[:3], [[], []])
