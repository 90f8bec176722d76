"""A save is whole or has not happened: killed at every call to the system, refused by the disk, failed on one rank."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron3d.checkpoint import publish, shard_file, store
from megatron3d.checkpoint.directory import latest_checkpoint, list_checkpoints, step_of, verify
from megatron3d.checkpoint.load import load_tensors, read_document
from megatron3d.checkpoint.save import save_checkpoint
from megatron3d.errors import StorageError
from megatron3d.params.boxes import Box, ShardView
from megatron3d.storage import durable
from tests.checkpoint import crash
from tests.checkpoint.layouts import SmallLayout, merged, views, wrong
from tests.dist.pool import Pool

LAYOUT = SmallLayout(1, 1)


def save(root: Path, step: int, *, seed: int, keep_last: int | None = None) -> Path:
    return save_checkpoint(
        root,
        step,
        merged(LAYOUT, seed=seed),
        documents={"state": {"seed": seed}},
        keep_last=keep_last,
        group=None,
        rank=0,
        world_size=1,
    )


def save_large(root: Path, step: int, size_bytes: int = 1 << 20) -> None:
    view = ShardView((size_bytes,), (Box((0,), (size_bytes,)),), torch.zeros(size_bytes, dtype=torch.uint8))
    save_checkpoint(root, step, {"x": view}, documents={}, keep_last=None, group=None, rank=0, world_size=1)


def seed_of(directory: Path) -> int:
    """Which save a whole checkpoint holds; fails if it is damaged or mixed."""
    assert verify(directory, "full") == []
    seed = read_document(directory, "state")["seed"]
    held = views(LAYOUT, 0, filled=False)
    load_tensors(directory, held, group=None)
    assert wrong(held, seed) == []
    return seed


def hidden(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir() if entry.name.startswith("."))


# (what is there, as steps with their seeds), the step saved with seed 9, keep_last
SITUATIONS = {
    "next step": ([(10, 1)], 20, None),
    "the same step again": ([(10, 1)], 10, None),
    "the same step again after turning back": ([(10, 1), (20, 2), (30, 3)], 20, None),
    "next step, pruning": ([(10, 1), (20, 2)], 30, 1),
}


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Do not wait for the disk: a killed process loses nothing that it has given to the kernel."""
    with mock.patch.object(os, "fsync"):
        yield


def prepared(root: Path, before: list[tuple[int, int]]) -> Path:
    """A copy of a directory with the checkpoints of `before`, made once."""
    model = root.parent / "model"
    if not model.exists():
        for step, seed in before:
            save(model, step, seed=seed)
    return Path(shutil.copytree(model, root))


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.heavy
@pytest.mark.parametrize(
    # pruning makes the calls of the next step, and more
    "situation",
    [pytest.param(name, marks=[pytest.mark.slow] if name == "next step" else []) for name in SITUATIONS],
)
def test_a_kill_at_any_call_to_the_system_leaves_a_whole_checkpoint_and_a_valid_latest(
    tmp_path: Path, situation: str
) -> None:
    before, step, keep_last = SITUATIONS[situation]
    seen, number = [], 0
    while True:
        root, number = prepared(tmp_path / str(number), before), number + 1
        last = before[-1][1]
        code = crash.in_fork(lambda r=root: save(r, step, seed=9, keep_last=keep_last), crash.Calls(number, crash.kill))
        assert code in (crash.DONE, -9)
        seen.append(seed_of(latest_checkpoint(root)))
        assert seen[-1] in (last, 9)
        for path in list_checkpoints(root):
            assert seed_of(path) in (9, dict(before).get(step_of(path)))
        save(root, 40, seed=4)
        assert hidden(root) == []
        if code == crash.DONE:
            break
    assert number > 20
    assert seen == sorted(seen), "once the new checkpoint is the latest it stays so"
    assert (seen[0], seen[-1]) == (before[-1][1], 9)


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.heavy
@pytest.mark.parametrize(
    ("situation", "from_there_on"),
    [
        pytest.param("next step", False, marks=pytest.mark.slow),
        ("the same step again", False),
        ("next step, pruning", True),
    ],
)
def test_a_disk_that_fills_up_at_any_call_is_reported_and_leaves_a_whole_checkpoint(
    tmp_path: Path, situation: str, from_there_on: bool
) -> None:
    before, step, keep_last = SITUATIONS[situation]
    codes, number = [], 0
    while not codes or codes[-1] != crash.DONE or number < 20:
        root, number = prepared(tmp_path / str(number), before), number + 1
        calls = crash.Calls(number, crash.fail(errno.ENOSPC), from_there_on=from_there_on)
        codes.append(crash.in_fork(lambda r=root: save(r, step, seed=9, keep_last=keep_last), calls))
        assert codes[-1] in (crash.DONE, crash.REFUSED), f"call {number}"
        assert seed_of(latest_checkpoint(root)) in (before[-1][1], 9)
        assert from_there_on or not any(name.startswith(".tmp-iter") for name in hidden(root))
        save(root, 40, seed=4)
        assert hidden(root) == []
    # The first call makes the --save directory; that it fails does not matter where the directory exists.
    assert codes[1:-1] == [crash.REFUSED] * (len(codes) - 2)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KiB."""
    point = tmp_path / "disk"
    point.mkdir()
    mounting = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", point], capture_output=True)
    if mounting.returncode != 0:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield point
    subprocess.run(["umount", point], check=True)


def test_a_full_disk_is_named_and_the_checkpoint_before_stays_whole(small_disk: Path) -> None:
    save(small_disk, 10, seed=1)
    with pytest.raises(StorageError, match=r"rank00000.safetensors: No space left on device.*free space"):
        save_large(small_disk, 20)
    assert hidden(small_disk) == []
    assert seed_of(latest_checkpoint(small_disk)) == 1
    save(small_disk, 20, seed=2)
    assert seed_of(latest_checkpoint(small_disk)) == 2


def test_a_read_only_disk_is_named_and_the_checkpoint_before_stays_whole(small_disk: Path) -> None:
    save(small_disk, 10, seed=1)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(StorageError, match=r"Read-only file system.*mount it writable"):
        save(small_disk, 20, seed=2)
    assert seed_of(latest_checkpoint(small_disk)) == 1


def test_a_limit_on_file_sizes_is_refused_like_a_full_disk(tmp_path: Path) -> None:
    save(tmp_path, 10, seed=1)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        save_large(tmp_path, 20)

    assert crash.in_fork(limited) == crash.REFUSED
    assert hidden(tmp_path) == []
    assert seed_of(latest_checkpoint(tmp_path)) == 1


def failing_body(rank: int, world_size: int, root: str, place: str) -> str:
    """Save while one rank meets an error; the message each rank raises."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{root}/somewhere")
    broken = {
        "write of rank 1": (shard_file, "write_file", rank == 1, full),
        "index": (store, "write_file", rank == 0, full),
        "start": (durable.os, "mkdir", rank == 0, full),
        "publishing": (publish, "sync_directory", rank == 0, full),
        "defect": (shard_file, "write_file", rank == 1, KeyError("a defect")),
    }
    module, function, here, error = broken[place]
    if not here:
        module, function, error = mock, "sentinel", None
    with (
        mock.patch.object(module, function, side_effect=error),
        pytest.raises((StorageError, RuntimeError, KeyError)) as raised,
    ):
        save_checkpoint(
            Path(root),
            20,
            views(SmallLayout(tp=1, dp=2), rank, filled=True),
            documents={"state": {}},
            keep_last=None,
            group=dist.group.WORLD,
            rank=rank,
            world_size=world_size,
        )
    return f"{type(raised.value).__name__}: {raised.value}"


