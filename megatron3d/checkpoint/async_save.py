"""Saving while training goes on: copied at a step boundary, written by a process of each rank, published later.

`begin` takes the time of a copy in memory, `finish` that of a few small files. Between them training may change
whatever was saved, because the copy is of its own. Order and guarantees are those of `save.py`: nothing has the name of
a checkpoint before every byte of all ranks is on the disk and was compared with what was copied. One save is under way
at a time, so that one buffer is enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron3d.checkpoint import publish, ranks
from megatron3d.checkpoint.directory import checkpoint_name
from megatron3d.checkpoint.finite import not_finite
from megatron3d.checkpoint.host_buffer import HostBuffer
from megatron3d.checkpoint.index import Index, StoredFile, document_text, write_index
from megatron3d.checkpoint.refusals import storage_errors
from megatron3d.checkpoint.save import require_whole
from megatron3d.checkpoint.staging import Staged
from megatron3d.checkpoint.writer import WriterProcess
from megatron3d.checkpoint.writer_process import WriteOutcome
from megatron3d.errors import StorageError
from megatron3d.params.boxes import ShardView


@dataclass(frozen=True)
class _Flight:
    """A save under way; `index` on rank 0."""

    final: Path
    temporary: Path
    step: int
    staged: Staged
    index: Index | None


class AsyncSave:
    """The saves of one run, one after another. All ranks make the same calls of `begin` and `finish`."""

    def __init__(self, *, group: ranks.ProcessGroup | None, rank: int, world_size: int) -> None:
        """Allocate and start nothing yet.

        Args:
            group: all ranks of the run, or None in a single process.
            rank: rank within `group`.
            world_size: size of `group`.
        """
        if group is None and world_size != 1:
            raise ValueError(f"{world_size} ranks need a process group to save together")
        self._group, self._rank = group, rank
        self._buffer = HostBuffer()
        self._writer = WriterProcess(self._buffer)
        self._flight: _Flight | None = None

    @property
    def buffer_bytes(self) -> int:
        """Host memory that is held from save to save."""
        return len(self._buffer.data)

    @property
    def writer_pid(self) -> int | None:
        """The writer process of this rank; None while there is none."""
        return self._writer.pid

    @property
    def under_way(self) -> Path | None:
        """The checkpoint that was begun and not finished, the same on all ranks."""
        return None if self._flight is None else self._flight.final

    def is_written(self) -> bool:
        """Whether this rank's part of the save under way is written or has failed."""
        return self._writer.has_ended()

    def is_written_within(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s` seconds for `is_written`; returns whether it holds."""
        return self._writer.has_ended(timeout_s=timeout_s)

    def begin(
        self, root: Path, step: int, tensors: Mapping[str, ShardView], *, documents: Mapping[str, dict[str, Any]]
    ) -> Path:
        """Copy what this rank saves and have it written; returns the directory it will be. Collective.

        Arguments are those of `save_checkpoint`. Afterwards the tensors may change.

        Raises:
            StorageError: the file system refused the temporary directory.
            MemoryShortError: some rank has no memory for the copy.
            ValueError, RuntimeError: the boxes of the ranks overlap, leave a gap or disagree.
        """
        from megatron3d.checkpoint.store import stage_tensors  # which takes most of a second

        assert self._flight is None, "one save is under way at a time"
        final = root / checkpoint_name(step)
        temporary = publish.temporary_directory(root, final.name)
        staged = Staged(self._buffer, step)

        def prepare() -> dict[str, StoredFile]:
            if self._rank != 0:
                return {}
            publish.prepare(root, temporary)
            texts = {f"{name}.json": document_text(document) for name, document in documents.items()}
            return {
                file: StoredFile(len(text), staged.add_document(temporary / file, text)) for file, text in texts.items()
            }

        try:
            stored = ranks.on_every_rank(prepare, self._group)
            index = stage_tensors(
                temporary, tensors, step=step, stage=staged.add_shard, group=self._group, rank=self._rank
            )
        except Exception:
            if self._rank == 0:
                publish.abandon(root, temporary)
            raise
        self._writer.give(staged.order)
        self._flight = _Flight(final, temporary, step, staged, index and replace(index, documents=stored))
        return final

    def finish(self) -> Path:
        """Wait until every rank has written, make the checkpoint the latest and return its directory. Collective.

        Raises:
            NumericsError: some rank holds a NaN or an infinity; on every rank.
            StorageError: the file system of any rank refused, a writer process was killed, or what it wrote is not
                what was copied; on every rank. The checkpoints before are untouched.
        """
        flight, self._flight = self._flight, None
        assert flight is not None, "a save is begun before it is finished"

        def publish_it() -> None:
            if flight.index is not None:
                write_index(flight.temporary, flight.index)
                require_whole(flight.temporary, "headers")
                publish.publish(flight.temporary, flight.final)

        try:
            ranks.on_every_rank(lambda: _require_written(self._writer.outcome(), flight), self._group)
            ranks.on_every_rank(publish_it, self._group)
        except Exception:
            if self._rank == 0:
                publish.abandon(flight.final.parent, flight.temporary)  # no rank's process is writing any more
            raise
        return flight.final

    def close(self) -> None:
        """End the writer process, with what it may be writing, and give the memory back."""
        self._writer.close()
        self._buffer.close()


def _require_written(outcome: WriteOutcome, flight: _Flight) -> None:
    """Make sure that a writer process has written this save and what was copied for it.

    Raises: NumericsError, StorageError.
    """
    if outcome.not_finite:
        names = [key.rpartition("@")[0] for key in outcome.not_finite]
        raise not_finite(list(dict.fromkeys(names)), step=flight.step, root=flight.final.parent)
    if outcome.error is not None:
        number, reason, file = outcome.error
        with storage_errors(flight.temporary):
            raise OSError(number, reason, file or None)
    if (outcome.step, outcome.checksums) != (flight.step, flight.staged.checksums):
        raise StorageError(
            f"what was written for {flight.final} is not what was copied after step {flight.step} (it says step "
            f"{outcome.step}), so it is not published; the checkpoints before stand. Leave --async-save out, and look "
            "at the memory of this machine"
        )
