"""Loss scaling against Megatron-LM's scaler and against the rule in words."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron3d.config.sections.optim import OptimConfig
from megatron3d.errors import CheckpointError, ConfigError, NumericsError
from megatron3d.optim.scaler import LARGEST_SCALE, ConstantScale, DynamicScale, build_scaler


def megatron_scaler_class() -> type:
    """Megatron-LM's DynamicGradScaler, its file loaded alone with its tensors on the CPU instead of CUDA."""
    spec = importlib.util.find_spec("megatron")
    files = [
        Path(p) / "core" / "optimizer" / "grad_scaler.py" for p in (spec.submodule_search_locations if spec else ())
    ]
    files = [f for f in files if f.exists()]
    if not files:
        pytest.skip("megatron-core is not installed")
    file_spec = importlib.util.spec_from_file_location("megatron_grad_scaler_alone", files[0])
    module = importlib.util.module_from_spec(file_spec)
    file_spec.loader.exec_module(module)
    on_cpu = SimpleNamespace(
        float=torch.float, max=torch.max, tensor=lambda values, dtype, device: torch.tensor(values, dtype=dtype)
    )
    module.torch = on_cpu
    return module.DynamicGradScaler


@settings(max_examples=100, deadline=None)
@given(
    answers=st.lists(st.integers(0, 5).map(bool), max_size=120),
    window=st.integers(1, 7),
    hysteresis=st.integers(1, 3),
    minimum=st.sampled_from([1.0, 3.0, 64.0]),
)
def test_scale_equals_megatron_after_every_step(
    answers: list[bool], window: int, hysteresis: int, minimum: float
) -> None:
    theirs = megatron_scaler_class()(2.0**16, minimum, 2.0, 0.5, window, hysteresis)
    ours = DynamicScale(2.0**16, minimum, window=window, hysteresis=hysteresis)
    for finite in answers:
        theirs.update(not finite)
        ours.update(finite)
        assert ours.scale == theirs.scale.item()


def test_scale_falls_only_after_the_hysteresis_and_then_with_every_overflow() -> None:
    scaler = DynamicScale(64.0, 1.0, window=2, hysteresis=2)
    seen = []
    for finite in (False, True, False, False, True, True, False, False):
        scaler.update(finite)
        seen.append(scaler.scale)
    # The finite step between the first two overflows does not renew the hysteresis; growth does.
    assert seen == [64, 64, 32, 16, 16, 32, 32, 16]


def test_overflow_at_the_smallest_scale_ends_the_run() -> None:
    scaler = DynamicScale(4.0, 3.0, window=10, hysteresis=1)
    scaler.update(False)
    assert scaler.scale == 3.0
    with pytest.raises(NumericsError, match="--min-loss-scale 3"):
        scaler.update(False)
    assert NumericsError.exit_code == 5


@settings(max_examples=200, deadline=None)
@given(answers=st.lists(st.booleans(), max_size=60), window=st.integers(1, 5), hysteresis=st.integers(1, 4))
def test_a_fixed_scale_ends_the_run_where_a_dynamic_one_at_its_minimum_would(
    answers: list[bool], window: int, hysteresis: int
) -> None:
    """The dynamic one neither shrinks at its minimum nor grows beyond the largest scale: both only count."""

    def steps_until_the_end(scaler: ConstantScale | DynamicScale) -> int:
        for number, finite in enumerate(answers):
            try:
                scaler.update(finite)
            except NumericsError:
                return number
        return len(answers)

    fixed = ConstantScale(LARGEST_SCALE, window=window, hysteresis=hysteresis)
    dynamic = DynamicScale(LARGEST_SCALE, LARGEST_SCALE, window=window, hysteresis=hysteresis)
    assert steps_until_the_end(fixed) == steps_until_the_end(dynamic)


