"""What whole runs report: curves by Megatron-LM's names, speed and memory in the metrics file, times, skipped steps."""

from __future__ import annotations

import math
import re
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from tests.dist.pool import Pool
from tests.runs.harness import LOG_TIME, MOCK, VOCAB_SIZE, on_rank, records, run_ok, steps, words
from tests.train.test_megatron_names import OVER_SAMPLES, OVER_STEPS, curves

# Multiplications and additions of one token of MOCK's model, forward and backward (2 layers, H 32, S 16):
# 12 H^2 weights and 4HS of attention a layer, and the output layer.
FLOPS_PER_TOKEN = 3 * (2 * (2 * 12 * 32**2 + VOCAB_SIZE * 32) + 2 * 4 * 32 * 16)
TOKENS = 8 * 16


def test_tensorboard_has_megatrons_curves_with_the_values_of_the_metrics_file(tmp_path: Path) -> None:
    metrics, events = tmp_path / "m.jsonl", tmp_path / "events"
    options = "--fp16 --initial-loss-scale 1024 --eval-iters 1 --eval-interval 3 --peak-tflops 2"
    run_ok(MOCK, options, "--metrics-file", metrics, "--tensorboard-dir", events)
    found = curves(events)
    assert set(found) == {".", "vs_samples"}
    assert set(found["."]) >= OVER_STEPS and set(found["vs_samples"]) == OVER_SAMPLES
    names = {
        "lm loss": "loss",
        "learning-rate": "lr",
        "grad-norm": "grad_norm",
        "batch-size": "batch_size",
        "loss-scale": "loss_scale",
        "iteration-time": "step_time_s",
        "throughput": "tflops_per_device",
    }
    for theirs, ours in names.items():
        values = [record[ours] for record in steps(metrics)]
        assert found["."][theirs] == [(k, pytest.approx(v)) for k, v in enumerate(values, start=1)], theirs
        if f"{theirs} vs samples" in OVER_SAMPLES:
            expected = [(8 * k, pytest.approx(v)) for k, v in enumerate(values, start=1)]
            assert found["vs_samples"][f"{theirs} vs samples"] == expected, theirs
    valid = {record["step"]: record["valid_loss"] for record in records(metrics) if "valid_loss" in record}
    assert found["."]["lm loss validation"] == [(k, pytest.approx(v)) for k, v in valid.items()]
    assert found["."]["lm loss validation ppl"] == [(k, pytest.approx(math.exp(v))) for k, v in valid.items()]
    assert [step for step, _ in found["vs_samples"]["lm loss validation vs samples"]] == [24, 48]


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_metrics_file_has_time_speed_memory_and_tokens_of_each_step(
    pool: Pool, tmp_path: Path, world_size: int
) -> None:
    metrics = tmp_path / "m.jsonl"
    argv = words(MOCK, "--peak-tflops 2 --metrics-file", metrics)
    assert [ended.code for ended in pool.run(world_size, on_rank, argv)] == [0] * world_size
    for number, record in enumerate(steps(metrics), start=1):
        assert record["consumed_tokens"] == TOKENS * number
        assert 0 < record["step_time_s"] < 60
        assert record["tokens_per_second"] == pytest.approx(TOKENS / record["step_time_s"])
        tflops = FLOPS_PER_TOKEN * TOKENS / record["step_time_s"] / 1e12 / world_size
        assert record["tflops_per_device"] == pytest.approx(tflops)
        assert record["mfu"] == pytest.approx(tflops / 2)
        assert 1 << 26 < record["peak_memory_bytes"] < 1 << 40, "a process that has imported torch"


def test_what_a_pipeline_reports_at_its_start_is_the_same_work_on_every_rank(pool: Pool, tmp_path: Path) -> None:
    """Frozen parameters are counted over the pipeline, so a rank that only listened would wait for ever."""
    options = "--freeze-params layers.0.* --zero-stage 2 --hidden-dropout 0.1 --train-iters 2 --metrics-file"
    run_ok(MOCK, options, tmp_path / "one.jsonl")
    argv = words(MOCK, options, tmp_path / "two.jsonl", "--pipeline-model-parallel-size 2")
    ended = pool.run(2, on_rank, argv, timeout_s=60)
    assert [one.code for one in ended] == [0, 0]
    assert "parameters are frozen (--freeze-params layers.0.*)" in ended[0].out
    losses = [[record["loss"] for record in steps(tmp_path / f"{name}.jsonl")] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_mfu_is_left_out_where_the_peak_of_the_device_is_not_known(tmp_path: Path) -> None:
    run_ok(MOCK, "--train-iters 1 --iterations-to-skip 0 --metrics-file", tmp_path / "m.jsonl")
    (left_out,) = steps(tmp_path / "m.jsonl")
    assert left_out["consumed_tokens"] == TOKENS and "step_time_s" not in left_out
    run_ok(MOCK, "--train-iters 1 --metrics-file", tmp_path / "m.jsonl")
    (made,) = steps(tmp_path / "m.jsonl")
    assert "tflops_per_device" in made and "mfu" not in made


def test_the_lines_of_the_log_have_the_time_of_day(tmp_path: Path) -> None:
    before = datetime.now() - timedelta(seconds=1)  # the stamps have no fractions
    ended = run_ok(MOCK, "--eval-iters 1 --save", tmp_path)
    after = datetime.now()
    log = ended.out[ended.out.index("[") :].splitlines()
    kinds = ("step 1/6", "validation after step 6", "saved ", "starting from", "test after step 6")
    assert all(any(kind in line for line in log) for kind in kinds)
    times = [datetime.fromisoformat(LOG_TIME.match(line)[1]) for line in log]
    assert times == sorted(times) and before <= times[0] and times[-1] <= after


def test_steps_skipped_before_a_resume_stay_counted_in_the_log(tmp_path: Path) -> None:
    """A loss scale of 2**120 overflows until it has halved often enough; a checkpoint is made on the way."""

    def skipped(*options: str | Path) -> list[int]:
        fp16 = f"--fp16 --initial-loss-scale {2**120} --hysteresis 1"
        return [int(number) for number in re.findall(r"\| skipped (\d+)", run_ok(MOCK, fp16, *options).out)]

    whole = skipped("--metrics-file", tmp_path / "m.jsonl")
    assert whole == [1, 2, 3, 4, 5, 6] and all(record["skipped"] for record in steps(tmp_path / "m.jsonl"))
    first = skipped("--train-iters 4 --save", tmp_path / "c")
    assert first + skipped("--save", tmp_path / "c") == whole
    assert skipped("--load", tmp_path / "c", "--finetune --train-iters 2") == [1, 2], "a fine-tuning counts anew"
