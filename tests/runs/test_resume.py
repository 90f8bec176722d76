"""Stopping and going on: the same losses bit for bit at the same layout, nearly the same at another, nothing lost."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron3d.checkpoint.load import assemble, tensor_shapes
from tests.dist.pool import Pool
from tests.runs.harness import (
    MOCK,
    Fault,
    Launcher,
    exit_status,
    losses,
    on_rank,
    records,
    run,
    run_ok,
    steps,
    words,
)

# Sums in another order: fp32 rounding, amplified by a few optimizer steps. Measured: under 1e-6.
OTHER_LAYOUT = 1e-5
DROPOUT = "--hidden-dropout 0.1 --attention-dropout 0.1"
WRITTEN = "--pipeline-model-parallel-layout E|t|t|L"
LAYOUTS = {
    "one process": ("", 1),
    "TP2 x PP2 with sequence parallelism": (
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel",
        4,
    ),
    "DP2": ("", 2),
    "DP2 with ZeRO 1": ("--zero-stage 1", 2),
    "PP2": ("--pipeline-model-parallel-size 2", 2),
    "PP2 on a V": ("--pipeline-model-parallel-size 2 --pipeline-schedule zb-v " + WRITTEN, 2),
    "PP2 interleaved, DP2 with ZeRO 3": (
        "--pipeline-model-parallel-size 2 --zero-stage 3 " + WRITTEN,
        4,
    ),
}


def _train(pool: Pool, layout: str, *options: str | Path) -> None:
    """Train at a layout, in the pool, and fail unless every rank ended well."""
    flags, world_size = LAYOUTS[layout]
    argv = words(MOCK, flags, *options)
    for ended in pool.run(world_size, on_rank, argv):
        assert ended.code == 0, ended.err


def _same(first: list[float], second: list[float], tolerance: float) -> None:
    worst = max(abs(a - b) / abs(a) for a, b in zip(first, second, strict=True))
    assert worst <= tolerance, f"relative difference {worst}: {first} and {second}"


def _state(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "state.json").read_text())


# --- The same layout: bit for bit -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", ["", "--zero-stage 1", "--pipeline-model-parallel-size 2"], ids=["DP2", "Z1", "PP2"]
)
def test_a_run_whose_rank_was_killed_goes_on_bit_for_bit(launcher: Launcher, tmp_path: Path, options: str) -> None:
    """Steps 1 to 5 before the kill with a checkpoint at 3; the restart redoes 4 and 5, and each stands there once."""
    common = words(MOCK, DROPOUT, options, "--train-iters 8 --save-interval 3 --eval-iters 1 --eval-interval 2")
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    with launcher.job([*common, *words("--metrics-file", whole, "--save", tmp_path / "other")], 2) as job:
        assert job.wait() == [0, 0]
    again = [*common, "--metrics-file", str(killed), "--save", str(tmp_path / "save")]
    with launcher.job(again, 2, fault=Fault(rank=1, step=6, kind="kill")) as job:
        assert job.wait() == [6, -signal.SIGKILL]
    assert len(steps(killed)) == 5
    with launcher.job(again, 2) as job:
        assert job.wait() == [0, 0]
        assert f"starting from {tmp_path}/save/iter_0000003" in job.said(0)
        assert "2 steps were lost since the checkpoint of step 3 and will be made again" in job.said(0)
        assert re.search(r"goodput \d+\.\d % of .*steps .*saves .*evaluations .*2 lost steps ", job.said(0))
    _check_goodput(tmp_path / "save" / "iter_0000008", killed)
    assert losses(killed) == losses(whole)
    valid = [[(r["step"], r["valid_loss"]) for r in records(path) if "valid_loss" in r] for path in (whole, killed)]
    assert valid[0] == valid[1]
    assert exit_status(tmp_path / "save")["code"] == 0


def _check_goodput(checkpoint: Path, metrics: Path) -> None:
    """Goodput by the times of the steps that stand in the metrics file, which are those that counted."""
    spent = json.loads((checkpoint / "time.json").read_text())
    steps_s = list(itertools.accumulate(record["step_time_s"] for record in steps(metrics)))
    assert spent["steps_s"] == pytest.approx(steps_s[-1])
    assert spent["lost_steps"] == 2 and spent["lost_s"] > 0 and spent["evaluations_s"] > 0
    saves_s = [record["save_s"] for record in records(metrics) if "save_s" in record]
    assert len(saves_s) == 3 and spent["saves_s"] == pytest.approx(sum(saves_s[:-1]))
    walls = [record["wall_s"] for record in records(metrics) if "wall_s" in record]
    assert walls == sorted(walls)
    for record, so_far_s in zip(steps(metrics), steps_s, strict=True):
        assert record["goodput"] == pytest.approx(so_far_s / record["wall_s"])
        assert record["lost_steps"] == (2 if record["step"] > 3 else 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["SIGTERM", "SIGUSR1"])
def test_a_signal_stops_with_a_save_and_the_same_command_goes_on_bit_for_bit(
    launcher: Launcher, tmp_path: Path, number: int
) -> None:
    """Only one rank gets the signal; both stop after the same step."""
    common = words(MOCK, "--train-iters 300")
    metrics, save, whole = tmp_path / "metrics.jsonl", tmp_path / "save", tmp_path / "whole.jsonl"
    argv = [*common, "--metrics-file", str(metrics), "--save", str(save)]
    with launcher.job(argv, 2) as job:
        job.wait_for_step(metrics, 5)
        job.signal(number, 1)
        assert job.wait() == [75, 75]
        assert "stopped after step" in job.said(0)
        assert f"because {signal.Signals(number).name} was received" in job.said(0)
    status, made = exit_status(save), len(steps(metrics))
    assert (status["code"], status["step"]) == (75, made)
    assert (save / "latest").read_text().strip() == f"iter_{made:07d}"
    few = words(f"--train-iters {made + 3}")
    with launcher.job([*argv, *few], 2) as job:
        assert job.wait() == [0, 0]
    with launcher.job([*common, *few, "--metrics-file", str(whole)], 2) as job:
        assert job.wait() == [0, 0]
    assert losses(metrics) == losses(whole)


def test_exit_interval_stops_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, metrics, save = tmp_path / "whole.jsonl", tmp_path / "metrics.jsonl", tmp_path / "save"
    run_ok(MOCK, DROPOUT, "--lr-decay-style cosine --lr-warmup-iters 2 --metrics-file", whole)
    argv = words(MOCK, DROPOUT, "--lr-decay-style cosine --lr-warmup-iters 2 --exit-interval 2", "--save", save)
    argv += ["--metrics-file", str(metrics)]
    for step in (2, 4):
        ended = run(argv)
        assert ended.code == 75
        ended.says(f"stopped after step {step}", "--exit-interval 2", str(save), "start again to go on")
        assert exit_status(save)["code"] == 75
        assert exit_status(save)["step"] == step
    assert run(argv).code == 0
    assert exit_status(save)["code"] == 0
    assert exit_status(save)["reason"] == "done"
    assert losses(metrics) == losses(whole)
    assert [record["lr"] for record in steps(metrics)] == [record["lr"] for record in steps(whole)]


def test_exit_duration_stops_with_a_save(tmp_path: Path) -> None:
    ended = run(words(MOCK, "--exit-duration-in-mins 0.00001 --save", tmp_path))
    assert ended.code == 75
    ended.says("--exit-duration-in-mins 1e-05", "stopped after step")
    assert (tmp_path / "latest").exists()


def test_a_stop_without_save_says_that_nothing_is_saved() -> None:
    ended = run(words(MOCK, "--exit-interval 2"))
    assert ended.code == 75
    ended.says("nothing is saved, as there is no --save")
    assert "start again" not in ended.err


def test_a_finished_run_started_again_changes_nothing(tmp_path: Path) -> None:
    metrics, save = tmp_path / "metrics.jsonl", tmp_path / "save"
    command = (MOCK, "--eval-iters 1 --metrics-file", metrics, "--save", save)
    run_ok(*command)
    before, written = records(metrics), (save / "iter_0000006" / "index.json").stat().st_mtime_ns
    run_ok(*command)
    assert [record for record in records(metrics) if record.get("event") != "resume"] == before
    assert (save / "iter_0000006" / "index.json").stat().st_mtime_ns == written


# --- Another layout ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of 8 steps in one process, with dropout."""
    metrics = tmp_path_factory.mktemp("uninterrupted") / "metrics.jsonl"
    run_ok(MOCK, DROPOUT, "--train-iters 8 --metrics-file", metrics)
    return losses(metrics)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("TP2 x PP2 with sequence parallelism", "one process"),
        ("one process", "DP2 with ZeRO 1"),
        ("DP2 with ZeRO 1", "TP2 x PP2 with sequence parallelism"),
        ("PP2", "DP2"),
        ("PP2 on a V", "PP2 interleaved, DP2 with ZeRO 3"),
        ("PP2 interleaved, DP2 with ZeRO 3", "PP2 on a V"),
    ],
)
def test_a_run_goes_on_at_another_layout(
    pool: Pool, tmp_path: Path, uninterrupted: list[float], before: str, after: str
) -> None:
    metrics, save = tmp_path / "metrics.jsonl", tmp_path / "save"
    _train(pool, before, DROPOUT, "--train-iters 4 --metrics-file", metrics, "--save", save)
    _train(pool, after, DROPOUT, "--train-iters 8 --micro-batch-size 1 --metrics-file", metrics, "--save", save)
    _same(uninterrupted, losses(metrics), OTHER_LAYOUT)
    resumed = [record for record in records(metrics) if record.get("event") == "resume"]
    assert len(resumed) == 1 and resumed[0]["from_step"] == 4


