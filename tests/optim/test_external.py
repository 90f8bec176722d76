"""NVIDIA's fused Adam by name: packages made for the test stand in for apex and Transformer Engine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from megatron3d.config.sections.optim import OptimConfig
from megatron3d.errors import ConfigError
from megatron3d.optim.build import build_optimizer, set_rates, set_step_count, state_bytes, step_count

# As in apex and Transformer Engine: steps are counted in the group, state that exists is taken as it is.
FUSED_ADAM = """
import torch

class FusedAdam(torch.optim.Optimizer):
    def __init__(self, params, lr, betas, eps, weight_decay, adam_w_mode, **more):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.adam_w_mode, self.more, self.initialized = adam_w_mode, more, 0
        {extra}

    def initialize_state(self, parameter, store_param_remainders):
        assert not store_param_remainders
        self.initialized += 1
        for name in ("exp_avg", "exp_avg_sq"):
            self.state[parameter][name] = torch.zeros_like(parameter, dtype=self.more[name + "_dtype"])

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            group["step"] = group["step"] + 1 if "step" in group else 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                m, v = self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"]
                grad = p.grad if self.adam_w_mode else p.grad + group["weight_decay"] * p
                m.mul_(beta1).add_(grad, alpha=1 - beta1)
                v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                m_hat, v_hat = m / (1 - beta1 ** group["step"]), v / (1 - beta2 ** group["step"])
                update = m_hat / (v_hat.sqrt() + group["eps"])
                if self.adam_w_mode:
                    update = update + group["weight_decay"] * p
                p.sub_(group["lr"] * update)
"""
MODULES = {"apex": "apex/optimizers", "transformer-engine": "transformer_engine/pytorch/optimizers"}


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory whose packages can be imported during one test, before any that is installed."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] in ("apex", "transformer_engine")]:
            del sys.modules[name]

    forget()
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    forget()


def write(packages: Path, implementation: str, *, extra: str = "pass") -> None:
    folder = packages
    for part in MODULES[implementation].split("/"):
        folder = folder / part
        folder.mkdir()
        (folder / "__init__.py").write_text("")
    (folder / "__init__.py").write_text(FUSED_ADAM.replace("{extra}", extra))


def flat_parameters() -> list[tuple[nn.Parameter, bool]]:
    values = torch.randn(12, generator=torch.Generator().manual_seed(0))
    return [(nn.Parameter(values[:7].clone()), True), (nn.Parameter(values[7:].clone()), False)]


def three_steps(optimizer: torch.optim.Optimizer, parts: list[tuple[nn.Parameter, bool]], *, first: int = 0) -> None:
    for step in range(first, first + 3):
        for number, (part, _) in enumerate(parts):
            part.grad = torch.randn(part.shape, generator=torch.Generator().manual_seed(10 * step + number))
        set_rates(optimizer, lr=0.05, weight_decay=0.2)
        optimizer.step()


@pytest.mark.parametrize("implementation", MODULES)
@pytest.mark.parametrize("decoupled", [True, False])
def test_the_named_implementation_is_used_and_updates_as_torch_does(
    packages: Path, implementation: str, decoupled: bool
) -> None:
    write(packages, implementation)
    config = OptimConfig(
        lr=1e-3, optimizer_implementation=implementation, decoupled_weight_decay=decoupled, adam_eps=1e-6
    )
    ours, theirs = flat_parameters(), flat_parameters()
    optimizer = build_optimizer(config, theirs)
    assert type(optimizer).__name__ == "FusedAdam" and state_bytes(optimizer) == 2 * 4 * 12
    reference = build_optimizer(OptimConfig(lr=1e-3, decoupled_weight_decay=decoupled, adam_eps=1e-6), ours)
    for built, parts in ((optimizer, theirs), (reference, ours)):
        three_steps(built, parts)
    assert step_count(optimizer) == step_count(reference) == 3
    for (found, _), (expected, _) in zip(theirs, ours, strict=True):
        torch.testing.assert_close(found, expected)


def test_going_on_from_stored_state_and_count_equals_going_on(packages: Path) -> None:
    write(packages, "apex")
    config, parts = OptimConfig(lr=1e-3, optimizer_implementation="apex"), flat_parameters()
    optimizer = build_optimizer(config, parts)
    three_steps(optimizer, parts)
    again = [(nn.Parameter(part.detach().clone()), decays) for part, decays in parts]
    resumed = build_optimizer(config, again)
    for (new, _), (old, _) in zip(again, parts, strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            resumed.state[new][name].copy_(optimizer.state[old][name])
    set_step_count(resumed, step_count(optimizer))
    for built, these in ((optimizer, parts), (resumed, again)):
        three_steps(built, these, first=3)
    assert all(torch.equal(new, old) for (new, _), (old, _) in zip(again, parts, strict=True))


def test_transformer_engine_allocates_its_own_bf16_moments(packages: Path) -> None:
    write(packages, "transformer-engine")
    config = OptimConfig(lr=1e-3, optimizer_implementation="transformer-engine", exp_avg_dtype="bf16")
    parts = flat_parameters()
    optimizer = build_optimizer(config, parts)
    assert optimizer.initialized == 2
    assert {optimizer.state[part]["exp_avg"].dtype for part, _ in parts} == {torch.bfloat16}
    assert {optimizer.state[part]["exp_avg_sq"].dtype for part, _ in parts} == {torch.float32}


def test_a_rank_that_updates_nothing_needs_no_groups(packages: Path) -> None:
    write(packages, "apex")
    optimizer = build_optimizer(OptimConfig(lr=1e-3, optimizer_implementation="apex"), [])
    set_rates(optimizer, lr=0.1, weight_decay=0.1)
    optimizer.step()
    assert state_bytes(optimizer) == 0


@pytest.mark.parametrize("implementation", MODULES)
def test_a_package_that_is_not_there_is_named_with_where_to_get_it(packages: Path, implementation: str) -> None:
    with pytest.raises(ConfigError, match=rf"--optimizer-implementation {implementation} is not installed; .*NVIDIA/"):
        build_optimizer(OptimConfig(lr=1e-3, optimizer_implementation=implementation), flat_parameters())


def test_another_package_of_that_name_is_not_taken_for_it(packages: Path) -> None:
    (packages / "apex").mkdir()
    (packages / "apex" / "__init__.py").write_text("__version__ = '0.9.10.dev0'  # a toolkit for web applications\n")
    with pytest.raises(ConfigError, match=r"names a package that is not NVIDIA's: .*apex.*has no apex\.optimizers"):
        build_optimizer(OptimConfig(lr=1e-3, optimizer_implementation="apex"), flat_parameters())


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("import a_library_that_nobody_has", "cannot be imported .*a_library_that_nobody_has"),
        ("raise ImportError('libcudart.so.12: cannot open shared object file')", "cannot be imported .*libcudart"),
    ],
)
def test_a_package_that_does_not_load_says_why(packages: Path, text: str, problem: str) -> None:
    write(packages, "apex")
    (packages / "apex" / "__init__.py").write_text(text)
    with pytest.raises(ConfigError, match=problem):
        build_optimizer(OptimConfig(lr=1e-3, optimizer_implementation="apex"), flat_parameters())


def test_a_package_built_without_cuda_says_so(packages: Path) -> None:
    write(packages, "apex", extra="raise RuntimeError('FusedAdam requires cuda extensions')")
    with pytest.raises(ConfigError, match=r"does not build its FusedAdam here .*requires cuda extensions"):
        build_optimizer(OptimConfig(lr=1e-3, optimizer_implementation="apex"), flat_parameters())
