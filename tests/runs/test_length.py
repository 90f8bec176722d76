"""How long a run is: by samples whatever batches its earlier starts had, or by iterations; and iterations left out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.dist.pool import Pool
from tests.runs.harness import MOCK, losses, on_rank, records, run, run_ok, steps, words

BY_SAMPLES = MOCK.replace("--train-iters 6", "--train-samples 96").replace("--global-batch-size 8", "")


def progress(save: Path) -> dict[str, int]:
    """What the latest checkpoint knows of the run's progress."""
    latest = save / (save / "latest").read_text().strip()
    return json.loads((latest / "state.json").read_text())["progress"]


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by samples, stopped after 48 of 96 in six steps of 8."""
    save = tmp_path_factory.mktemp("half")
    assert run(words(BY_SAMPLES, "--global-batch-size 8 --exit-interval 6 --save", save)).code == 75
    return save


# --- Samples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "sizes"),
    [
        ("--global-batch-size 16", [16] * 3),
        ("--global-batch-size 4", [4] * 12),
        ("--global-batch-size 20", [20] * 2),  # the 8 samples left are no whole batch
        ("--global-batch-size 50", []),
        ("--global-batch-size 16 --rampup-batch-size 4 4 80", [8, 12, 12, 16]),  # levels from 27, 54 and 80 samples
        ("--global-batch-size 16 --step-batch-size-schedule 0:8,1280:16", [8, 8, 8, 8, 16]),  # 16 tokens a sample
    ],
)
def test_a_resumed_run_goes_on_until_its_samples_are_consumed(
    half: Path, tmp_path: Path, batch: str, sizes: list[int]
) -> None:
    save, metrics = Path(shutil.copytree(half, tmp_path / "save")), tmp_path / "m.jsonl"
    ended = run_ok(BY_SAMPLES, batch, "--metrics-file", metrics, "--save", save)
    assert [record["batch_size"] for record in steps(metrics)] == sizes
    assert [record["step"] for record in steps(metrics)] == list(range(7, 7 + len(sizes)))
    assert progress(save)["consumed_samples"] == 48 + sum(sizes)
    if sizes:
        assert f"step {6 + len(sizes)}/{6 + len(sizes)} " in ended.out, "the log counts to the true end"
    else:
        assert "nothing is left to train: 48 of --train-samples 96 are consumed" in ended.out


def test_a_batch_that_follows_the_number_of_ranks_changes_the_steps_and_not_the_samples(
    pool: Pool, tmp_path: Path
) -> None:
    """Without --global-batch-size it is the micro-batch, 2, on each data-parallel rank."""
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    flags = words(BY_SAMPLES, "--train-samples 24 --save", tmp_path / "save")
    assert run([*flags, *words("--exit-interval 4 --metrics-file", one)]).code == 75
    for ended in pool.run(2, on_rank, [*flags, "--metrics-file", str(two)]):
        assert ended.code == 0, ended.err
    assert [record["batch_size"] for record in steps(one)] == [2] * 4
    assert [record["batch_size"] for record in steps(two)] == [4] * 4
    assert progress(tmp_path / "save")["consumed_samples"] == 24


def test_the_learning_rate_follows_the_samples_across_a_change_of_the_batch(half: Path, tmp_path: Path) -> None:
    """Linear decay over 96 samples: with any batch the rate of a step is that of the samples before it."""
    save, metrics = tmp_path / "save", tmp_path / "m.jsonl"
    decay = BY_SAMPLES.replace("--lr-decay-style constant", "--lr-decay-style linear")
    run(words(decay, "--global-batch-size 8 --exit-interval 6 --save", save))
    run_ok(decay, "--global-batch-size 16 --metrics-file", metrics, "--save", save)
    assert [record["lr"] for record in steps(metrics)] == pytest.approx([3e-3 * (1 - n / 96) for n in (48, 64, 80)])


def test_iterations_are_counted_from_the_beginning_whatever_the_batch(half: Path, tmp_path: Path) -> None:
    save, metrics = tmp_path / "save", tmp_path / "m.jsonl"
    assert run(words(MOCK, "--exit-interval 4 --save", save)).code == 75
    run_ok(MOCK, "--global-batch-size 4 --metrics-file", metrics, "--save", save)
    assert [record["step"] for record in steps(metrics)] == [5, 6]
    assert progress(save)["consumed_samples"] == 4 * 8 + 2 * 4


def test_a_run_that_could_make_no_step_is_refused_at_the_start() -> None:
    ended = run(words(BY_SAMPLES, "--global-batch-size 8 --train-samples 5"))
    assert ended.code == 2
    ended.says("--train-samples 5 is less than the first global batch of 8", "use --train-samples 8 or more")


# --- Iterations left out ----------------------------------------------------------------------------------------------

LINEAR = MOCK.replace("--lr-decay-style constant", "--lr-decay-style linear")


@pytest.fixture(scope="module")
def skipping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The metrics of a run that leaves out its third and fourth step."""
    metrics = tmp_path_factory.mktemp("skipping") / "m.jsonl"
    ended = run_ok(LINEAR, "--iterations-to-skip 2 3 --metrics-file", metrics)
    assert "step 3 is left out by --iterations-to-skip 2: its 8 samples are not used" in ended.out
    assert "loss none (all steps skipped)" in ended.out
    return metrics