def test_the_optimizer_state_goes_along_to_another_layout(pool: Pool, tmp_path: Path) -> None:
    """Loading at TP2 x PP2 and saving at once gives every tensor, weights and both moments, back bit for bit."""
    first, second = tmp_path / "first", tmp_path / "second"
    run_ok(MOCK, "--train-iters 4 --save", first)
    _train(pool, "TP2 x PP2 with sequence parallelism", "--train-iters 4 --load", first, "--save", second)
    names = tensor_shapes(first / "iter_0000004")
    assert any(name.startswith("exp_avg_sq/") for name in names)
    assert names == tensor_shapes(second / "iter_0000004")
    for name in names:
        one, other = (assemble(folder / "iter_0000004", name) for folder in (first, second))
        assert torch.equal(one, other), name
    assert _state(first / "iter_0000004") == _state(second / "iter_0000004")


def test_a_damaged_shard_of_another_rank_falls_back_on_all_ranks(pool: Pool, tmp_path: Path) -> None:
    save = tmp_path / "save"
    _train(pool, "PP2", "--save-interval 3 --save", save)
    shard = save / "iter_0000006" / "rank00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    argv = words(MOCK, LAYOUTS["PP2"][0], "--save", save)
    for ended in pool.run(2, on_rank, argv):
        assert ended.code == 4
        ended.says(str(shard), "iter_0000003", "--fall-back-to-previous-checkpoint")
    first, _ = pool.run(2, on_rank, [*argv, "--fall-back-to-previous-checkpoint"])
    assert first.code == 0
    assert "starting from" in first.out and "iter_0000003" in first.out


