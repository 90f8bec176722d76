"""A save in the background holds what its step held, whatever training changes meanwhile, or it has not happened."""

from __future__ import annotations

import filecmp
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron3d.checkpoint import publish, staging, writer_process
from megatron3d.checkpoint.async_save import AsyncSave
from megatron3d.checkpoint.directory import latest_checkpoint, list_checkpoints, size_of, step_of, verify
from megatron3d.checkpoint.host_buffer import HostBuffer
from megatron3d.checkpoint.load import assemble, load_tensors
from megatron3d.checkpoint.save import save_checkpoint
from megatron3d.checkpoint.writer_process import is_finite
from megatron3d.errors import MemoryShortError, NumericsError, StorageError
from megatron3d.params.boxes import Box, ShardView
from tests.checkpoint import crash
from tests.checkpoint.layouts import SmallLayout, merged, views, wrong
from tests.dist.pool import Pool

pytestmark = pytest.mark.heavy

LAYOUT = SmallLayout(1, 1)
LARGE = 1 << 20  # elements of a tensor that takes some milliseconds to write


@pytest.fixture(scope="module")
def kept() -> Iterator[AsyncSave]:
    """One writer process for many tests, as a run has one for all its saves."""
    with opened() as saves:
        yield saves


@contextmanager
def opened() -> Iterator[AsyncSave]:
    saves = AsyncSave(group=None, rank=0, world_size=1)
    try:
        yield saves
    finally:
        saves.close()


def begin(saves: AsyncSave, root: Path, step: int, tensors: Mapping[str, ShardView], *, seed: int = 0) -> Path:
    return saves.begin(root, step, tensors, documents={"state": {"seed": seed}})


def save(saves: AsyncSave, root: Path, step: int, *, seed: int) -> Path:
    begin(saves, root, step, merged(LAYOUT, seed=seed), seed=seed)
    return saves.finish()


def large(value: float, dtype: torch.dtype = torch.float32, numel: int = LARGE) -> dict[str, ShardView]:
    return {"model/w": ShardView((numel,), (Box((0,), (numel,)),), torch.full((numel,), value, dtype=dtype))}