def test_a_left_out_iteration_consumes_its_samples_and_nothing_else(skipping: Path) -> None:
    found = steps(skipping)
    assert [record["step"] for record in found] == [1, 2, 3, 4, 5, 6]
    assert [record["consumed_samples"] for record in found] == [8, 16, 24, 32, 40, 48]
    assert [record["skipped"] for record in found] == [False, False, True, True, False, False]
    assert [record["loss"] is None for record in found] == [False, False, True, True, False, False]
    # The rate of update number k is 3e-3 (1 - k/6); the steps that are left out make no update.
    updates = [0, 1, 2, 2, 2, 3]
    assert [record["lr"] for record in found] == pytest.approx([3e-3 * (1 - k / 6) for k in updates])


def test_leaving_out_changes_no_step_before_and_every_step_after(skipping: Path, tmp_path: Path) -> None:
    run_ok(LINEAR, "--metrics-file", tmp_path / "whole.jsonl")
    whole, left_out = losses(tmp_path / "whole.jsonl"), losses(skipping)
    assert left_out[:2] == whole[:2]
    assert left_out[4] != whole[4], "two updates less"


def test_a_run_stopped_among_left_out_iterations_goes_on_bit_for_bit(skipping: Path, tmp_path: Path) -> None:
    save, metrics = tmp_path / "save", tmp_path / "m.jsonl"
    flags = words(LINEAR, "--iterations-to-skip 2 3 --metrics-file", metrics, "--save", save)
    assert run([*flags, *words("--exit-interval 3")]).code == 75
    tokens = {"consumed_tokens": 24 * 16, "updated_tokens": 16 * 16}
    assert progress(save) == {"step": 3, "consumed_samples": 24, "updates": 2, "updated_samples": 16} | tokens
    run_ok(*flags)
    assert losses(metrics) == losses(skipping)
    assert [record.get("from_step") for record in records(metrics) if record.get("event") == "resume"] == [3]


def test_data_parallel_ranks_leave_out_the_same_iterations(pool: Pool, skipping: Path, tmp_path: Path) -> None:
    argv = words(LINEAR, "--iterations-to-skip 2 3 --metrics-file", tmp_path / "m.jsonl")
    assert {ended.code for ended in pool.run(2, on_rank, argv)} == {0}
    two, one = losses(tmp_path / "m.jsonl"), losses(skipping)
    assert [loss is None for loss in two] == [loss is None for loss in one]
    assert [loss for loss in two if loss] == pytest.approx([loss for loss in one if loss], rel=1e-5)


def test_a_word_that_is_no_iteration_is_refused() -> None:
    ended = run(words(MOCK, "--iterations-to-skip 2 three"))
    assert ended.code == 2
    ended.says("--iterations-to-skip 2 three has three, which is no iteration")
