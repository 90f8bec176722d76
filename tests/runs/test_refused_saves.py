"""A save refuses what no training could go on from, at every layout alike, and pruning waits for a finite step."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron3d.checkpoint import publish
from megatron3d.checkpoint.directory import find_checkpoint, list_checkpoints, step_of, verify
from megatron3d.train import loop
from megatron3d.train.setup import TrainingSetup
from tests.dist.pool import Pool
from tests.runs.harness import MOCK, Ended, exit_status, losses, on_rank, run, run_ok, steps, words

# SGD multiplies a gradient of about 0.1 by the rate, which rises from nothing to HUGE within two steps.
RISING = "--optimizer sgd --clip-grad 0 --lr-warmup-iters 2 --lr-warmup-init 0 --lr-decay-style linear"
EVERY_STEP = "--train-iters 6 --save-interval 1"


def saved_steps(save: Path) -> list[int]:
    """Steps of the checkpoints that are there, each of them whole."""
    found = list_checkpoints(save)
    assert [verify(path) for path in found] == [[]] * len(found)
    return [step_of(path) for path in found]


@dataclass(frozen=True)
class Change:
    """What goes wrong on one rank after a step: an element of a parameter's state takes another value."""

    rank: int
    step: int
    kind: str
    parameter: str
    value: float


def run_with(rank: int, world_size: int, argv: Sequence[str], change: Change) -> Ended:
    """Body of a rank: the script, with one element changed after a step."""

    def changed(train_step: Callable[..., Any]) -> Callable[..., Any]:
        def step_and_change(parts: TrainingSetup, *args: Any, step: int, **kwargs: Any) -> Any:
            found = train_step(parts, *args, step=step, **kwargs)
            if (rank, step + 1) == (change.rank, change.step):
                engine = parts.engine
                views = engine.weight_views() if change.kind == "model" else None
                views = views or engine.state_views(parts.optimizer, change.kind)
                views[change.parameter].data[0] = change.value
            return found

        return step_and_change

    with mock.patch.object(loop, "train_step", changed(loop.train_step)):
        return on_rank(rank, world_size, argv)


# --- What is not finite -----------------------------------------------------------------------------------------------


def test_an_update_to_infinity_is_not_saved_and_the_checkpoint_before_it_stays(tmp_path: Path) -> None:
    ended = run(words(MOCK, RISING, "--lr 1e39 --min-lr 1e39", EVERY_STEP, "--keep-last 1 --save", tmp_path))
    assert ended.code == 5
    ended.says("model/", "NaN or infinite values after step 2", "so nothing is saved", "the earlier checkpoints in")
    assert saved_steps(tmp_path) == [1]
    assert step_of(find_checkpoint(tmp_path)) == 1
    assert exit_status(tmp_path)["code"] == 5
    run_ok(MOCK, "--optimizer sgd --override-opt-param-scheduler --train-iters 3 --save", tmp_path)


def test_weights_that_are_finite_but_useless_do_not_replace_the_ones_before(tmp_path: Path) -> None:
    """Step 2 makes weights of about 1e29, which can be saved; step 3 shows what they are."""
    ended = run(words(MOCK, RISING, "--lr 1e30 --min-lr 1e30", EVERY_STEP, "--keep-last 1 --save", tmp_path))
    assert ended.code == 5
    ended.says("is not finite", "--iterations-to-skip")
    assert saved_steps(tmp_path) == [1, 2]


def test_a_delayed_update_is_proved_by_the_step_that_computes_with_it(tmp_path: Path) -> None:
    """Step 3 still computes with the weights of step 1, and only step 4 shows what step 2 made."""
    flags = f"{RISING} --lr 1e30 --min-lr 1e30 --offload-optimizer cpu --offload-delayed-update --keep-last 1"
    ended = run(words(MOCK, flags, EVERY_STEP, "--save", tmp_path))
    assert ended.code == 5
    assert 1 in saved_steps(tmp_path)


@pytest.mark.parametrize("length", ["--train-iters 2", "--train-iters 4 --no-check-for-nan-in-loss-and-grad"])
def test_the_last_save_is_refused_too_even_where_steps_may_be_infinite(tmp_path: Path, length: str) -> None:
    ended = run(words(MOCK, RISING, f"--lr 1e39 --min-lr 1e39 --lr-decay-iters 6 {length} --save", tmp_path))
    assert ended.code == 5
    ended.says("so nothing is saved")
    assert saved_steps(tmp_path) == []


@pytest.mark.parametrize(
    ("layout", "change"),
    [
        ("--pipeline-model-parallel-size 2", Change(1, 3, "exp_avg", "layers.1.mlp.up.weight", float("nan"))),
        ("--tensor-model-parallel-size 2", Change(1, 3, "model", "layers.0.mlp.up.weight", float("inf"))),
        ("--zero-stage 3", Change(0, 3, "exp_avg_sq", "embedding.word.weight", float("-inf"))),
    ],
    ids=["PP2", "TP2", "Z3"],
)
def test_one_bad_element_on_one_rank_stops_the_save_on_all(
    pool: Pool, tmp_path: Path, layout: str, change: Change
) -> None:
    argv = words(MOCK, layout, "--train-iters 6 --save-interval 3 --save", tmp_path)
    ended = pool.run(2, run_with, argv, change)
    assert [one.code for one in ended] == [5, 5]
    for one in ended:
        one.says(f"{change.kind}/{change.parameter} would be saved with NaN or infinite values after step 3")
    assert saved_steps(tmp_path) == []


