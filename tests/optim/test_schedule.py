"""The schedules against Megatron-LM's own scheduler, against formulas, and what a resume makes of two of them."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron3d.config.sections.optim import OptimConfig
from megatron3d.config.sections.train import TrainConfig
from megatron3d.errors import CheckpointError, ConfigError
from megatron3d.optim.schedule import ScheduleSettings, lr_at, reconcile, settings_from_config, weight_decay_at

GLOBAL_BATCH = 24
# Both sides evaluate the same closed formula in double precision; only the order of a few operations may differ.
RELATIVE = 1e-12


@pytest.fixture
def megatron_scheduler(monkeypatch: pytest.MonkeyPatch) -> type:
    """Megatron-LM's OptimizerParamScheduler, its file loaded alone: the whole package takes seconds and warns."""
    spec = importlib.util.find_spec("megatron")
    files = [
        Path(p) / "core" / "optimizer_param_scheduler.py" for p in (spec.submodule_search_locations if spec else ())
    ]
    files = [f for f in files if f.exists()]
    if not files:
        pytest.skip("megatron-core is not installed")
    for name in ("megatron.core", "megatron.core.utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["megatron.core.utils"], "log_single_rank", lambda *a, **k: None, raising=False)
    file_spec = importlib.util.spec_from_file_location("megatron_scheduler_alone", files[0])
    module = importlib.util.module_from_spec(file_spec)
    file_spec.loader.exec_module(module)
    return module.OptimizerParamScheduler


def reference(cls: type, optim: OptimConfig, train: TrainConfig) -> tuple[Any, dict[str, float]]:
    """Megatron-LM's scheduler for the same flags, set up as its training script does, and the group it writes to."""
    g = train.global_batch_size
    by_samples = train.train_samples is not None
    if by_samples:
        decay = optim.lr_decay_samples or train.train_samples
        warmup, wsd, length = optim.lr_warmup_samples, optim.lr_wsd_decay_samples, train.train_samples
    else:
        decay = (optim.lr_decay_iters or train.train_iters) * g
        warmup, length = optim.lr_warmup_iters * g, train.train_iters * g
        wsd = None if optim.lr_wsd_decay_iters is None else optim.lr_wsd_decay_iters * g
    if optim.lr_warmup_fraction is not None:
        warmup = optim.lr_warmup_fraction * decay
    constant = optim.weight_decay_incr_style == "constant"
    group: dict[str, float] = {}
    scheduler = cls(
        SimpleNamespace(param_groups=[group]),
        init_lr=optim.lr_warmup_init,
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay,
        lr_decay_style=optim.lr_decay_style,
        start_wd=optim.weight_decay if constant else optim.start_weight_decay,
        end_wd=optim.weight_decay if constant else optim.end_weight_decay,
        wd_incr_steps=length,
        wd_incr_style=optim.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=False,
        wsd_decay_steps=wsd,
        lr_wsd_decay_style=optim.lr_wsd_decay_style,
    )
    return scheduler, group


def compare_every_step(cls: type, optim: OptimConfig, train: TrainConfig, num_steps: int) -> None:
    """Walk Megatron-LM's scheduler and ask ours at each step, as a training loop would."""
    scheduler, group = reference(cls, optim, train)
    for k in range(num_steps):
        at = {"iteration": k, "consumed_samples": k * train.global_batch_size}
        assert lr_at(optim, train, **at) == pytest.approx(group["lr"], rel=RELATIVE, abs=1e-20), (k, optim)
        assert weight_decay_at(optim, train, **at) == pytest.approx(group["weight_decay"], rel=RELATIVE), (k, optim)
        scheduler.step(train.global_batch_size)


STYLES = [
    ("constant", "exponential"),
    ("linear", "exponential"),
    ("cosine", "exponential"),
    ("inverse-square-root", "exponential"),
    *[("WSD", last) for last in ("exponential", "linear", "cosine", "minus_sqrt")],
]
WARMUPS: list[dict[str, Any]] = [
    {},
    {"lr_warmup_iters": 7, "lr_warmup_init": 1e-6},
    {"lr_warmup_fraction": 0.13},
    {"lr_warmup_iters": 1},
]


@pytest.mark.parametrize(("style", "last"), STYLES)
def test_rates_equal_megatron_at_every_iteration_and_past_the_end(
    megatron_scheduler: type, style: str, last: str
) -> None:
    for warmup, decay_iters, weight_decay in itertools.product(WARMUPS, (None, 41), ("constant", "linear", "cosine")):
        bounds = {} if weight_decay == "constant" else {"start_weight_decay": 0.01, "end_weight_decay": 0.3}
        optim = OptimConfig(
            lr=3e-4,
            min_lr=1e-5,
            lr_decay_style=style,
            lr_wsd_decay_style=last,
            lr_wsd_decay_iters=11 if style == "WSD" else None,
            lr_decay_iters=decay_iters,
            weight_decay_incr_style=weight_decay,
            **bounds,
            **warmup,
        )
        compare_every_step(
            megatron_scheduler,
            optim,
            TrainConfig(micro_batch_size=1, global_batch_size=GLOBAL_BATCH, train_iters=50),
            56,
        )


@pytest.mark.parametrize(("style", "last"), STYLES)
def test_rates_equal_megatron_when_the_options_count_samples(megatron_scheduler: type, style: str, last: str) -> None:
    for warmup in ({"lr_warmup_samples": 100}, {"lr_warmup_fraction": 0.21}, {}):
        optim = OptimConfig(
            lr=1e-3,
            min_lr=1e-4,
            lr_decay_style=style,
            lr_decay_samples=700,
            lr_wsd_decay_style=last,
            lr_wsd_decay_samples=150 if style == "WSD" else None,
            weight_decay_incr_style="cosine",
            start_weight_decay=0.0,
            end_weight_decay=0.1,
            **warmup,
        )
        compare_every_step(
            megatron_scheduler,
            optim,
            TrainConfig(micro_batch_size=1, global_batch_size=GLOBAL_BATCH, train_samples=800),
            40,
        )


def test_first_step_uses_the_start_of_the_warmup_and_the_peak_comes_at_its_end() -> None:
    optim = OptimConfig(lr=1.0, lr_warmup_iters=4, lr_decay_style="linear", lr_warmup_init=0.2)
    train = TrainConfig(micro_batch_size=1, global_batch_size=8, train_iters=10)
    rates = [lr_at(optim, train, iteration=k, consumed_samples=8 * k) for k in range(12)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == pytest.approx([5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0.0, 0.0])


def test_warmup_by_iterations_does_not_stretch_while_the_batch_ramps_up() -> None:
    optim = OptimConfig(lr=1.0, lr_warmup_iters=4)
    train = TrainConfig(micro_batch_size=1, global_batch_size=32, train_iters=10, rampup_batch_size=("8", "8", "96"))
    assert lr_at(optim, train, iteration=4, consumed_samples=48) == 1.0


@settings(max_examples=200, deadline=None)
@given(
    style=st.sampled_from(STYLES),
    decay=st.integers(2, 500),
    warmup=st.floats(0, 0.99),
    low=st.floats(0, 1),
    iteration=st.integers(0, 600),
)
def test_rate_stays_between_its_limits_and_never_rises_after_the_warmup(
    style: tuple[str, str], decay: int, warmup: float, low: float, iteration: int
) -> None:
    optim = OptimConfig(
        lr=1.0,
        min_lr=low,
        lr_decay_style=style[0],
        lr_wsd_decay_style=style[1],
        lr_wsd_decay_iters=max(1, decay // 3),
        lr_warmup_fraction=warmup,
    )
    plan = settings_from_config(optim, TrainConfig(micro_batch_size=1, global_batch_size=4, train_iters=decay))
    now = plan.lr_at(iteration=iteration, consumed_samples=4 * iteration)
    after = plan.lr_at(iteration=iteration + 1, consumed_samples=4 * iteration + 4)
    assert 0.0 <= now <= 1.0 + 1e-12
    if iteration >= warmup * decay:
        assert low - 1e-12 <= after <= now + 1e-12


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lr": None}, "--lr"),
        ({"lr_decay_style": "WSD"}, "--lr-wsd-decay-iters"),
        ({"lr_warmup_iters": 100}, "--lr-warmup-iters"),
        ({"lr_warmup_iters": 3, "lr_warmup_fraction": 0.1}, "--lr-warmup-fraction"),
        ({"min_lr": 2.0}, "--min-lr"),
        ({"lr_warmup_init": 2.0}, "--lr-warmup-init"),
        ({"weight_decay_incr_style": "linear"}, "--start-weight-decay"),
        ({"start_weight_decay": 0.1}, "--start-weight-decay"),
        (
            {"weight_decay_incr_style": "cosine", "start_weight_decay": 0.2, "end_weight_decay": 0.1},
            "--end-weight-decay",
        ),
        ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 101}, "--lr-wsd-decay-iters"),
    ],
)
def test_options_that_give_no_schedule_are_refused_by_name(change: dict[str, Any], words: str) -> None:
    optim = dataclasses.replace(OptimConfig(lr=1.0), **change)
    with pytest.raises(ConfigError, match=words):
        settings_from_config(optim, TrainConfig(micro_batch_size=1, global_batch_size=8, train_iters=100))