def test_a_directory_in_use_is_refused_on_all_ranks(pool: Pool, launcher: Launcher, tmp_path: Path) -> None:
    save, metrics = tmp_path / "save", tmp_path / "metrics.jsonl"
    argv = words(MOCK, "--save", save, "--metrics-file", metrics)
    with launcher.job(argv, 1, fault=Fault(0, 3, "hang")) as job:
        job.wait_for_step(metrics, 2)
        for ended in pool.run(2, on_rank, argv):
            assert ended.code == 8
            ended.says(f"--save {save} is in use", f"process {job.pids[0]}")
        assert not (save / "exit_status.json").exists()
        assert len(steps(metrics)) == 2, "the other run's metrics file must stay"


# --- What is taken and what is left -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 2, 4 and 6 of a run with a linear decay."""
    folder = tmp_path_factory.mktemp("saved") / "save"
    run_ok(MOCK, "--lr-decay-style linear --save-interval 2 --save", folder)
    return folder


LINEAR = f"{MOCK} --lr-decay-style linear"


def test_resume_starts_from_the_latest_and_from_another_step_when_told(saved: Path) -> None:
    assert f"starting from {saved}/iter_0000006" in run_ok(LINEAR, "--load", saved).out
    assert f"starting from {saved}/iter_0000004" in run_ok(LINEAR, "--ckpt-step 4 --load", saved).out
    (saved / "latest").write_text("iter_0000002\n")
    assert f"starting from {saved}/iter_0000002" in run_ok(LINEAR, "--load", saved).out
    (saved / "latest").write_text("iter_0000006\n")


def test_turning_back_to_an_earlier_step_cuts_the_metrics_file_there(saved: Path, tmp_path: Path) -> None:
    save, metrics = Path(shutil.copytree(saved, tmp_path / "save")), tmp_path / "metrics.jsonl"
    (save / "exit_status.json").unlink()
    run_ok(LINEAR, "--ckpt-step 2 --metrics-file", metrics, "--save", save)
    run_ok(LINEAR, "--ckpt-step 4 --metrics-file", metrics, "--save", save)
    assert [record["step"] for record in steps(metrics)] == [3, 4, 5, 6]
    assert [record.get("from_step") for record in records(metrics) if "event" in record] == [2, 4]


def test_keep_last_keeps_the_newest(tmp_path: Path) -> None:
    run_ok(MOCK, "--save-interval 1 --keep-last 2 --save", tmp_path)
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000005", "iter_0000006"]
    assert (tmp_path / "latest").read_text().strip() == "iter_0000006"