# --- What is not equal ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", ["", "--check-weight-hash-across-dp-replicas-interval 2"])
def test_replicas_that_differ_end_the_run_at_the_interval_or_else_at_the_save(
    pool: Pool, tmp_path: Path, interval: str
) -> None:
    change = Change(1, 4, "exp_avg", "layers.1.mlp.up.weight", 0.5)
    argv = words(MOCK, f"--train-iters 6 --save-interval 3 {interval} --save", tmp_path)
    ended = pool.run(2, run_with, argv, change)
    assert [one.code for one in ended] == [5, 5]
    step = 4 if interval else 6
    for one in ended:
        one.says(f"after step {step}: exp_avg/layers.1.mlp.up.weight: rank 1 against rank 0")
    assert saved_steps(tmp_path) == [3]


def test_equal_replicas_train_as_without_the_comparison(pool: Pool, tmp_path: Path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    run_ok(MOCK, "--metrics-file", one)
    argv = words(MOCK, "--check-weight-hash-across-dp-replicas-interval 1 --metrics-file", two)
    assert {ended.code for ended in pool.run(2, on_rank, argv)} == {0}
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)


# --- Which checkpoints stay -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        ("--save-interval 1 --save-retain-interval 2", [2, 4, 6, 7]),
        ("--save-interval 1 --save-retain-interval 3 --keep-last 2", [3, 6, 7]),
        ("--save-interval 2 --save-retain-interval 4", [4, 7]),
        ("--save-interval 1 --keep-last 3", [5, 6, 7]),
        ("--save-interval 1 --keep-last 1 --eval-iters 1", [7]),
    ],
)
def test_multiples_of_the_retain_interval_and_the_newest_stay(tmp_path: Path, flags: str, kept: list[int]) -> None:
    run_ok(MOCK, f"--train-iters 7 {flags} --save", tmp_path)
    assert saved_steps(tmp_path) == kept


def test_a_stopped_run_leaves_the_checkpoint_before_until_the_next_run_has_made_a_step(tmp_path: Path) -> None:
    flags = words(MOCK, "--save-interval 2 --keep-last 1 --save", tmp_path)
    assert run([*flags, *words("--exit-interval 4")]).code == 75
    assert saved_steps(tmp_path) == [2, 4]
    assert run([*flags, *words("--exit-interval 5")]).code == 75
    assert saved_steps(tmp_path) == [4, 5]
    run_ok(*flags)
    assert saved_steps(tmp_path) == [6]


def test_a_skipped_step_of_fp16_proves_nothing(tmp_path: Path) -> None:
    """At this scale the first steps overflow, so nothing may be removed until one has not."""
    flags = "--fp16 --initial-loss-scale 1.7e38 --hysteresis 1 --train-iters 3 --save-interval 1 --keep-last 1"
    ended = run(words(MOCK, flags, "--exit-interval 2 --metrics-file", tmp_path / "m.jsonl", "--save", tmp_path / "c"))
    assert ended.code == 75
    assert [record["skipped"] for record in steps(tmp_path / "m.jsonl")] == [True, True]
    assert saved_steps(tmp_path / "c") == [1, 2]


# --- Loss scale -------------------------------------------------------------------------------------------------------


def test_a_fixed_loss_scale_at_which_every_step_is_skipped_ends_the_run(tmp_path: Path) -> None:
    ended = run(words(MOCK, "--fp16 --loss-scale 1e38 --train-iters 6 --metrics-file", tmp_path / "m.jsonl"))
    assert ended.code == 5
    ended.says("not finite in 2 steps (--hysteresis) at the fixed --loss-scale 1e+38")
    assert len(steps(tmp_path / "m.jsonl")) == 1


def test_torch_agrees_about_what_is_infinite() -> None:
    """The rates above: 1e39 is beyond fp32, 1e30 is not."""
    assert torch.tensor([1e39, 1e30], dtype=torch.float32).isfinite().tolist() == [False, True]


def test_an_old_checkpoint_that_cannot_be_removed_ends_no_run_and_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove_tree = publish.remove_tree

    def refuse(directory: Path) -> None:
        if directory.name == "iter_0000001":
            raise PermissionError(errno.EPERM, "Operation not permitted", str(directory))
        remove_tree(directory)

    monkeypatch.setattr(publish, "remove_tree", refuse)
    ended = run_ok(MOCK, "--train-iters 5 --save-interval 1 --keep-last 1 --eval-iters 1 --save", tmp_path)
    assert ended.out.count(f"{tmp_path}/iter_0000001 cannot be removed (Operation not permitted)") == 1
    assert [path.name for path in list_checkpoints(tmp_path)] == ["iter_0000001", "iter_0000005"]


def test_weights_that_no_finite_step_has_followed_are_named_with_the_checkpoint_before(tmp_path: Path) -> None:
    run_ok(MOCK, "--train-iters 2 --save", tmp_path, "--optimizer sgd")
    ended = run(
        words(
            MOCK,
            "--train-iters 5 --save-interval 1 --optimizer sgd --clip-grad 0 --save",
            tmp_path,
            "--lr 1e38 --override-opt-param-scheduler",
        )
    )
    assert ended.code == 5
    ended.says("no finite step has followed the checkpoint", "iter_0000003", "--ckpt-step 2 starts from the one before")