@settings(max_examples=100, deadline=None)
@given(before=st.lists(st.booleans(), max_size=20), after=st.lists(st.booleans(), max_size=20))
def test_a_resumed_fixed_scale_counts_on(before: list[bool], after: list[bool]) -> None:
    unbroken, resumed = (ConstantScale(8.0, window=3, hysteresis=50) for _ in range(2))
    for finite in before:
        unbroken.update(finite)
    resumed.load(json.loads(json.dumps(unbroken.state())))
    for finite in after:
        unbroken.update(finite)
        resumed.update(finite)
    assert resumed.state() == unbroken.state()


def test_a_checkpoint_without_counters_starts_a_fixed_scale_anew() -> None:
    scaler = ConstantScale(8.0)
    scaler.load({"kind": "constant"})
    assert scaler.state() == ConstantScale(8.0).state()
    with pytest.raises(NumericsError, match="fixed --loss-scale 8, which cannot shrink"):
        for _ in range(2):
            scaler.update(False)


def test_growth_stops_at_the_largest_power_of_two_in_fp32() -> None:
    scaler = DynamicScale(LARGEST_SCALE / 2, 1.0, window=1, hysteresis=2)
    for _ in range(3):
        scaler.update(True)
    assert torch.tensor(scaler.scale, dtype=torch.float32).isfinite() and scaler.scale == LARGEST_SCALE


@settings(max_examples=100, deadline=None)
@given(before=st.lists(st.booleans(), max_size=30), after=st.lists(st.booleans(), max_size=30))
def test_resumed_scaler_goes_on_exactly(before: list[bool], after: list[bool]) -> None:
    unbroken, resumed = (DynamicScale(2.0**40, 2.0**-60, window=3, hysteresis=2) for _ in range(2))
    for finite in before:
        unbroken.update(finite)
    resumed.load(json.loads(json.dumps(unbroken.state())))
    for finite in after:
        unbroken.update(finite)
        resumed.update(finite)
        assert resumed.scale == unbroken.scale


def test_changing_the_kind_of_scale_takes_the_values_of_the_flags() -> None:
    dynamic, constant = DynamicScale(256.0, 1.0, window=1, hysteresis=1), ConstantScale(8.0)
    dynamic.update(True)
    constant.load(dynamic.state())
    assert constant.scale == 8.0
    dynamic.load(constant.state())
    assert dynamic.scale == 512.0


@pytest.mark.parametrize("change", [{"scale": float("inf")}, {"scale": 0.0}, {"finite_steps": None}])
def test_damaged_state_is_refused(change: dict[str, Any]) -> None:
    scaler = DynamicScale(256.0, 1.0, window=1, hysteresis=1)
    state = {k: v for k, v in (scaler.state() | change).items() if v is not None}
    with pytest.raises(CheckpointError):
        scaler.load(state)


@pytest.mark.parametrize(
    ("optim", "scale"),
    [
        (OptimConfig(lr=1e-3), 1.0),
        (OptimConfig(lr=1e-3, bf16=True, loss_scale=128.0), 1.0),
        (OptimConfig(lr=1e-3, fp16=True, loss_scale=128.0), 128.0),
        (OptimConfig(lr=1e-3, fp16=True), 2.0**32),
    ],
)
def test_flags_choose_the_scaler(optim: OptimConfig, scale: float) -> None:
    scaler = build_scaler(optim)
    assert scaler.scale == scale
    assert isinstance(scaler, DynamicScale) == (optim.fp16 and optim.loss_scale is None)


@pytest.mark.parametrize(
    ("optim", "words"),
    [
        (OptimConfig(lr=1e-3, fp16=True, loss_scale=0.0), "--loss-scale"),
        (OptimConfig(lr=1e-3, fp16=True, min_loss_scale=2.0, initial_loss_scale=1.0), "--initial-loss-scale"),
        (OptimConfig(lr=1e-3, fp16=True, loss_scale_window=0, hysteresis=0), "--loss-scale-window(.|\n)*--hysteresis"),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(optim: OptimConfig, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_scaler(optim)
