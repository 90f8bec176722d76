"""Files that are there whole or not at all, and the sentence for each refusal of the operating system."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from megatron3d.errors import StorageError
from megatron3d.storage.atomic import atomic_path, write_text_atomically
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
