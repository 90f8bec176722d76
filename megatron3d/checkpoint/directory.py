"""A directory of checkpoints: which are there, which is the latest, is one whole, and who is using the directory.

    ROOT/iter_0000020/     a checkpoint: rank*.safetensors, index.json and documents such as run.json
    ROOT/latest            text: the name of the checkpoint to resume from
    ROOT/.lock             held by the run that writes here
    ROOT/.tmp-*, .gone-*   of a run that was killed while saving; removed by the next save
    ROOT/.old-*            the earlier save of the same step, for the instant in which it is replaced

Reading never changes anything here; `publish` does the writing.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from megatron3d.checkpoint.index import INDEX_NAME, Index, parse_index, read_index
from megatron3d.checkpoint.refusals import storage_errors
from megatron3d.checkpoint.shard_file import check_entry, open_shard, read_box, unknown_entries
from megatron3d.errors import CheckpointError, InUseError
from megatron3d.files.fields import Fields
from megatron3d.files.json_text import parse_object
from megatron3d.files.regular import read_regular
from megatron3d.storage.checksum import crc32

LATEST_NAME = "latest"
LATEST_TEMPORARY = ".tmp-latest"
LOCK_NAME = ".lock"
Level = Literal["sizes", "headers", "full"]
_NAME = re.compile(r"(?:\.old-)?iter_(\d+)")


def checkpoint_name(step: int) -> str:
    """Directory name of the checkpoint of a step: `iter_0000020`."""
    return f"iter_{step:07d}"


def replaced_name(name: str) -> str:
    """Where the earlier save of the same step waits while a new one takes its name."""
    return f".old-{name}"


def step_of(directory: Path) -> int:
    """The step in the name of a checkpoint directory.

    Raises:
        CheckpointError: the name is not that of a checkpoint.
    """
    match = _NAME.fullmatch(directory.name)
    if match is None:
        raise CheckpointError(f"{directory} is not named like a checkpoint (iter_0000020); rename it to its step")
    return int(match.group(1))


def list_checkpoints(root: Path) -> list[Path]:
    """The complete checkpoints in `root` by ascending step; directories without an index do not count."""
    if not root.is_dir():
        return []
    names = {entry.name.removeprefix(".old-") for entry in root.iterdir() if _NAME.fullmatch(entry.name)}
    found = [path for name in names if (path := _finished(root, name)) is not None]
    return sorted(found, key=step_of)


def unfinished_directories(root: Path) -> list[Path]:
    """Directories named like checkpoints that have no index, sorted: no save publishes one, a broken copy may."""
    if not root.is_dir():
        return []
    named = (entry for entry in root.iterdir() if _NAME.fullmatch(entry.name) and entry.is_dir())
    return sorted(entry for entry in named if not (entry / INDEX_NAME).is_file())


def latest_checkpoint(root: Path) -> Path | None:
    """The checkpoint that `latest` names, or None if nothing was ever published in `root`.

    Raises:
        CheckpointError: `latest` names something that is not there.
    """
    try:
        name = read_regular(root / LATEST_NAME).decode().strip()
    except (FileNotFoundError, NotADirectoryError):
        return published_without_latest(root)
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{root / LATEST_NAME} cannot be read ({error}); name a step with --ckpt-step") from error
    path = _finished(root, name) if _NAME.fullmatch(name) else None
    if path is None:
        raise CheckpointError(
            f"{root / LATEST_NAME} names {name!r}, which is not a checkpoint in {root}; {_holds(root)}; "
            "name a step with --ckpt-step"
        )
    return path


def published_without_latest(root: Path) -> Path | None:
    """The first checkpoint of a run that was killed after it took its name and before `latest` named it."""
    try:
        name = read_regular(root / LATEST_TEMPORARY).decode().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return _finished(root, name) if _NAME.fullmatch(name) else None


def size_of(checkpoint: Path) -> int:
    """Bytes of all files of a checkpoint; 0 if it cannot be read, say because somebody has removed it."""
    try:
        return sum(entry.stat().st_size for entry in checkpoint.iterdir())
    except OSError:
        return 0  # for a report, which must not end a run


def was_saved_to(root: Path) -> bool:
    """Whether a checkpoint was ever published in `root`, or is `root` itself, be it whole or not."""
    if not root.is_dir():
        return False
    if any((root / name).exists() for name in (LATEST_NAME, LATEST_TEMPORARY, INDEX_NAME)):
        return True
    return any(_NAME.fullmatch(entry.name) for entry in root.iterdir())


def find_checkpoint(root: Path, step: int | None = None) -> Path:
    """The checkpoint to load: that of `step`, else the latest; `root` may also be one checkpoint itself.

    Raises:
        CheckpointError: there is none, with what is there instead.
    """
    if not root.is_dir():
        raise CheckpointError(f"--load {root} is not a directory; give the directory that --save wrote")
    if (root / INDEX_NAME).is_file() and (step is None or step == read_index(root).step):
        return root
    if step is not None:
        path = _finished(root, checkpoint_name(step))
        if path is None:
            raise CheckpointError(f"--ckpt-step {step}: --load {root} has no checkpoint of this step; {_holds(root)}")
        return path
    path = latest_checkpoint(root)
    if path is None:
        raise CheckpointError(
            f"--load {root} has no file named {LATEST_NAME}, so it holds no finished checkpoint; {_holds(root)}; "
            "give the directory that --save wrote, or name a step with --ckpt-step"
        )
    return path


def _finished(root: Path, name: str) -> Path | None:
    for candidate in (root / name, root / replaced_name(name)):
        if (candidate / INDEX_NAME).is_file():
            return candidate
    return None


def _holds(root: Path) -> str:
    if steps := [step_of(path) for path in list_checkpoints(root)]:
        return f"it holds checkpoints of steps {', '.join(map(str, steps))}"
    others = sorted(entry.name for entry in root.iterdir() if not entry.name.startswith("."))
    listed = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
    return f"it holds {listed}" if others else "it is empty"


def verify(
    directory: Path, level: Level = "full", *, on_bytes: Callable[[int], None] = lambda count: None
) -> list[str]:
    """Everything wrong with a checkpoint, each as a sentence that names the file; empty if it is whole.

    "sizes" looks at lengths and at the index, whose boxes must cover each tensor exactly once; "headers" also at what
    every file says it contains, "full" at every byte. `on_bytes` is called after each box and document that was
    looked at, with its number of bytes.
    """
    try:
        index = parse_index(directory)
    except CheckpointError as error:
        return [str(error)]
    problems = [f"{directory / INDEX_NAME}: {problem}" for problem in index.problems()]
    if _NAME.fullmatch(directory.name) and step_of(directory) != index.step:
        problems.append(
            f"{directory} has the checkpoint of step {index.step}; rename it to {checkpoint_name(index.step)}, and "
            f"name that in {LATEST_NAME} where it is the latest"
        )
    problems += _document_problems(directory, index, level)
    on_bytes(sum(document.size_bytes for document in index.documents.values()))
    for file in sorted(index.files):
        problems += _shard_problems(directory, index, file, level, on_bytes)
    return problems


def _document_problems(directory: Path, index: Index, level: Level) -> list[str]:
    problems = []
    for name, stored in index.documents.items():
        try:
            data = read_regular(directory / name)
        except OSError as error:
            problems.append(f"checkpoint file {directory / name} is missing ({error.strerror})")
            continue
        if len(data) != stored.size_bytes:
            problems.append(f"checkpoint file {directory / name}: {len(data)} bytes instead of {stored.size_bytes}")
        elif level == "full" and crc32(data) != stored.crc32:
            problems.append(f"checkpoint file {directory / name} is damaged: its checksum disagrees with {INDEX_NAME}")
    return problems


def _shard_problems(
    directory: Path, index: Index, file: str, level: Level, on_bytes: Callable[[int], None]
) -> list[str]:
    path, problems = directory / file, []
    boxes = [(name, t, s) for name, t in index.tensors.items() for s in t.boxes if s.file == file]
    check = read_box if level == "full" else check_entry
    try:
        with open_shard(path, index.files[file], for_data=level == "full") as handle:
            if level != "sizes":
                problems += unknown_entries(handle, path, {stored.key for _, _, stored in boxes})
            for name, tensor, stored in boxes if level != "sizes" else []:
                try:
                    check(handle, path, name, tensor, stored)
                except CheckpointError as error:
                    problems.append(str(error))
                on_bytes(stored.box.numel * tensor.dtype.itemsize)
    except CheckpointError as error:
        problems.append(str(error))
    return problems


class HeldDirectory:
    """A directory that this process has locked. The lock is on a file in it, and a file can be removed: see `renew`."""

    def __init__(self, root: Path) -> None:
        """Make the directory and lock it. Raises: InUseError, StorageError as `hold_directory` does."""
        self._root = root
        self._fd = _open_lock(root)

    def renew(self) -> str | None:
        """Lock the directory anew if somebody has removed it, or its lock file, since; then a line that says so.

        Until then another run may have started in a directory made again at the same place: without a look at the file
        both would hold what they believe to be the lock.

        Raises:
            InUseError: another process holds the new one.
            StorageError: it cannot be made again.
        """
        try:
            if os.path.samestat(os.stat(self._root / LOCK_NAME), os.fstat(self._fd)):
                return None
        except OSError:  # gone with or without its directory: what is wrong shows when it is made again
            pass
        before, self._fd = self._fd, _open_lock(self._root)
        os.close(before)
        return f"--save {self._root} was removed while this run was saving there; it was made again"

    def close(self) -> None:
        """Give the directory free."""
        os.close(self._fd)


@contextmanager
def hold_directory(root: Path) -> Iterator[HeldDirectory]:
    """Keep `root` for this process while the block runs, so that two runs never save into the same directory.

    The lock is the kernel's (`flock`) and ends with the process, so a killed run leaves nothing to clean up.

    Raises:
        InUseError: another process holds it; its host and process id are named.
        StorageError: the directory cannot be made or its file system has no locks.
    """
    held = HeldDirectory(root)
    try:
        yield held
    finally:
        held.close()


def _open_lock(root: Path) -> int:
    """The descriptor of the locked lock file in `root`, which names this process now."""
    with storage_errors(root / LOCK_NAME):
        root.mkdir(parents=True, exist_ok=True)
        fd = os.open(root / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        with storage_errors(root / LOCK_NAME):
            _lock(fd, root)
            os.ftruncate(fd, 0)
            os.pwrite(fd, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _lock(fd: int, root: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InUseError(
            f"--save {root} is in use by another run ({_holder(fd)}); stop it or give another --save directory"
        ) from error


def _holder(fd: int) -> str:
    try:
        holder = Fields(parse_object(os.pread(fd, 4096, 0)), "the lock")
        return f"process {holder.integer('pid')} on {holder.text('host')}"
    except ValueError:
        return "which has only just started"
