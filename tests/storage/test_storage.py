"""Files that are there whole or not at all, and the sentence for each refusal of the operating system."""

from __future__ import annotations

import errno
import fcntl
import importlib
import itertools
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron3d.errors import StorageError
from megatron3d.storage import atomic, checksum, chunks
from megatron3d.storage.atomic import atomic_path, is_in_use, open_resumable, write_text_atomically
from megatron3d.storage.durable import write_file
from megatron3d.storage.refusals import storage_errors


def test_a_block_that_raises_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    write_text_atomically(path, "old\n")
    with pytest.raises(ZeroDivisionError), atomic_path(path) as beside:
        beside.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old\n"
    with atomic_path(path) as beside:
        beside.write_text("new")
        assert path.read_text() == "old\n"
    assert path.read_text() == "new"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_a_block_that_writes_nothing_is_an_error_and_no_empty_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "file"):
        pass
    assert not [*tmp_path.iterdir()]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_lock_of_processes_that_are_ending_is_waited_for_and_another_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another open file stands for the worker of a killed tool, which has the lock too; it goes at the third try."""
    first, tries, now_s = open_resumable(tmp_path / "file"), [], itertools.count()
    first.write(b"kept")

    def end_at_the_third(seconds: float) -> None:
        tries.append(seconds)
        if len(tries) == 3:
            first.close()

    monkeypatch.setattr(atomic, "time", SimpleNamespace(monotonic=lambda: next(now_s) / 10, sleep=end_at_the_third))
    with open_resumable(tmp_path / "file") as second:
        assert len(tries) == 3 and Path(second.name).read_bytes() == b"kept"
        with pytest.raises(BlockingIOError):
            open_resumable(tmp_path / "file")
        assert is_in_use(Path(second.name))
    assert len(tries) < 50 and not is_in_use(Path(second.name))


def test_a_full_disk_names_file_reason_and_both_remedies() -> None:
    expected = r"^could not write the list out/x: No space left on device; free space there or name another file$"
    with (
        pytest.raises(StorageError, match=expected),
        storage_errors("write the list", Path("out/x"), way_out="name another file"),
        open("/dev/full", "wb", buffering=0) as file,
    ):
        file.write(b"x")


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EDQUOT, "free space within the quota"),
        (errno.EFBIG, r"raise the limit on file sizes \(ulimit -f\)"),
        (errno.EROFS, "mount it writable"),
        (errno.EACCES, "make it writable for this user"),
        (errno.EIO, "look at the file system"),
    ],
)
def test_each_refusal_has_its_remedy_and_names_the_file_that_the_system_names(number: int, remedy: str) -> None:
    expected = rf"^could not save /path: {os.strerror(number)} \(/other\); the rest is safe; {remedy} or give --more$"
    with (
        pytest.raises(StorageError, match=expected),
        storage_errors("save", "/path", assurance="the rest is safe", way_out="give --more"),
    ):
        raise OSError(number, os.strerror(number), "/other")


@given(parts=st.lists(st.binary(max_size=300), max_size=4), start=st.integers(0, 2**32 - 1))
def test_checksums_are_those_of_zlib_and_go_on_from_one_part_to_the_next(parts: list[bytes], start: int) -> None:
    value = start
    for part in parts:
        value = checksum.crc32(memoryview(part), value)
    assert value == zlib.crc32(b"".join(parts), start)


def test_without_the_fast_library_checksums_come_from_zlib() -> None:
    try:
        with mock.patch.dict("sys.modules", {"isal.isal_zlib": None}):
            slow = importlib.reload(checksum)
            assert (slow.LIBRARY, slow.crc32) == ("zlib", zlib.crc32)
    finally:
        importlib.reload(checksum)


def fails_late(fd: int, data: memoryview, offset: int) -> int:
    if offset >= 8192:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return PWRITE(fd, data, offset)


def refuses_direct(fd: int, data: memoryview, offset: int) -> int:
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return PWRITE(fd, data, offset)


def writes_some(fd: int, data: memoryview, offset: int) -> int:
    return PWRITE(fd, data[: max(512, len(data) // 2)], offset)


PWRITE = os.pwrite
PARTS = st.lists(st.integers(0, 9000), max_size=8)


@pytest.mark.parametrize("pwrite", [PWRITE, refuses_direct, writes_some])
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=PARTS, aligned=st.integers(0, 3))
def test_a_file_of_chunks_holds_the_bytes_of_its_parts(
    tmp_path: Path, pwrite: Callable[[int, memoryview, int], int], sizes: list[int], aligned: int
) -> None:
    parts = [bytearray(os.urandom(size)) for size in (*sizes, 4096 * aligned)]

    def given_away() -> Iterator[memoryview]:
        for part in parts:
            copy = bytearray(part)
            yield memoryview(copy)
            copy[:] = bytes(len(copy))  # whoever writes may go on at once

    with mock.patch.object(os, "pwrite", pwrite), mock.patch.object(chunks, "CHUNK_BYTES", 4096):
        checksums = write_file(tmp_path / "file", given_away())
    assert (tmp_path / "file").read_bytes() == b"".join(parts)
    assert checksums == [zlib.crc32(part) for part in parts]


@pytest.mark.parametrize("late", [b"", bytes(4096), bytes(50_000)])
def test_a_refusal_of_a_chunk_names_the_file_and_ends_the_write(tmp_path: Path, late: bytes) -> None:
    with (
        mock.patch.object(os, "pwrite", fails_late),
        mock.patch.object(chunks, "CHUNK_BYTES", 4096),
        pytest.raises(OSError, match=r"No space left on device: '.*/file'") as raised,
    ):
        write_file(tmp_path / "file", [bytes(8193), late])
    assert raised.value.errno == errno.ENOSPC
