"""Runs with --async-save: the same checkpoints and losses as without, and an end that waits for the last one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest

from megatron3d.checkpoint import async_save, publish
from megatron3d.checkpoint.async_save import AsyncSave
from megatron3d.checkpoint.directory import find_checkpoint, list_checkpoints, step_of, verify
from megatron3d.checkpoint.index import read_index
from megatron3d.checkpoint.writer_process import WriteOutcome
from megatron3d.errors import StorageError
from tests.dist.pool import Pool
from tests.runs.harness import MOCK, Ended, losses, on_rank, records, run, run_ok, words

ASYNC = "--async-save --save-interval 2"
LAYOUTS = {
    "one process": (1, ""),
    "ZeRO 3 with gathers under way": (2, "--zero-stage 3 --bf16"),
    "a delayed update": (2, "--zero-stage 1 --overlap-param-gather --offload-optimizer cpu --offload-delayed-update"),
    "DP2": (2, ""),
    "TP2": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "PP2": (2, "--pipeline-model-parallel-size 2"),
}


def saved_steps(save: Path) -> list[int]:
    """Steps of the checkpoints that are there, each of them whole."""
    found = list_checkpoints(save)
    assert [verify(path) for path in found] == [[]] * len(found)
    return [step_of(path) for path in found]


def most_written(directory: Path) -> int:
    """Bytes of tensors in the largest file of a checkpoint."""
    written: Counter[str] = Counter()
    for tensor in read_index(directory).tensors.values():
        for stored in tensor.boxes:
            written[stored.file] += stored.box.numel * tensor.dtype.itemsize
    return max(written.values())


def lost(outcome: WriteOutcome, flight: object) -> None:
    """Stands for what a save under way is held to: it fails once its file is written."""
    raise StorageError(f"what was written after step {outcome.step} is lost")


def run_both(rank: int, world_size: int, argv: Sequence[str], folder: str) -> list[Ended]:
    """Body of a rank: the script with --async-save and without."""
    more = {"async": ["--async-save"], "sync": []}
    return [
        on_rank(
            rank,
            world_size,
            [*argv, *options, "--save", f"{folder}/{name}", "--metrics-file", f"{folder}/{name}.jsonl"],
        )
        for name, options in more.items()
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_tensor_files_are_those_of_a_run_that_waits_for_its_saves(
    pool: Pool, tmp_path: Path, layout: str
) -> None:
    world_size, options = LAYOUTS[layout]
    argv = words(MOCK, options, "--save-interval 2")
    if world_size == 1:
        ended = run_both(0, 1, argv, str(tmp_path))
    else:
        ended = [one for of_rank in pool.run(2, run_both, argv, str(tmp_path), timeout_s=120) for one in of_rank]
    assert [one.code for one in ended] == [0] * len(ended), ended[0].err
    one, other = tmp_path / "async", tmp_path / "sync"
    assert losses(tmp_path / "async.jsonl") == losses(tmp_path / "sync.jsonl")
    assert saved_steps(one) == saved_steps(other) == [2, 4, 6]
    assert find_checkpoint(one).name == "iter_0000006"
    files = sorted(path.relative_to(other) for path in other.glob("iter_*/*.safetensors"))
    files += [file.parent / "state.json" for file in files]
    assert all((one / file).read_bytes() == (other / file).read_bytes() for file in files)
    assert [f"saved {one}/iter_000000{step}" in ended[0].out for step in (2, 4, 6)] == [True] * 3
    assert "training waited" in ended[0].out
    (predicted,) = {record["predicted_bytes_per_rank"]["save_copy"] for record in records(tmp_path / "async.jsonl")[:1]}
    print(
        "RATIO", layout, predicted, most_written(find_checkpoint(one)), predicted / most_written(find_checkpoint(one))
    )
    assert predicted == pytest.approx(most_written(find_checkpoint(one)), rel=0.05)
    assert "because the run ends" in ended[0].out  # the save of step 6 was begun as any other


def test_the_next_save_waits_for_the_one_before_and_says_so(tmp_path: Path) -> None:
    with (
        mock.patch.object(AsyncSave, "is_written", lambda _: False),
        mock.patch.object(AsyncSave, "is_written_within", lambda save, _: "4" not in save.under_way.name),
    ):
        ended = run_ok(MOCK, ASYNC, "--save", tmp_path)
    (warning,) = [line for line in ended.log if line.startswith("warning: training waits for ")]
    assert "iter_0000004, because the next save is due: 1 of 1 ranks have not written their part" in warning
    waits = [line for line in ended.log if line.startswith("waited ")]
    assert [line.partition(" s for ")[2] for line in waits] == [
        "iter_0000002, because the next save is due",
        "iter_0000004, because the next save is due",
        "iter_0000006, because the run ends",
    ]
    assert saved_steps(tmp_path) == [2, 4, 6]


def test_a_save_that_fails_is_reported_and_training_goes_on(tmp_path: Path) -> None:
    """The disk is full for the file of step 4, and has room again for the last one."""
    prepare = publish.prepare

    def prepare_full(root: Path, temporary: Path) -> None:
        prepare(root, temporary)
        if "iter_0000004" in temporary.name:
            (temporary / "rank00000.safetensors").symlink_to("/dev/full")

    with mock.patch.object(publish, "prepare", prepare_full):
        ended = run_ok(MOCK, ASYNC, "--keep-last 1 --train-iters 6 --save", tmp_path)
    (warning,) = [line for line in ended.log if line.startswith("warning: a save failed and training goes on: ")]
    assert "iter_0000004" in warning and "No space left on device" in warning and "untouched" in warning
    assert step_of(find_checkpoint(tmp_path)) == 6
    # Only a checkpoint replaces one: that of step 2 stayed through the failure, and no step has proved that of step 6.
    assert saved_steps(tmp_path) == [6]


def test_the_save_of_a_run_that_ends_is_made_again_if_it_fails_in_the_background(tmp_path: Path) -> None:
    with mock.patch.object(async_save, "_require_written", lost):
        ended = run_ok(MOCK, "--async-save --save-interval 6 --save", tmp_path)
    assert [line for line in ended.log if line.startswith("warning: a save failed")] != []
    assert saved_steps(tmp_path) == [6]


@pytest.mark.parametrize("exit_interval", [4, 5])
def test_a_run_that_stops_waits_for_the_save_under_way_and_makes_its_last(tmp_path: Path, exit_interval: int) -> None:
    """At step 4 the save under way is the last one; at step 5 another is due."""
    with mock.patch.object(AsyncSave, "is_written", lambda _: False):
        ended = run(words(MOCK, ASYNC, f"--exit-interval {exit_interval} --save", tmp_path))
    assert ended.code == 75
    assert saved_steps(tmp_path) == sorted({2, 4, exit_interval})
    assert step_of(find_checkpoint(tmp_path)) == exit_interval
    run_ok(MOCK, ASYNC, "--save", tmp_path)
    assert saved_steps(tmp_path) == sorted({2, 4, exit_interval, 6})


def test_a_loss_that_is_not_finite_ends_the_run_with_the_save_under_way_published(tmp_path: Path) -> None:
    """Step 2 makes weights of about 1e29, which can be saved; step 3 shows what they are."""
    rising = "--optimizer sgd --clip-grad 0 --lr-warmup-iters 2 --lr-warmup-init 0 --lr-decay-style linear"
    with mock.patch.object(AsyncSave, "is_written", lambda _: False):
        ended = run(words(MOCK, rising, "--lr 1e30 --min-lr 1e30", ASYNC, "--save", tmp_path))
    assert ended.code == 5
    assert saved_steps(tmp_path) == [2]
    ended.says("no finite step has followed the checkpoint", "iter_0000002")


def test_an_update_to_infinity_is_found_by_the_writer_and_ends_the_run(tmp_path: Path) -> None:
    rising = "--optimizer sgd --clip-grad 0 --lr-warmup-iters 2 --lr-warmup-init 0 --lr-decay-style linear"
    length = "--lr 1e39 --min-lr 1e39 --lr-decay-iters 6 --train-iters 2 --save-interval 1"
    with mock.patch.object(AsyncSave, "is_written", lambda _: True):
        ended = run(words(MOCK, rising, length, "--async-save --save", tmp_path))
    assert ended.code == 5
    ended.says("model/", "NaN or infinite values after step 2", "so nothing is saved")
    assert saved_steps(tmp_path) == [1]


def test_an_option_without_a_save_to_make_beside_training_has_a_line(tmp_path: Path) -> None:
    ended = run_ok(MOCK, "--async-save --train-iters 1 --save", tmp_path)
    assert any(line.startswith("--async-save has no effect without --save-interval") for line in ended.log)
