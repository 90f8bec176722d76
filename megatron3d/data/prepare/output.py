"""What a preprocessing writes: token files and rejects in the order of the input, and the state that lets it go on.

Everything is written under partial names. From time to time the files are flushed to the disk and then the state is
replaced, so that at any moment the state counts only what is there; a resumed run cuts the files to it. The files get
their names together at the end. What ends the run before that keeps files and state where there is something to go on
from, and removes them otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from megatron3d.data.indexed import IndexedDatasetWriter
from megatron3d.data.partial_files import Extent, PartialFiles, partial_paths, reclaim
from megatron3d.data.prepare.encode import EncodedBatch
from megatron3d.data.prepare.rejects import RejectsFile
from megatron3d.data.prepare.run_state import RunState, load_state, remove_state, require_same_run, save_state
from megatron3d.errors import DataError, Megatron3dError, PeerError, StorageError

DEFAULT_CHECKPOINT_S = 30.0


@dataclass(frozen=True)
class OutputPlan:
    """Which files a run writes, and which run it is. `state` is None where no run can go on, as from standard input."""

    targets: tuple[str, ...]
    dtype: np.dtype
    rejects: Path
    state: Path | None
    identity: Mapping[str, str]


def is_complete(plan: OutputPlan) -> bool:
    """Whether all token files have their names and nothing of an unfinished run lies beside them."""
    unfinished = [path for target in plan.targets for path in partial_paths(target)]
    unfinished += [plan.state] if plan.state is not None else []
    written = [Path(f"{target}.{ending}") for target in plan.targets for ending in ("bin", "idx")]
    return all(path.exists() for path in written) and not any(path.exists() for path in unfinished)


class PreprocessOutput:
    """The output of one run, as a context manager: leaving it normally gives the files their names."""

    def __init__(self, plan: OutputPlan, *, resume: bool, checkpoint_s: float, note: Callable[[str], None]) -> None:
        """Open the files: those of an earlier run with `resume`, else new ones; `note` takes a line about either.

        Raises: ConfigError if the earlier run was another one; DataError if what it left is damaged; StorageError if
        the place cannot be written; InUseError if another run is writing there.
        """
        self._plan, self._checkpoint_s = plan, checkpoint_s
        self.state = RunState(extents=(Extent(),) * len(plan.targets))
        self._saved = plan.state is not None and plan.state.exists()  # whether the state on the disk counts something
        self._writers: list[IndexedDatasetWriter | None] = []  # None: published already
        self._rejects: RejectsFile | None = None
        self._is_publishing, self._last_save_s = False, time.monotonic()
        try:
            self._open(resume, note)
        except BaseException:
            self._close(remove=not self._saved)
            raise

    def __enter__(self) -> PreprocessOutput:
        """The output itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        """Publish; or after an exception keep what a later run can go on from, which a note of the exception says."""
        if error is None:
            try:
                self._publish()
            except BaseException as refusal:
                self._end(refusal)
                raise
        else:
            self._end(error)

    def append(self, batch: EncodedBatch, state: RunState) -> None:
        """Write a batch; `state` has the position and counts behind it. Raises: StorageError if the disk refuses."""
        for writer, encoded in zip(self._writers, batch.keys):
            assert writer is not None, "a batch behind the end of the input"
            writer.add_documents(encoded.tokens, encoded.sequence_lengths, encoded.sequences_per_document)
        assert self._rejects is not None
        self._rejects.add(batch.rejects)
        self.state = self._with_extents(state)
        if time.monotonic() - self._last_save_s >= self._checkpoint_s:
            self._save()

    def _open(self, resume: bool, note: Callable[[str], None]) -> None:
        """Lock the files first, since a state may be read and removed by one run at a time only."""
        plan, has_state = self._plan, self._saved
        earlier = self._earlier() if has_state and resume else None
        self._rejects = RejectsFile(plan.rejects)  # the first, since runs with other keys share it and the state
        for target, extent in zip(plan.targets, (earlier or self.state).extents):
            is_published = earlier is not None and earlier.is_read and reclaim(target, extent)
            files = None if is_published else PartialFiles(target, is_resumable=True)
            self._writers.append(files and IndexedDatasetWriter(target, plan.dtype, files=files))
        if earlier is not None:
            self.state = earlier
            note(f"--resume: goes on behind the {earlier.counts.num_documents:,} documents that are written.")
        elif resume:
            note(f"--resume: there is no {plan.state}, so this begins at the start.")
        elif has_state:
            note(f"The unfinished output of an earlier run is replaced; --resume would have gone on from {plan.state}.")
        if earlier is None and plan.state is not None:
            remove_state(plan.state)
            self._saved = False
        for writer, extent in zip(self._writers, self.state.extents):
            if writer is not None:
                writer.files.cut(extent)
        self._rejects.cut(self.state.rejects_bytes)

    def _earlier(self) -> RunState:
        """The state on the disk, with its list of rejects under the partial name."""
        path = self._plan.state
        assert path is not None
        identity, earlier = load_state(path)
        require_same_run(path, identity, self._plan.identity)
        if len(earlier.extents) != len(self._plan.targets):
            raise DataError(
                f"{path} counts {len(earlier.extents)} outputs of {len(self._plan.targets)}; it is damaged."
            )
        if earlier.is_read:
            RejectsFile.reclaim(self._plan.rejects, earlier.rejects_bytes)
        return earlier

    def _with_extents(self, state: RunState) -> RunState:
        """The state with how much of each file is behind it."""
        assert self._rejects is not None
        extents = [
            writer.files.extent if writer is not None else extent
            for writer, extent in zip(self._writers, self.state.extents)
        ]
        return replace(state, extents=tuple(extents), rejects_bytes=self._rejects.size_bytes)

    def _save(self) -> None:
        """Flush everything, then replace the state."""
        if self._plan.state is None:
            return
        for writer in self._writers:
            if writer is not None:
                writer.files.flush()
        if self._rejects is not None:
            self._rejects.flush()
        save_state(self._plan.state, self._plan.identity, self.state)
        self._saved, self._last_save_s = True, time.monotonic()

    def _publish(self) -> None:
        """Give all files their names; a run that ends in between is resumed from the state of the whole input."""
        self.state = replace(self.state, is_read=True)
        self._save()
        self._is_publishing = True
        for place, writer in enumerate(self._writers):
            if writer is not None:
                writer.publish()
                self._writers[place] = None
        assert self._rejects is not None
        self._rejects.publish()
        if self._plan.state is not None:
            remove_state(self._plan.state)

    def _end(self, error: BaseException) -> None:
        """Keep what the next run can go on from. A signal or a lost worker came between two batches, so all is kept;
        after another error what the last state counts."""
        try:
            is_between_batches = not isinstance(error, Exception) or isinstance(error, PeerError)
            if is_between_batches and self.state.counts.num_records and not self._is_publishing:
                self._save()
        except StorageError:
            error.add_note("The last state could not be written.")
        finally:
            self._close(remove=not self._saved)
        if self._saved:
            error.add_note(
                f"{self.state.counts.num_documents:,} documents are kept beside {self._plan.state}; the same command "
                f"with --resume goes on."
            )

    def _close(self, *, remove: bool) -> None:
        """Close all files that are not published, and remove them."""
        closers = [partial(writer.files.close, remove=remove) for writer in self._writers if writer is not None]
        closers += [partial(self._rejects.close, remove=remove)] if self._rejects is not None else []
        closers += [partial(remove_state, self._plan.state)] if remove and self._plan.state is not None else []
        for close in closers:
            with suppress(Megatron3dError):  # what ended the run is said; no state counts what was still buffered
                close()
