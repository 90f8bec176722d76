"""Saving: every rank writes its boxes into a temporary directory, rank 0 checks and publishes it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron3d.checkpoint import publish, ranks
from megatron3d.checkpoint.directory import Level, checkpoint_name, verify
from megatron3d.checkpoint.finite import require_finite
from megatron3d.errors import StorageError
from megatron3d.params.boxes import ShardView


def save_checkpoint(
    root: Path,
    step: int,
    tensors: Mapping[str, ShardView],
    *,
    documents: Mapping[str, dict[str, Any]],
    keep_last: int | None,
    group: ranks.ProcessGroup | None,
    rank: int,
    world_size: int,
    verify_level: Level = "headers",
) -> Path:
    """Write a checkpoint of `step` below `root`, make it the latest, return its directory. Collective over `group`.

    Args:
        root: the --save directory; on a file system that all nodes share.
        step: training step, part of the name; a checkpoint of the same step is replaced.
        tensors: what this rank holds under each name; a name may be absent or its view empty. Names, full shapes and
            dtypes are the same on all ranks; all boxes together cover each tensor, boxes held twice are identical.
        documents: JSON-safe values written as NAME.json by rank 0; the same on all ranks.
        keep_last: how many of the newest checkpoints stay, for a caller who has measured what is saved; None keeps all
            (`publish.prune` removes some later).
        group: all ranks of the run, or None in a single process.
        rank: rank within `group`.
        world_size: size of `group`.
        verify_level: how closely rank 0 reads back before it publishes; "full" reads every byte again.

    Raises:
        NumericsError: some rank holds a NaN or an infinity; raised on every rank before anything is written.
        StorageError: the file system of any rank refused, or the read-back found damage; raised on every rank, the
            temporary directory is gone and the checkpoints before are untouched.
        ValueError, RuntimeError: the boxes of the ranks overlap, leave a gap or disagree.
    """
    from megatron3d.checkpoint.store import write_tensors  # which takes most of a second

    if group is None and world_size != 1:
        raise ValueError(f"{world_size} ranks need a process group to save together")
    final = root / checkpoint_name(step)
    temporary = publish.temporary_directory(root, final.name)

    def finish() -> None:
        if rank == 0:
            require_whole(temporary, verify_level)
            publish.publish(temporary, final)
            for problem in publish.prune(final, keep_last).values() if keep_last is not None else ():
                warnings.warn(problem, stacklevel=2)

    ranks.on_every_rank(lambda: require_finite(tensors, step=step, root=root), group)
    try:
        ranks.on_every_rank(lambda: publish.prepare(root, temporary) if rank == 0 else None, group)
        write_tensors(temporary, tensors, step=step, documents=documents, group=group, rank=rank)
        ranks.on_every_rank(finish, group)
    except Exception:
        if rank == 0:
            # All ranks have stopped writing: each of the three steps above ends with all of them agreeing.
            publish.abandon(root, temporary)
        raise
    return final


def require_whole(temporary: Path, level: Level) -> None:
    """Read back a checkpoint that is about to be published, as closely as `level` says.

    Raises: StorageError if anything is wrong with it.
    """
    if problems := verify(temporary, level):
        raise StorageError(
            f"the checkpoint just written does not read back: {'; '.join(problems)}; "
            "earlier checkpoints are untouched; check the disk under --save"
        )