def test_settings_survive_json_exactly_and_a_missing_name_is_refused() -> None:
    plan = make_plan(lr_warmup_fraction=0.013)
    stored = json.loads(json.dumps(plan.to_json()))
    assert ScheduleSettings.from_json(stored) == plan
    del stored["warmup"]
    with pytest.raises(CheckpointError, match="warmup"):
        ScheduleSettings.from_json(stored)


def make_plan(train_iters: int = 100, batch: int = 8, **optim: Any) -> ScheduleSettings:
    """Settings of a cosine schedule with some options changed."""
    config = OptimConfig(**{"lr": 0.1, "lr_decay_style": "cosine", **optim})
    return settings_from_config(
        config, TrainConfig(micro_batch_size=1, global_batch_size=batch, train_iters=train_iters)
    )


def test_resume_with_another_schedule_names_options_values_and_the_two_flags() -> None:
    saved, flags = make_plan(), make_plan(lr=0.05, lr_warmup_iters=5)
    with pytest.raises(ConfigError) as error:
        reconcile(saved, flags, override=False, use_checkpoint=False)
    text = str(error.value)
    for words in (
        "--lr: checkpoint 0.1, flags 0.05",
        "--lr-warmup-iters or --lr-warmup-fraction: checkpoint 0, flags 5",
        "--override-opt-param-scheduler",
        "--use-checkpoint-opt_param-scheduler",
    ):
        assert words in text
    assert reconcile(saved, flags, override=True, use_checkpoint=False) is flags
    assert reconcile(saved, flags, override=False, use_checkpoint=True) is saved
    with pytest.raises(ConfigError, match="only one"):
        reconcile(saved, flags, override=True, use_checkpoint=True)