@pytest.mark.parametrize("place", ["write of rank 1", "index", "start", "publishing", "defect"])
def test_a_failure_on_one_rank_is_raised_on_all_and_none_is_left_waiting(
    pool: Pool, tmp_path: Path, place: str
) -> None:
    save(tmp_path, 10, seed=1)
    messages = pool.run(2, failing_body, str(tmp_path), place, timeout_s=30)
    expected = "a defect" if place == "defect" else "No space left on device"
    assert all(expected in message for message in messages), messages
    assert place == "defect" or all(message.startswith("StorageError") for message in messages)
    assert not any(name.startswith(".tmp-iter") for name in hidden(tmp_path))
    assert seed_of(latest_checkpoint(tmp_path)) == 1


def elsewhere_body(rank: int, world_size: int, roots: list[str]) -> str:
    """Save below another directory on every rank, as on nodes that share no file system."""
    tensors = views(SmallLayout(tp=1, dp=2), rank, filled=True)
    with pytest.raises(StorageError) as raised:
        save_checkpoint(
            Path(roots[rank]),
            20,
            tensors,
            documents={},
            keep_last=None,
            group=dist.group.WORLD,
            rank=rank,
            world_size=world_size,
        )
    return str(raised.value)


def test_nodes_that_share_no_file_system_are_told_so(pool: Pool, tmp_path: Path) -> None:
    messages = pool.run(2, elsewhere_body, [str(tmp_path / "a"), str(tmp_path / "b")], timeout_s=30)
    assert all("all nodes of the run share" in message and "rank 1" in message for message in messages), messages


def test_damage_met_while_reading_back_is_refused_before_the_checkpoint_is_published(tmp_path: Path) -> None:
    save(tmp_path, 10, seed=1)
    write = store.write_shard

    def damaging(path: Path, tensors: dict[str, torch.Tensor]) -> object:
        result = write(path, tensors)
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)[0]
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last ^ 1]))
        return result

    with mock.patch.object(store, "write_shard", damaging), pytest.raises(StorageError, match="does not read back"):
        save_checkpoint(
            tmp_path,
            20,
            merged(LAYOUT),
            documents={},
            keep_last=None,
            group=None,
            rank=0,
            world_size=1,
            verify_level="full",
        )
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [10]


@pytest.mark.parametrize(("keep_last", "kept"), [(None, [1, 2, 3, 4]), (3, [2, 3, 4]), (1, [4]), (9, [1, 2, 3, 4])])
def test_the_newest_checkpoints_are_kept(tmp_path: Path, keep_last: int | None, kept: list[int]) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, seed=step, keep_last=keep_last)
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == kept


def test_after_turning_back_later_checkpoints_stay_and_latest_names_the_new_one(tmp_path: Path) -> None:
    for step in (1, 2, 5):
        save(tmp_path, step, seed=step)
    save(tmp_path, 3, seed=3, keep_last=1)
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [3, 5]
    assert step_of(latest_checkpoint(tmp_path)) == 3


def test_several_ranks_without_a_group_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 ranks need a process group"):
        save_checkpoint(tmp_path, 1, {}, documents={}, keep_last=None, group=None, rank=0, world_size=2)
