"""The file store: what is written is read, what was damaged is reported, a full disk too, and death leaves nothing."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron3d.errors import StorageError
from megatron3d.offload.block_file import BLOCK_BYTES, CHUNK_BYTES, BlockFile
from megatron3d.offload.file_store import FileStore

SIZES = (1, 4, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 5, CHUNK_BYTES, 2 * CHUNK_BYTES + 777)


@pytest.fixture(params=["direct", "buffered"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> FileStore:
    """A store of each kind; direct where the file system of the tests allows it."""
    made = FileStore(tmp_path, "rank00000", direct=request.param == "direct")
    yield made
    made.close()


def noise(num_bytes: int, seed: int) -> torch.Tensor:
    """Random bytes, different for each seed."""
    return torch.randint(256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_buffers_of_all_sizes_come_back_as_written_and_leave_their_neighbours_alone(store: FileStore) -> None:
    for size in SIZES:
        store.reserve(f"b{size}", size)
    for write in [store.start_write(f"b{size}", noise(size, size)) for size in SIZES]:
        write.wait()
    for size in SIZES:
        found = torch.empty(size, dtype=torch.uint8)
        store.start_read(f"b{size}", found).wait()
        assert torch.equal(found, noise(size, size))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.integers(1, 3 * BLOCK_BYTES), skew=st.integers(0, 5000), slack=st.integers(0, 200))
def test_buffers_at_any_address_are_filled_exactly_and_nothing_around_them(
    tmp_path: Path, size: int, skew: int, slack: int
) -> None:
    store = FileStore(tmp_path, "rank00000")
    store.reserve("b", size)
    around = torch.full((skew + size + slack,), 7, dtype=torch.uint8)
    store.start_write("b", noise(size, 1)).wait()
    store.start_read("b", around[skew : skew + size]).wait()
    store.close()
    assert torch.equal(around[skew : skew + size], noise(size, 1))
    assert bool((around[:skew] == 7).all()) and bool((around[skew + size :] == 7).all())


def test_what_was_never_written_reads_as_zeros_and_passes_the_check(store: FileStore) -> None:
    store.reserve("b", CHUNK_BYTES + 10)
    found = torch.ones(CHUNK_BYTES + 10, dtype=torch.uint8)
    store.start_read("b", found).wait()
    assert not found.any()


def test_a_read_started_after_a_write_sees_it_without_a_wait_in_between(store: FileStore) -> None:
    store.reserve("b", 3 * CHUNK_BYTES)
    found = torch.empty(3 * CHUNK_BYTES, dtype=torch.uint8)
    for round_number in range(5):
        store.start_write("b", noise(3 * CHUNK_BYTES, round_number))
        store.start_read("b", found).wait()
        assert torch.equal(found, noise(3 * CHUNK_BYTES, round_number))


def test_tensors_of_any_dtype_travel(store: FileStore) -> None:
    values = torch.randn(5000).bfloat16()
    store.reserve("b", values.nbytes)
    store.start_write("b", values).wait()
    found = torch.empty_like(values)
    store.start_read("b", found).wait()
    assert torch.equal(found, values)


def test_a_flipped_bit_is_told_with_file_and_offset(store: FileStore) -> None:
    store.reserve("before", 10)
    store.reserve("b", 2 * CHUNK_BYTES)
    store.start_write("b", noise(2 * CHUNK_BYTES, 1)).wait()
    offset = BLOCK_BYTES + CHUNK_BYTES  # the second chunk of b
    with store.file.map(0, store.size_bytes) as pages:
        pages[offset + 12345] ^= 1
    with pytest.raises(StorageError, match=rf"{store.file.name} is damaged at offset {offset} .* of b"):
        store.start_read("b", torch.empty(2 * CHUNK_BYTES, dtype=torch.uint8)).wait()
    with pytest.raises(StorageError, match=f"offset {offset}"), store.mapped("b", writes=False):
        pass


def test_a_block_that_raises_leaves_what_it_has_written_to_be_read(store: FileStore) -> None:
    """A load that finds damage half-way has written a part; the checkpoint before is then loaded over it."""
    store.reserve("a", CHUNK_BYTES + 99)
    with pytest.raises(KeyError), store.mapped("a", writes=True) as mapped:
        mapped[: BLOCK_BYTES + 3] = 7
        raise KeyError("damage")
    with store.mapped("a", writes=False) as mapped:
        assert mapped[: BLOCK_BYTES + 3].eq(7).all() and mapped[BLOCK_BYTES + 3 :].eq(0).all()


def test_a_mapping_shows_what_was_written_and_what_is_written_there_is_read(store: FileStore) -> None:
    store.reserve("b", CHUNK_BYTES + 99)
    store.start_write("b", noise(CHUNK_BYTES + 99, 1))
    with store.mapped("b", writes=True) as mapped:
        assert torch.equal(mapped, noise(CHUNK_BYTES + 99, 1))
        mapped.copy_(noise(CHUNK_BYTES + 99, 2))
    found = torch.empty(CHUNK_BYTES + 99, dtype=torch.uint8)
    store.start_read("b", found).wait()
    assert torch.equal(found, noise(CHUNK_BYTES + 99, 2))


def test_a_mapping_takes_no_data_memory_of_the_process(tmp_path: Path) -> None:
    """Run in a process of its own under RLIMIT_DATA: 256 MiB are mapped and changed where 128 MiB may be allocated."""
    code = f"""