def test_resume_from_iterations_to_samples_names_the_two_ways_of_counting() -> None:
    by_samples = settings_from_config(
        OptimConfig(lr=0.1), TrainConfig(micro_batch_size=1, global_batch_size=8, train_samples=800)
    )
    with pytest.raises(ConfigError, match="--train-iters or --train-samples: checkpoint iterations, flags samples"):
        reconcile(make_plan(), by_samples, override=False, use_checkpoint=False)


def test_training_longer_is_a_conflict_for_a_cosine_but_not_for_a_constant_rate() -> None:
    with pytest.raises(ConfigError, match="--train-iters: checkpoint 100, flags 200"):
        reconcile(make_plan(100), make_plan(200), override=False, use_checkpoint=False)
    short, long = (make_plan(n, lr_decay_style="constant") for n in (100, 200))
    assert reconcile(short, long, override=False, use_checkpoint=False) == long


def test_another_constant_weight_decay_is_no_conflict_and_that_of_the_flags_is_taken() -> None:
    saved, flags = make_plan(weight_decay=0.01), make_plan(weight_decay=0.3)
    assert reconcile(saved, flags, override=False, use_checkpoint=False) == flags
    assert flags.weight_decay_at(iteration=3, consumed_samples=24) == 0.3
    assert reconcile(saved, flags, override=False, use_checkpoint=True) == saved


def test_a_weight_decay_that_begins_or_ends_to_rise_is_a_conflict_and_so_is_another_rate_beside_a_decay() -> None:
    rising = {"weight_decay_incr_style": "linear", "start_weight_decay": 0.0, "end_weight_decay": 0.3}
    for saved, flags, words in (
        (make_plan(), make_plan(**rising), "--weight-decay-incr-style: checkpoint constant"),
        (make_plan(**rising), make_plan(), "--weight-decay-incr-style: checkpoint linear"),
        (make_plan(**rising), make_plan(**{**rising, "end_weight_decay": 0.2}), "--end-weight-decay: checkpoint 0.3"),
        (make_plan(), make_plan(weight_decay=0.3, lr=0.05), "--lr: checkpoint 0.1, flags 0.05"),
    ):
        with pytest.raises(ConfigError, match=words):
            reconcile(saved, flags, override=False, use_checkpoint=False)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_two_schedules_that_reconcile_give_the_same_rates(data: st.DataObject) -> None:
    def draw() -> ScheduleSettings:
        style = data.draw(st.sampled_from(["constant", "linear", "inverse-square-root", "WSD"]))
        rising = data.draw(st.booleans())
        bounds = {"weight_decay_incr_style": "linear", "start_weight_decay": 0.0, "end_weight_decay": 0.01}
        return make_plan(
            data.draw(st.sampled_from([20, 30])),
            data.draw(st.sampled_from([4, 8])),
            lr_decay_style=style,
            lr_warmup_iters=data.draw(st.sampled_from([0, 3])),
            lr_warmup_init=data.draw(st.sampled_from([0.0, 0.01])),
            lr_wsd_decay_iters=data.draw(st.sampled_from([5, 6])),
            lr_wsd_decay_style=data.draw(st.sampled_from(["linear", "cosine"])),
            **(bounds if rising else {}),
        )

    first, second = draw(), draw()
    try:
        reconcile(first, second, override=False, use_checkpoint=False)
    except ConfigError:
        return
    for k in range(20):
        at = {"iteration": k, "consumed_samples": 0}
        assert first.lr_at(**at) == pytest.approx(second.lr_at(**at), rel=RELATIVE)
        assert first.weight_decay_at(**at) == second.weight_decay_at(**at)