def same_files(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    return filecmp.cmpfiles(one, other, names, shallow=False) == (names, [], [])


def hidden(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir() if entry.name.startswith("."))


def ends(pid: int, timeout_s: float = 20.0) -> bool:
    """Whether a process ends within a time, be it a child of this one or not."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], timeout_s)[0])
    finally:
        os.close(fd)


# --- What is saved ----------------------------------------------------------------------------------------------------


def both_ways(rank: int, world_size: int, root: str) -> None:
    """Save in the background and without, below two directories."""
    held = views(SmallLayout(tp=1, dp=2), rank, filled=True)
    held |= {f"old/{name}": ShardView(v.full_shape, v.boxes, v.data.bfloat16()) for name, v in held.items()}
    documents = {"state": {"seed": 3}, "run": {"text": "x" * 99_999}}
    saves = AsyncSave(group=dist.group.WORLD, rank=rank, world_size=world_size)
    saves.begin(Path(root, "async"), 20, held, documents=documents)
    saves.finish()
    saves.close()
    group = dist.group.WORLD
    save_checkpoint(
        Path(root, "sync"), 20, held, documents=documents, keep_last=None, group=group, rank=rank, world_size=world_size
    )


def test_files_are_byte_for_byte_those_of_a_save_that_is_waited_for(pool: Pool, tmp_path: Path) -> None:
    pool.run(2, both_ways, str(tmp_path), timeout_s=60)
    one, other = (latest_checkpoint(tmp_path / name) for name in ("async", "sync"))
    assert one is not None and other is not None
    assert {path.name for path in one.iterdir()} >= {"rank00000.safetensors", "rank00001.safetensors"}
    assert same_files(one, other)
    assert verify(one, "full") == []


@pytest.mark.parametrize("points", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_training_on_at_any_point_of_the_writing_changes_no_saved_byte(
    tmp_path: Path, kept: AsyncSave, points: int
) -> None:
    """Between two questions whether the file is written, something of what was saved changes, a random number of
    times; then all of it does, as the next steps would have it."""
    numbers, held = random.Random(13), large(0.0) | merged(LAYOUT)
    for point in range(points):
        for number, view in enumerate(held.values()):
            view.data.fill_(point + number / 8)
        begin(kept, tmp_path, point % 2, held, seed=point)
        expected = {name: view.data[:1].item() for name, view in held.items()}
        changes = numbers.choice([0, 1, 10, 100])
        while changes and not kept.is_written():
            view = held[numbers.choice([*held])]
            start = numbers.randrange(view.data.numel())
            view.data[start : start + LARGE // 8].add_(1.0)
            changes -= 1
        for view in held.values():
            view.data.neg_()
        directory = kept.finish()
        found = {name: ShardView(v.full_shape, v.boxes, torch.empty_like(v.data)) for name, v in held.items()}
        load_tensors(directory, found, group=None)
        assert all(bool((view.data == expected[name]).all()) for name, view in found.items()), f"point {point}"


def test_a_buffer_with_the_save_before_in_it_is_never_published(tmp_path: Path) -> None:
    """The copy is left out, as by a program that takes the tensors of its first save for those of every one."""
    with opened() as saves:
        begin(saves, tmp_path, 10, large(1.0))
        saves.finish()
        checksum = staging.crc32(bytes(4 * LARGE))
        with mock.patch.object(staging, "_copy", lambda target, source: checksum):
            begin(saves, tmp_path, 20, large(0.0))
        with pytest.raises(StorageError, match="is not what was copied after step 20"):
            saves.finish()
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [10]
    assert hidden(tmp_path) == []
    assert step_of(latest_checkpoint(tmp_path)) == 10


def test_a_buffer_that_changes_while_it_is_written_is_never_published(tmp_path: Path) -> None:
    with opened() as saves:
        taken = staging.Staged.add_shard

        def add_and_damage(staged: staging.Staged, path: Path, boxes: Mapping[str, torch.Tensor]) -> object:
            found = taken(staged, path, boxes)
            saves._buffer.data[staged.order.size_bytes - 1] ^= 1
            return found

        with mock.patch.object(staging.Staged, "add_shard", add_and_damage):
            begin(saves, tmp_path, 20, large(1.0))
        with pytest.raises(StorageError, match="it is not published"):
            saves.finish()
    assert list_checkpoints(tmp_path) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named_and_not_published(
    tmp_path: Path, kept: AsyncSave, dtype: torch.dtype, value: float
) -> None:
    tensors = merged(LAYOUT) | large(1.0, dtype, numel=999)
    tensors["model/w"].data[777] = value
    begin(kept, tmp_path, 20, tensors)
    with pytest.raises(NumericsError, match=r"model/w would be saved with NaN or infinite values after step 20"):
        kept.finish()
    assert (list_checkpoints(tmp_path), hidden(tmp_path)) == ([], [])


@pytest.mark.parametrize(
    ("tag", "dtype", "bits"),
    [
        ("F8_E4M3", torch.float8_e4m3fn, torch.uint8),
        ("F8_E5M2", torch.float8_e5m2, torch.uint8),
        ("F16", torch.float16, torch.int16),
        ("BF16", torch.bfloat16, torch.int16),
    ],
)
def test_every_number_of_a_narrow_dtype_is_taken_for_what_torch_takes_it(
    tag: str, dtype: torch.dtype, bits: torch.dtype
) -> None:
    every = torch.arange(1 << (8 * bits.itemsize)).to(bits)
    finite = every.view(dtype).float().isfinite()
    assert is_finite(every[finite].view(torch.uint8).numpy(), tag)
    assert not any(is_finite(one.reshape(1).view(torch.uint8).numpy(), tag) for one in every[~finite])
    assert 0 < int((~finite).sum()) < len(every)


# --- What fails -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["rank00000.safetensors", "state.json"])
def test_a_full_disk_is_named_and_the_next_save_is_whole(tmp_path: Path, kept: AsyncSave, place: str) -> None:
    save(kept, tmp_path, 10, seed=1)
    prepare = publish.prepare

    def prepare_full(root: Path, temporary: Path) -> None:
        prepare(root, temporary)
        (temporary / place).symlink_to("/dev/full")

    with mock.patch.object(publish, "prepare", prepare_full):
        begin(kept, tmp_path, 20, merged(LAYOUT))
    with pytest.raises(StorageError, match=rf"iter_0000020.*No space left on device.*{place}.*free space"):
        kept.finish()
    assert seed_of(latest_checkpoint(tmp_path)) == 1
    assert hidden(tmp_path) == []
    assert seed_of(save(kept, tmp_path, 30, seed=3)) == 3


def failing_on_one_rank(rank: int, world_size: int, root: str, fault: str) -> str:
    """Save while the writer process of rank 1 is killed, or finds NaN; then save again."""
    saves = AsyncSave(group=dist.group.WORLD, rank=rank, world_size=world_size)
    held = views(SmallLayout(tp=1, dp=2), rank, filled=True)
    saves.begin(Path(root), 10, held, documents={"state": {"seed": 0}})
    saves.finish()
    broken = {name: ShardView(v.full_shape, v.boxes, v.data.clone()) for name, v in held.items()}
    if rank == 1 and fault == "NaN":
        broken["model/layers.0.fc1.bias"].data[0] = float("nan")
    if rank == 1 and fault == "killed":
        assert saves.writer_pid is not None
        os.kill(saves.writer_pid, signal.SIGSTOP)
    saves.begin(Path(root), 20, broken, documents={"state": {"seed": 0}})
    if rank == 1 and fault == "killed":
        assert saves.writer_pid is not None
        os.kill(saves.writer_pid, signal.SIGKILL)
    with pytest.raises((StorageError, NumericsError)) as raised:
        saves.finish()
    saves.begin(Path(root), 30, held, documents={"state": {"seed": 0}})
    saves.finish()
    saves.close()
    return f"{type(raised.value).__name__}: {raised.value}"


@pytest.mark.parametrize(
    ("fault", "error", "what"),
    [
        ("killed", "StorageError", "ended by SIGKILL"),
        ("NaN", "NumericsError", "model/layers.0.fc1.bias would be saved"),
    ],
)
def test_a_failure_on_one_rank_is_raised_on_all_and_the_next_save_is_whole(
    pool: Pool, tmp_path: Path, fault: str, error: str, what: str
) -> None:
    messages = pool.run(2, failing_on_one_rank, str(tmp_path), fault, timeout_s=60)
    assert all(message.startswith(error) and what in message for message in messages), messages
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [10, 30]
    assert all(verify(path, "full") == [] for path in list_checkpoints(tmp_path))
    assert hidden(tmp_path) == []


def test_a_writer_process_that_was_lost_between_two_saves_costs_none(tmp_path: Path, kept: AsyncSave) -> None:
    save(kept, tmp_path, 10, seed=1)
    lost = kept.writer_pid
    assert lost is not None
    os.kill(lost, signal.SIGKILL)
    os.waitid(os.P_PID, lost, os.WEXITED | os.WNOWAIT)
    assert seed_of(save(kept, tmp_path, 20, seed=3)) == 3
    assert kept.writer_pid not in (lost, None)


def test_an_answer_is_heard_at_a_descriptor_that_select_does_not_take(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1024)]
    try:
        with opened() as saves:
            begin(saves, tmp_path, 10, large(1.0))
            assert saves.is_written_within(60.0)
            saves.finish()
    finally:
        for one in held:
            os.close(one)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [verify(path, "full") for path in list_checkpoints(tmp_path)] == [[]]


def test_memory_that_cannot_be_had_is_named_before_anything_is_written(tmp_path: Path) -> None:
    with (
        opened() as saves,
        mock.patch.object(os, "posix_fallocate", side_effect=OSError(28, "No space left on device")),
        pytest.raises(MemoryShortError, match=r"--async-save needs [\d,]+ bytes of host memory"),
    ):
        begin(saves, tmp_path, 10, large(1.0))
    assert (list_checkpoints(tmp_path), hidden(tmp_path)) == ([], [])


def test_one_save_is_under_way_at_a_time(tmp_path: Path, kept: AsyncSave) -> None:
    begin(kept, tmp_path, 10, merged(LAYOUT))
    with pytest.raises(AssertionError, match="one save is under way"):
        begin(kept, tmp_path, 20, merged(LAYOUT))
    assert kept.finish().name == "iter_0000010"


# --- Kills ------------------------------------------------------------------------------------------------------------


def seed_of(directory: Path | None) -> int:
    """Which save a whole checkpoint holds; fails if it is damaged or mixed."""
    assert directory is not None and verify(directory, "full") == []
    held = views(LAYOUT, 0, filled=False)
    load_tensors(directory, held, group=None)
    seeds = [seed for seed in (1, 3, 4, 9) if wrong(held, seed) == []]
    assert len(seeds) == 1, f"{directory} is of no one save"
    return seeds[0]


def killed_while_saving(root: Path, at: crash.Calls | None, polls: int | None) -> tuple[int, int]:
    """Save step 20 in a forked process that is killed at a system call, or after polling its writer `polls` times.

    Returns its exit code and the pid of its writer."""
    note = root.parent / f"{root.name}.pid"

    def body() -> None:
        with opened() as saves:
            begin(saves, root, 20, merged(LAYOUT, seed=9) | large(2.0), seed=9)
            note.write_text(str(saves.writer_pid))
            for _ in range(polls or 0):
                saves.is_written()
            if polls is not None:
                crash.kill()
            saves.finish()

    code = crash.in_fork(body, at)
    return code, int(note.read_text()) if note.exists() and note.read_text() else 0


def require_whole_after_a_kill(root: Path, code: int, writer: int, saves: AsyncSave) -> int:
    assert code in (crash.DONE, -signal.SIGKILL)
    assert not writer or ends(writer), "the writer process outlives the one that started it"
    found = seed_of(latest_checkpoint(root))
    assert all(seed_of(path) in (1, 9) for path in list_checkpoints(root))
    save(saves, root, 40, seed=4)
    assert hidden(root) == []
    return found


@pytest.mark.parametrize("polls", [0, 300, *(pytest.param(100 * n, marks=pytest.mark.slow) for n in range(1, 21))])
def test_a_kill_in_the_window_of_a_save_leaves_a_whole_checkpoint_and_no_process(
    tmp_path: Path, kept: AsyncSave, polls: int
) -> None:
    root = tmp_path / "save"
    save(kept, root, 10, seed=1)
    code, writer = killed_while_saving(root, None, polls)
    assert (code, bool(writer)) == (-signal.SIGKILL, True)
    assert require_whole_after_a_kill(root, code, writer, kept) == 1


@pytest.mark.slow
def test_a_kill_at_any_call_to_the_system_leaves_a_whole_checkpoint_and_no_process(
    tmp_path: Path, kept: AsyncSave
) -> None:
    seen, number, code = [], 0, None
    while code != crash.DONE:
        root, number = tmp_path / str(number), number + 1
        save(kept, root, 10, seed=1)
        code, writer = killed_while_saving(root, crash.Calls(number, crash.kill), None)
        seen.append(require_whole_after_a_kill(root, code, writer, kept))
        shutil.rmtree(root)
    assert number > 20
    assert seen == sorted(seen), "once the new checkpoint is the latest it stays so"
    assert (seen[0], seen[-1]) == (1, 9)


def test_the_writer_process_needs_neither_torch_nor_a_package_of_storage() -> None:
    program = "import sys; sys.modules |= dict.fromkeys(('torch', 'safetensors')); import " + writer_process.__name__
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


# --- Memory -----------------------------------------------------------------------------------------------------------


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_twenty_saves_take_the_memory_of_the_second(tmp_path: Path) -> None:
    tensors = large(1.0, numel=4 * LARGE)
    size = tensors["model/w"].data.nbytes
    with opened() as saves:
        taken: list[tuple[int, ...]] = []
        for step in range(20):
            tensors["model/w"].data.fill_(step)
            directory = begin(saves, tmp_path, step, tensors)
            saves.finish()
            pids = (os.getpid(), saves.writer_pid or 0)
            files = [len(os.listdir(f"/proc/{pid}/fd")) for pid in pids]
            taken.append((saves.buffer_bytes, saves.writer_pid or 0, *files, *map(resident_bytes, pids)))
            publish.prune(directory, 1)
    *fixed, own, writers = zip(*taken, strict=True)
    assert all(len(set(values)) == 1 for values in fixed), taken
    assert max(own[1:]) - own[1] < size / 4
    assert max(writers[1:]) - writers[1] < size / 4
    assert torch.equal(assemble(directory, "model/w"), tensors["model/w"].data)


def test_a_buffer_grows_with_what_it_holds_kept() -> None:
    buffer = HostBuffer()
    buffer.reserve(10)
    buffer.data[:] = 7
    before: Callable[[], int] = buffer.data.sum
    buffer.reserve(5 << 20)
    buffer.data[0] = 9
    assert (len(buffer.data), buffer.data[9], int(before())) == (5 << 20, 7, 72)
    buffer.close()


def test_a_buffer_beyond_the_largest_file_names_the_limit() -> None:
    buffer, limits = HostBuffer(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(MemoryShortError, match=r"5,242,880 bytes .*ulimit -f"):
            buffer.reserve(5 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        buffer.close()


def test_a_checkpoint_that_is_gone_is_reported_as_empty(tmp_path: Path) -> None:
    assert size_of(tmp_path / "iter_0000005") == 0