def test_run_and_state_lie_beside_each_checkpoint(saved: Path) -> None:
    for step in (2, 4, 6):
        run_json = json.loads((saved / f"iter_{step:07d}" / "run.json").read_text())
        assert run_json["model"]["hidden_size"] == 32
        assert run_json["train"]["global_batch_size"] == 8
        state = _state(saved / f"iter_{step:07d}")
        assert state["progress"] == {
            "step": step, "consumed_samples": 8 * step, "updates": step, "updated_samples": 8 * step,
            "consumed_tokens": 128 * step, "updated_tokens": 128 * step,
        }  # fmt: skip
        assert state["optimizer"] == {"kind": "adam", "step_count": step}
        assert state["schedule"]["decay_style"] == "linear"


def test_finetuning_takes_the_weights_alone(saved: Path, tmp_path: Path) -> None:
    """The first loss is that of step 7, made with step 1's samples; the counters and moments start anew."""
    metrics = tmp_path / "metrics.jsonl"
    out = run_ok(MOCK, "--finetune --load", saved, "--metrics-file", metrics, "--save", tmp_path / "save").out
    assert f"starting from {saved}/iter_0000006" in out
    assert [record["step"] for record in steps(metrics)] == [1, 2, 3, 4, 5, 6]
    assert steps(metrics)[0]["consumed_samples"] == 8
    fresh = tmp_path / "fresh.jsonl"
    run_ok(MOCK, "--metrics-file", fresh)
    assert losses(metrics)[0] < losses(fresh)[0] - 0.1
    assert _state(tmp_path / "save" / "iter_0000006")["optimizer"]["step_count"] == 6


def test_without_the_optimizer_state_the_step_goes_on_and_the_moments_start_anew(saved: Path, tmp_path: Path) -> None:
    kept, dropped = tmp_path / "kept.jsonl", tmp_path / "dropped.jsonl"
    base = (LINEAR, "--ckpt-step 4 --load", saved)
    run_ok(*base, "--metrics-file", kept)
    run_ok(*base, "--no-load-optim --metrics-file", dropped, "--save", tmp_path / "save")
    assert [record["step"] for record in steps(dropped)] == [5, 6]
    first, second = ([record["loss"] for record in steps(path)] for path in (kept, dropped))
    assert first[0] == second[0], "the weights are the same"
    assert first[1] != second[1], "the updates are not"
    assert _state(tmp_path / "save" / "iter_0000006")["optimizer"]["step_count"] == 2


def test_a_checkpoint_without_optimizer_state_says_how_to_load_it(tmp_path: Path) -> None:
    save = tmp_path / "save"
    run_ok(MOCK, "--no-save-optim --save", save)
    assert all(name.startswith("model/") for name in tensor_shapes(save / "iter_0000006"))
    longer = words(MOCK, "--train-iters 8 --load", save)
    ended = run(longer)
    assert ended.code == 4
    ended.says("without optimizer state", "--no-load-optim")
    assert run([*longer, "--no-load-optim"]).code == 0


def test_another_schedule_must_be_chosen(saved: Path, tmp_path: Path) -> None:
    base = words(LINEAR, "--ckpt-step 4 --lr 1e-3 --load", saved)
    ended = run(base)
    assert ended.code == 2
    ended.says(
        "--lr: checkpoint 0.003, flags 0.001", "--override-opt-param-scheduler", "--use-checkpoint-opt_param-scheduler"
    )  # fmt: skip
    rates = {}
    for choice in ("--override-opt-param-scheduler", "--use-checkpoint-opt_param-scheduler"):
        metrics = tmp_path / f"{choice}.jsonl"
        assert run([*base, choice, "--metrics-file", str(metrics)]).code == 0
        rates[choice] = steps(metrics)[0]["lr"]
    # Step 5 of 6 of a linear decay is made with 4 steps behind it.
    assert rates["--override-opt-param-scheduler"] == pytest.approx(1e-3 * 2 / 6)
    assert rates["--use-checkpoint-opt_param-scheduler"] == pytest.approx(3e-3 * 2 / 6)


def test_the_fp16_loss_scale_is_saved_and_resumed_bit_for_bit(tmp_path: Path) -> None:
    options = "--fp16 --initial-loss-scale 131072 --loss-scale-window 2 --hysteresis 1"
    whole, metrics, save = tmp_path / "whole.jsonl", tmp_path / "metrics.jsonl", tmp_path / "save"
    run_ok(MOCK, options, "--metrics-file", whole)
    run_ok(MOCK, options, "--train-iters 3 --metrics-file", metrics, "--save", save)
    state = _state(save / "iter_0000003")["scaler"]
    assert state["kind"] == "dynamic" and state["finite_steps"] == 1
    run_ok(MOCK, options, "--metrics-file", metrics, "--save", save)
    assert losses(metrics) == losses(whole)
    scales = [[record["loss_scale"] for record in steps(path)] for path in (whole, metrics)]
    assert scales[0] == scales[1]
    assert len(set(scales[0])) > 1, "the scale should have grown on the way"