import resource, torch
from pathlib import Path
from megatron3d.offload.file_store import FileStore
store = FileStore(Path({str(tmp_path)!r}), "rank00000", num_threads=1)
store.reserve("b", 256 << 20)
data_kib = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1])
limit = data_kib * 1024 + (128 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
with store.mapped("b", writes=True) as mapped:
    mapped.fill_(3)
with store.mapped("b", writes=False) as mapped:
    assert int(mapped[::4096].sum()) == 3 * (256 << 20) // 4096
try:
    torch.zeros(256 << 20, dtype=torch.uint8)
except RuntimeError as error:
    print("refused:", error)
"""
    assert "refused:" in run_child(code)


def test_no_file_is_ever_seen_in_the_directory_and_a_killed_process_gives_its_space_back(tmp_path: Path) -> None:
    code = f"""
import time, torch
from pathlib import Path
from megatron3d.offload.file_store import FileStore
store = FileStore(Path({str(tmp_path)!r}), "rank00000")
store.reserve("b", 64 << 20)
print("ready", flush=True)
while True:
    store.start_write("b", torch.ones(64 << 20, dtype=torch.uint8)).wait()
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
    assert child.stdout.readline() == "ready\n"
    held = []
    for fd in os.listdir(f"/proc/{child.pid}/fd"):
        with suppress(FileNotFoundError):  # closed meanwhile
            held.append(os.readlink(f"/proc/{child.pid}/fd/{fd}"))
    assert any(str(tmp_path) in name and name.endswith("(deleted)") for name in held)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_told_when_space_is_taken(tmp_path: Path) -> None:
    """The limit on file sizes stands for the full disk; it is the same refusal of the same call."""
    code = f"""
import resource
from pathlib import Path
from megatron3d.errors import StorageError
from megatron3d.offload.file_store import FileStore
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
store = FileStore(Path({str(tmp_path)!r}), "rank00000")
try:
    store.reserve("b", 64 << 20)
except StorageError as error:
    print(error)
"""
    output = run_child(code)
    assert "could not take 0.067 GB for the offload file" in output
    assert "--offload-dir" in output and "checkpoints are untouched" in output


def test_a_full_disk_says_to_free_space(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    store.reserve("b", 100)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match=r"No space left on device.*free space there or give another --offload-dir"):
        store.reserve("c", 100)
    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(StorageError, match=r"could not write 100 bytes at offset 0 .*No space left on device"):
        store.start_write("b", noise(100, 1)).wait()


def test_a_directory_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"could not make the offload file.*--offload-dir"):
        FileStore(tmp_path / "file", "rank00000")


def test_a_file_system_without_direct_access_is_used_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwritev

    def refuse_direct(fd: int, buffers: list[memoryview], offset: int) -> int:
        if fcntl_flags(fd) & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", refuse_direct)
    store = FileStore(tmp_path, "rank00000")
    assert not store.file.is_direct
    store.reserve("b", 5000)
    store.start_write("b", noise(5000, 1)).wait()
    found = torch.empty(5000, dtype=torch.uint8)
    store.start_read("b", found).wait()
    assert torch.equal(found, noise(5000, 1))


def test_a_read_past_the_end_is_an_error_and_no_endless_loop(tmp_path: Path) -> None:
    file = BlockFile(tmp_path, "rank00000", direct=False)
    with pytest.raises(StorageError, match="the file ends at"):
        file.read(10 * BLOCK_BYTES, memoryview(bytearray(10)), is_aligned=False)


def fcntl_flags(fd: int) -> int:
    """The status flags of an open file."""
    return fcntl.fcntl(fd, fcntl.F_GETFL)


def run_child(code: str) -> str:
    """Standard output of a Python process that must end well."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    return done.stdout
