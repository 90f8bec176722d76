"""The sink of losses: identities with known gradients, sums that count each term once, and mistakes as sentences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron3d.data.batch import GPTBatch
from megatron3d.models.stage import StageModules
from megatron3d.nn.inputs import LayerInputs
from megatron3d.nn.loss_sink import LossSink, LossSpec, OverTp, loss_problems
from megatron3d.nn.recompute import recomputed
from megatron3d.tensor.context import unsharded_context
from megatron3d.train.step import counts_of, objective

SPECS = (LossSpec("lm", "cross-entropy", "labels"), LossSpec("z", "squares", "positions", weight=0.5))
GRADIENTS = {"lm": 0.25, "z": 3.0}


def sink_of(*, tp_rank: int = 0, trains: bool = True) -> LossSink:
    return LossSink(SPECS, tp_rank=tp_rank, device=torch.device("cpu"), gradients=GRADIENTS if trains else None)


def test_a_term_gets_its_known_gradient_and_the_tensor_its_own() -> None:
    """d/dx of 2 sum(x) + 3 sum(x^2) is 2 + 6 x, in bf16 as well: the tensor that passes may have any type."""
    x = torch.tensor([1.0, -2.0], dtype=torch.bfloat16, requires_grad=True)
    y = sink_of().add(x, "z", x.float().square().sum(), over_tp="equal")
    assert torch.equal(y, x) and y.dtype == x.dtype
    (2 * y.float().sum()).backward()
    assert x.grad.tolist() == [2 + 6 * 1.0, 2 + 6 * -2.0]


def test_the_end_starts_the_backward_of_all_its_terms() -> None:
    a, b = torch.tensor(5.0, requires_grad=True), torch.tensor(7.0, requires_grad=True)
    sink = sink_of()
    sink.end({"lm": 2 * a, "z": b * b}).backward()
    assert (a.grad.item(), b.grad.item()) == (0.25 * 2, 3.0 * 2 * 7)
    assert sink.sums().tolist() == [10.0, 49.0] and sink.sums().dtype == torch.float64


@pytest.mark.parametrize(
    ("over_tp", "tp_rank", "counted"), [("equal", 0, 4.0), ("equal", 1, 0.0), ("partial", 0, 4.0), ("partial", 1, 4.0)]
)
def test_a_term_that_all_ranks_compute_is_reported_by_the_first(over_tp: OverTp, tp_rank: int, counted: float) -> None:
    sink = sink_of(tp_rank=tp_rank)
    x = torch.ones(1, requires_grad=True)
    sink.add(x, "z", x.sum() * 4, over_tp=over_tp).sum().backward()
    sink.add_hits("z", torch.tensor(4.0), over_tp=over_tp)
    assert sink.sums().tolist() == sink.hits().tolist() == [0.0, counted]
    assert x.grad.item() == 1 + 3.0 * 4, "every rank differentiates its own term"


def test_a_recomputed_forward_adds_nothing_and_gives_the_same_gradient() -> None:
    sink, calls = sink_of(), []

    def forward(x: Tensor) -> Tensor:
        calls.append("forward")
        y = x.sin()
        return sink.add(y, "z", y.exp().sum(), over_tp="equal").square()

    x = torch.linspace(-1, 1, 5, requires_grad=True)
    recomputed(forward, x, inputs=LayerInputs(losses=sink)).sum().backward()
    assert len(calls) == 2
    whole = x.detach().clone().requires_grad_()
    (whole.sin().square().sum() + 3.0 * whole.sin().exp().sum()).backward()
    torch.testing.assert_close(x.grad, whole.grad)
    torch.testing.assert_close(sink.sums(), torch.tensor([0.0, float(whole.detach().sin().exp().sum())]).double())


def test_without_gradients_the_tensor_itself_passes() -> None:
    sink, x = sink_of(trains=False), torch.ones(3, requires_grad=True)
    assert sink.add(x, "z", x.sum(), over_tp="equal") is x
    assert sink.sums().tolist() == [0.0, 3.0]


def test_an_objective_is_the_weighted_sum_of_means() -> None:
    assert objective(SPECS, {"lm": 4.0, "z": 10.0}) == 4.0 + 0.5 * 10.0


def test_mistakes_are_sentences() -> None:
    x = torch.ones(2)
    with pytest.raises(ValueError, match="declares no loss 'y'; it declares lm, z"):
        sink_of().add(x, "y", x.sum(), over_tp="equal")
    with pytest.raises(ValueError, match=r"'z' is torch.float32 of shape \(2,\); give a sum in fp32"):
        sink_of().add(x, "z", x, over_tp="equal")
    with pytest.raises(ValueError, match=r"'z' is torch\.bfloat16"):
        sink_of().add_hits("z", x.bfloat16().sum(), over_tp="equal")
    with pytest.raises(ValueError, match="two of these are alike: lm, z, lm"):
        StageModules(None, {}, None, (), unsharded_context(), (*SPECS, SPECS[0]))


def test_a_loss_whose_count_the_batch_does_not_have_is_named() -> None:
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    batch = GPTBatch(tokens, tokens, torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]))
    assert counts_of(SPECS, batch).tolist() == [3, 6]
    with pytest.raises(ValueError, match="the loss 'pair' is a mean over 'pairs', which a GPTBatch does not count"):
        counts_of([LossSpec("pair", "cross-entropy", "pairs")], batch)


def test_losses_that_contradict_one_another_are_named_all_at_once() -> None:
    sensible = (LossSpec("lm", "nats", "labels"), LossSpec("router-z", "z", "positions", 0.1, accuracy="balance"))
    assert loss_problems(sensible) == []
    twice, without_weight = LossSpec("lm", "z", "positions"), LossSpec("b", "z", "positions", float("nan"))
    as_text, clashing = LossSpec("c", "z", "positions", "0.1"), LossSpec("d/e", "z", "positions", accuracy="lm_loss")  # type: ignore[arg-type]
    doubled = LossSpec("f", "z", "positions", accuracy="balance")
    found = loss_problems((*sensible, twice, without_weight, as_text, clashing, doubled))
    expected = ("'lm'", "'d/e'", "nan", "'0.1'", "'lm_loss'", "'balance'")
    assert all(any(word in problem for problem in found) for word in expected) and len(found) == len(expected)
