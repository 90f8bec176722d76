"""From a finished temporary directory to the latest checkpoint, such that a kill at any moment leaves a whole one.

The order is everything: the new checkpoint takes its name, then `latest` moves, then old checkpoints go. One process
(rank 0) does this. All functions raise `StorageError` when the file system refuses to write; that it refuses to remove
what is old ends no run.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from megatron3d.checkpoint.directory import (
    LATEST_NAME,
    LATEST_TEMPORARY,
    list_checkpoints,
    published_without_latest,
    replaced_name,
    step_of,
)
from megatron3d.checkpoint.refusals import storage_errors
from megatron3d.storage.durable import remove_tree, sync_directory, write_file


def temporary_directory(root: Path, name: str) -> Path:
    """Where the checkpoint `name` is written before it is published."""
    return root / f".tmp-{name}"


def prepare(root: Path, temporary: Path) -> None:
    """Make `root` if needed, clean up after runs that were killed while saving, make an empty `temporary`."""
    with storage_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        _clean_up(root)
        temporary.mkdir()


def abandon(root: Path, temporary: Path) -> None:
    """Take back what a failed save has begun, as far as the file system lets us; the next save removes the rest."""
    shutil.rmtree(temporary, ignore_errors=True)
    with suppress(OSError):
        _clean_up(root)


def _clean_up(root: Path) -> None:
    for entry in list(root.iterdir()):
        if entry.name.startswith(".old-"):
            _settle_replacement(entry)
    for entry in list(root.iterdir()):
        if entry.name == LATEST_TEMPORARY:
            _settle_latest(root)
        elif entry.name.startswith((".tmp-", ".gone-")):
            shutil.rmtree(entry, ignore_errors=True)  # `prune` reports what cannot be removed; a save is not held up


def _settle_replacement(replaced: Path) -> None:
    # A run was killed while it replaced this checkpoint: either the new one has the name already, or this one gets
    # its name back.
    original = replaced.with_name(replaced.name.removeprefix(".old-"))
    if original.exists():
        with suppress(OSError):
            remove_tree(replaced)
    else:
        os.rename(replaced, original)


def _settle_latest(root: Path) -> None:
    # A run was killed while it published its first checkpoint: if that one has its name, `latest` shall name it.
    temporary = root / LATEST_TEMPORARY
    if published_without_latest(root) is not None and not (root / LATEST_NAME).exists():
        os.replace(temporary, root / LATEST_NAME)
    else:
        temporary.unlink()


def publish(temporary: Path, final: Path) -> None:
    """Give the finished checkpoint its name and make it the latest; an earlier one of the same step is replaced.

    `latest` is written under a temporary name before anything moves: a full disk is met while nothing has changed yet.
    """
    root, replaced = final.parent, final.with_name(replaced_name(final.name))
    with storage_errors(final):
        sync_directory(temporary)
        write_file(root / LATEST_TEMPORARY, [f"{final.name}\n".encode()])
        if final.exists():
            os.rename(final, replaced)
        os.rename(temporary, final)
        sync_directory(root)
        os.replace(root / LATEST_TEMPORARY, root / LATEST_NAME)
        sync_directory(root)
        if replaced.exists():
            with suppress(OSError):
                remove_tree(replaced)


def prune(final: Path, keep_last: int, *, retain_interval: int | None = None) -> dict[Path, str]:
    """Remove all but the `keep_last` newest checkpoints up to `final`, which `latest` names and which always stays.

    Checkpoints whose step is a multiple of `retain_interval` stay too. Those of steps after `final` belong to a run
    from which this one turned back; they are not touched.

    Returns:
        A sentence for each directory that could not be removed: an old checkpoint, or what is left of one.
    """
    root, reasons = final.parent, {}
    earlier = [path for path in list_checkpoints(root) if step_of(path) < step_of(final)]
    for path in earlier[: max(0, len(earlier) + 1 - keep_last)]:
        if retain_interval is None or step_of(path) % retain_interval:
            try:
                remove_tree(path)
            except OSError as error:
                reasons[path.name] = f" ({error.strerror or error})"
    left = [*(root / name for name in reasons), *root.glob(".gone-*")]
    return {path: _not_removed(path, reasons) for path in sorted(left) if path.exists()}


def _not_removed(path: Path, reasons: Mapping[str, str]) -> str:
    reason = reasons.get(path.name.removeprefix(".gone-"), "")
    return f"{path} cannot be removed{reason}; training continues, and it takes space until it is removed by hand"
