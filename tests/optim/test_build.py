"""Fused optimizers over flat parameters against torch's plain ones over separate ones; state that can be loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from megatron3d.config.sections.optim import OptimConfig
from megatron3d.optim.build import (
    build_optimizer,
    set_grad_scale,
    set_rates,
    set_step_count,
    state_bytes,
    state_names,
    step_count,
    write_copies,
)

SHAPES, DECAYS = [(6, 5), (7,), (3, 4)], [True, False, True]
RATES = [(0.1, 0.2), (0.05, 0.1), (0.02, 0.0), (0.2, 0.3)]  # (learning rate, weight decay) of each step
ADAM = OptimConfig(lr=1e-3, optimizer="adam", adam_beta1=0.8, adam_beta2=0.95, adam_eps=1e-6)
SGD = OptimConfig(lr=1e-3, optimizer="sgd", sgd_momentum=0.7)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def wholes() -> list[nn.Parameter]:
    return [nn.Parameter(random(*shape, seed=number)) for number, shape in enumerate(SHAPES)]


def flat_parameters() -> list[tuple[nn.Parameter, bool]]:
    """The decaying parameters as one flat parameter, and the other cut into two at an odd place."""
    values = [whole.detach().flatten() for whole in wholes()]
    parts = [(torch.cat([values[0], values[2]]), True), (values[1][:3].clone(), False), (values[1][3:].clone(), False)]
    return [(nn.Parameter(part), decays) for part, decays in parts]


def to_flat(whole: list[Tensor]) -> list[Tensor]:
    flat = [one.flatten() for one in whole]
    return [torch.cat([flat[0], flat[2]]), flat[1][:3], flat[1][3:]]


def gradients(step: int) -> list[Tensor]:
    return [random(*shape, seed=100 * step + number + 50) for number, shape in enumerate(SHAPES)]


def step_flat(optimizer: torch.optim.Optimizer, parts: list[tuple[nn.Parameter, bool]], step: int) -> None:
    for (part, _), grad in zip(parts, to_flat(gradients(step))):
        part.grad = grad.clone()
    set_rates(optimizer, lr=RATES[step][0], weight_decay=RATES[step][1])
    optimizer.step()


def plain_adam(groups: list[dict]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=1.0, betas=(0.8, 0.95), eps=1e-6, foreach=False, fused=False)


def plain_sgd(groups: list[dict]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=1.0, momentum=0.7, foreach=False, fused=False)


@pytest.mark.parametrize(("config", "plain"), [(ADAM, plain_adam), (SGD, plain_sgd)], ids=["adam", "sgd"])
def test_flat_parameters_are_updated_as_whole_parameters_are(
    config: OptimConfig, plain: Callable[[list[dict]], torch.optim.Optimizer]
) -> None:
    parts, whole = flat_parameters(), wholes()
    optimizer = build_optimizer(config, parts)
    reference = plain([{"params": [one], "decays": decays} for one, decays in zip(whole, DECAYS)])
    for step, (lr, weight_decay) in enumerate(RATES):
        step_flat(optimizer, parts, step)
        for group in reference.param_groups:
            group.update(lr=lr, weight_decay=weight_decay if group["decays"] else 0.0)
        for one, grad in zip(whole, gradients(step)):
            one.grad = grad
        reference.step()
        for (part, _), expected in zip(parts, to_flat([one.detach() for one in whole])):
            torch.testing.assert_close(part.detach(), expected)
    for name in state_names(config):
        expected_states = to_flat([reference.state[one][name] for one in whole])
        for (part, _), expected in zip(parts, expected_states):
            torch.testing.assert_close(optimizer.state[part][name], expected)


def fused_adam(groups: list[dict]) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, betas=(0.8, 0.95), eps=1e-6, decoupled_weight_decay=True, fused=True)


def fused_sgd(groups: list[dict]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, momentum=0.7, fused=True)


@pytest.mark.parametrize(("config", "fused"), [(ADAM, fused_adam), (SGD, fused_sgd)], ids=["adam", "sgd"])
def test_updates_are_those_of_torchs_own_optimizer_to_the_bit(
    config: OptimConfig, fused: Callable[[list[dict]], torch.optim.Optimizer]
) -> None:
    parts, others = flat_parameters(), flat_parameters()
    optimizer = build_optimizer(config, parts)
    reference = fused(
        [{"params": [p for p, its in others if its == decays], "decays": decays} for decays in (True, False)]
    )
    for step in range(len(RATES)):
        step_flat(optimizer, parts, step)
        step_flat(reference, others, step)
    assert all(torch.equal(one, other) for (one, _), (other, _) in zip(parts, others))


@pytest.mark.parametrize("config", [ADAM, SGD], ids=["adam", "sgd"])
def test_state_is_there_before_the_first_step_and_stays_where_it_is(config: OptimConfig) -> None:
    parts = flat_parameters()
    optimizer = build_optimizer(config, parts)
    states = [optimizer.state[part][name] for part, _ in parts for name in state_names(config)]
    assert all(torch.count_nonzero(state) == 0 for state in states)
    assert state_bytes(optimizer) == sum(state.numel() * 4 for state in states)
    step_flat(optimizer, parts, 0)
    after = [optimizer.state[part][name] for part, _ in parts for name in state_names(config)]
    assert all(old is new and torch.count_nonzero(new) > 0 for old, new in zip(states, after))


@pytest.mark.parametrize("config", [ADAM, SGD], ids=["adam", "sgd"])
def test_going_on_from_stored_state_and_count_changes_no_bit(config: OptimConfig) -> None:
    parts = flat_parameters()
    optimizer = build_optimizer(config, parts)
    step_flat(optimizer, parts, 0)
    step_flat(optimizer, parts, 1)
    again = [(nn.Parameter(part.detach().clone()), decays) for part, decays in parts]
    resumed = build_optimizer(config, again)
    for (new, _), (old, _) in zip(again, parts):
        for name in state_names(config):
            resumed.state[new][name].copy_(optimizer.state[old][name])
    set_step_count(resumed, step_count(optimizer))
    for step in (2, 3):
        step_flat(optimizer, parts, step)
        step_flat(resumed, again, step)
    assert all(torch.equal(new, old) for (new, _), (old, _) in zip(again, parts))
    assert step_count(resumed) == step_count(optimizer)


@pytest.mark.parametrize("config", [ADAM, SGD], ids=["adam", "sgd"])
def test_updates_are_counted(config: OptimConfig) -> None:
    parts = flat_parameters()
    optimizer = build_optimizer(config, parts)
    assert step_count(optimizer) == 0
    for step in range(3):
        step_flat(optimizer, parts, step)
    assert step_count(optimizer) == 3


@pytest.mark.parametrize("decays", [True, False])
def test_a_rank_may_own_nothing_that_decays_or_nothing_that_does_not(decays: bool) -> None:
    part = nn.Parameter(torch.ones(4))
    optimizer = build_optimizer(ADAM, [(part, decays)])
    part.grad = torch.zeros(4)
    set_rates(optimizer, lr=0.5, weight_decay=0.1)
    optimizer.step()
    torch.testing.assert_close(part.detach(), torch.full((4,), 1 - 0.5 * 0.1 if decays else 1.0))


def test_a_rank_without_parameters_has_an_optimizer_that_does_nothing() -> None:
    optimizer = build_optimizer(ADAM, [])
    set_rates(optimizer, lr=0.5, weight_decay=0.1)
    optimizer.step()
    assert step_count(optimizer) == 0 and state_bytes(optimizer) == 0


@pytest.mark.parametrize("name", ["adam", "lion", "sgd"])
@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_a_scale_given_to_the_step_is_one_applied_to_the_gradients_and_copies_follow(name: str, moments: str) -> None:
    """To the bit, as on a CPU all do; the copies of all parameters are their values, rounded."""
    kept = {"exp_avg_dtype": moments if name != "sgd" else "fp32"}
    config = replace(ADAM, optimizer=name, **kept)
    given, scaled = flat_parameters(), flat_parameters()
    optimizer, plain = build_optimizer(config, given), build_optimizer(config, scaled)
    copies = {part: torch.empty(part.shape, dtype=torch.bfloat16) for part, _ in given}
    assert write_copies(optimizer, copies)
    for step, scale in enumerate((0.3, 1.0, 2.0)):
        assert set_grad_scale(optimizer, scale)
        step_flat(optimizer, given, step)
        for (part, _), grad in zip(scaled, to_flat(gradients(step))):
            part.grad = grad * scale
        set_rates(plain, lr=RATES[step][0], weight_decay=RATES[step][1])
        plain.step()
        for (part, _), (expected, _) in zip(given, scaled):
            assert torch.equal(part, expected)
            assert torch.equal(copies[part], part.detach().bfloat16())


def test_an_optimizer_of_others_scales_no_gradients_and_writes_no_copies() -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    assert not set_grad_scale(optimizer, 0.5) and not write_copies(optimizer, {})
    assert all("grad_scale" not in group for group in optimizer.param_groups)
