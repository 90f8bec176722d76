"""Megatron-LM's names for curves, beside what its training_log and evaluate_and_print_results write."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

from megatron3d.config.sections.train import TrainConfig
from megatron3d.train.megatron_names import evaluation_scalars, step_scalars
from megatron3d.train.metrics import StepRecord
from megatron3d.train.trackers import Trackers
from tests.train.test_metrics import START, one_step
from tests.train.test_writers import backdate

# Megatron-LM's arguments of add_scalar with each switch of a report on, for a dense model: copied by hand from its
# megatron/training/training.py, without what only --log-params-norm, --log-memory-to-tensorboard and the like add.
OVER_STEPS = {
    "learning-rate",
    "batch-size",
    "lm loss",
    "loss-scale",
    "grad-norm",
    "iteration-time",
    "throughput",
    "lm loss validation",
    "lm loss validation ppl",
}
OVER_SAMPLES = {
    "learning-rate vs samples",
    "batch-size vs samples",
    "lm loss vs samples",
    "loss-scale vs samples",
    "grad-norm vs samples",
    "lm loss validation vs samples",
    "lm loss validation ppl vs samples",
}

Points = list[tuple[int, float]]


def curves(directory: Path) -> dict[str, dict[str, Points]]:
    """All curves of the TensorBoard runs below a directory, as TensorBoard itself reads them: run, name, points."""
    events = EventMultiplexer().AddRunsFromDirectory(str(directory)).Reload()
    return {
        run: {name: [(e.step, e.value) for e in events.Scalars(run, name)] for name in tags["scalars"]}
        for run, tags in events.Runs().items()
    }


def full_step(step: int, loss: float = 3.0) -> StepRecord:
    """A step of 8 samples with everything that a record may have."""
    return one_step(step, loss, batch_size=8, loss_scale=256.0, step_time_s=0.5, tflops_per_device=4.0)


def test_a_step_has_the_values_of_its_record_by_megatrons_names() -> None:
    assert step_scalars(full_step(2)) == {
        "lm loss": 3.0,
        "learning-rate": 1e-4,
        "batch-size": 8.0,
        "grad-norm": 1.0,
        "loss-scale": 256.0,
        "iteration-time": 0.5,
        "throughput": 4.0,
        "samples vs steps": 16.0,
    }


def test_the_two_losses_of_a_bert_have_megatrons_names_and_their_sum_has_none() -> None:
    found = step_scalars(one_step(1, 3.5, losses={"lm_loss": 3.0, "sentence_loss": 0.5}))
    assert {name: value for name, value in found.items() if "loss" in name} == {
        "lm loss": 3.0,
        "sop loss": 0.5,
        "loss-scale": 1.0,  # Megatron-LM draws it without fp16 too
    }
    assert set(evaluation_scalars({"lm": 3.0, "sentence": 0.5})) == {
        "lm loss validation",
        "lm loss validation ppl",
        "sop loss validation",
        "sop loss validation ppl",
    }


def test_a_perplexity_is_bounded_as_in_megatron_and_never_overflows() -> None:
    for loss, exponent in ((2.0, 2.0), (21.0, 20.0), (1e6, 20.0), (math.inf, 20.0)):
        assert evaluation_scalars({"lm": loss})["lm loss validation ppl"] == math.exp(exponent)


def test_an_iteration_that_is_left_out_draws_nothing_by_megatrons_names() -> None:
    assert step_scalars(StepRecord(3, None, None, 1e-4, 24, 0.0, skipped=True, batch_size=8)) == {}


def test_after_a_resume_every_curve_has_each_point_once_over_steps_and_over_samples(tmp_path: Path) -> None:
    """The first run was killed after step 6, beyond its checkpoint of step 3."""
    for first, last, loss in ((1, 6, 1.0), (4, 7, 2.0)):
        trackers = Trackers(TrainConfig(micro_batch_size=1, global_batch_size=1, tensorboard_dir=str(tmp_path)))
        trackers.open(START, run={}, resumed_step=first - 1, resumed_samples=8 * (first - 1))
        for step in range(first, last + 1):
            trackers.step(full_step(step, loss))
            trackers.evaluation(step, loss, {}, losses={"lm": loss}, consumed_samples=8 * step)
        trackers.close()
        backdate(tmp_path)
    found = curves(tmp_path)
    values = [1.0] * 3 + [2.0] * 4
    for name in ("loss", "lm loss", "lm loss validation"):
        assert found["."][name] == [*zip(range(1, 8), values, strict=True)], name
    for name in ("lm loss vs samples", "lm loss validation vs samples"):
        assert found["vs_samples"][name] == [*zip(range(8, 57, 8), values, strict=True)], name
    assert set(found["."]) >= OVER_STEPS and set(found["vs_samples"]) == OVER_SAMPLES


def test_weights_and_biases_gets_megatrons_names_over_steps_and_none_over_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logged: dict[int, set[str]] = {}

    class Run:
        """Notes the names it is given."""

        def log(self, scalars: dict[str, float], step: int) -> None:
            """A point."""
            logged.setdefault(step, set()).update(scalars)

        def finish(self) -> None:
            """The end."""

    module = ModuleType("wandb")
    module.init = lambda **_: Run()
    monkeypatch.setitem(sys.modules, "wandb", module)
    trackers = Trackers(TrainConfig(micro_batch_size=1, global_batch_size=1, wandb_project="p"))
    trackers.open(START, run={}, resumed_step=0)
    trackers.step(full_step(1))
    trackers.evaluation(1, 3.0, {}, losses={"lm": 3.0}, consumed_samples=8)
    trackers.close()
    assert logged.keys() == {1}
    assert logged[1] >= OVER_STEPS | {"samples vs steps", "loss", "lr"}
    assert not any(name.endswith("vs samples") for name in logged[1])
