"""What a preprocessing writes: token files and rejects in the order of the input, and the state that lets it go on.

Everything is written under partial names. From time to time the files are flushed to the disk and then the state is
replaced, so that at any moment the state counts only what is there; a resumed run cuts the files to it. The files get
their names together at the end, and the state says so from then on. An error before that keeps files and state where
there is something to resume from; otherwise it removes them, and the state is again that of the finished output that
the run would have replaced.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from megatron3d.data.indexed import IndexedDatasetWriter, index_bytes
from megatron3d.data.partial_files import Extent, PartialFiles, partial_paths, reclaim, storing
from megatron3d.data.prepare.corpus import check_position
from megatron3d.data.prepare.encode import EncodedBatch
from megatron3d.data.prepare.rejects import RejectsFile
from megatron3d.data.prepare.run_state import (
    RunRecord,
    RunState,
    load_state,
    remove_state,
    require_same_run,
    save_state,
)
from megatron3d.data.prepare.spans import InputSpan
from megatron3d.errors import ConfigError, DataError, Megatron3dError, PeerError, StorageError

DEFAULT_CHECKPOINT_S = 30.0


@dataclass(frozen=True)
class OutputPlan:
    """Which files a run writes, what it reads, and all that its output depends on. A run that is not resumable, as
    from standard input, writes no state."""

    targets: tuple[str, ...]
    dtype: np.dtype
    rejects: Path
    state: Path
    spans: Sequence[InputSpan]
    identity: Mapping[str, str]
    is_resumable: bool = True

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the targets, which lie beside the state."""
        return tuple(Path(target).name for target in self.targets)


def is_complete(plan: OutputPlan) -> bool:
    """Whether a resumed run has nothing to do: its output is there, and was made with the same options and input.

    Raises: ConfigError if it was made with others, or nothing says with which; DataError if the record of that is
    damaged, or the output is not the one that it counts.
    """
    written = [Path(f"{target}.{ending}") for target in plan.targets for ending in ("bin", "idx")]
    if not all(os.path.exists(path) for path in written):  # not Path.exists, which raises for a closed folder
        return False
    if not plan.state.exists():
        if any(path.exists() for target in plan.targets for path in partial_paths(target)):
            return False
        raise ConfigError(
            f"--resume: {written[0]} is complete, but there is no {plan.state} to say which options and input it was "
            "made with; leave out --resume to make it again, or leave it as it is."
        )
    saved = load_state(plan.state)
    if not saved.state.is_published:
        return False
    require_same_run(plan.state, saved.identity, plan.identity)
    sizes = [
        size
        for extent in saved.state.extents
        for size in (extent.bin_bytes, index_bytes(extent.num_sequences, extent.num_documents))
    ]
    for path, size in zip(written, sizes):
        if path.stat().st_size != size:
            raise DataError(
                f"{path} holds {path.stat().st_size} bytes, but {size} by {plan.state}: it was changed or replaced "
                "since; leave out --resume to make it again."
            )
    return True


class PreprocessOutput:
    """The output of one run, as a context manager: leaving it normally gives the files their names."""

    def __init__(self, plan: OutputPlan, *, resume: bool, checkpoint_s: float, note: Callable[[str], None]) -> None:
        """Open the files: those of an earlier run with `resume`, else new ones; `note` takes a line about either.

        Raises: ConfigError if the earlier run was another one; DataError if what it left is damaged; StorageError if
        the place cannot be written; InUseError if another run is writing there.
        """
        self._plan, self._checkpoint_s = plan, checkpoint_s
        self.state = RunState(extents=(Extent(),) * len(plan.targets))
        self._saved = False  # whether files and state are kept for a resume if this run ends with an error
        self._before: RunRecord | None = None  # what the state said before this run replaced it
        self._has_begun = False  # and whether it did
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
        """Lock the files before the state is replaced, which one run at a time may do."""
        plan, earlier = self._plan, self._earlier(resume)
        self._rejects = RejectsFile(plan.rejects)  # the first, since runs with other keys share it and the state
        if earlier is None:
            self._begin(resume, note)
        else:
            note(f"--resume: goes on behind the {earlier.counts.num_documents:,} documents that are written.")
        for target, extent in zip(plan.targets, (earlier or self.state).extents):
            is_published = earlier is not None and earlier.is_read and reclaim(target, extent)
            files = None if is_published else PartialFiles(target, is_resumable=True)
            self._writers.append(files and IndexedDatasetWriter(target, plan.dtype, files=files))
        self.state = earlier or self.state
        for writer, extent in zip(self._writers, self.state.extents):
            if writer is not None:
                writer.files.cut(extent)
        self._rejects.cut(self.state.rejects_bytes)

    def _earlier(self, resume: bool) -> RunState | None:
        """The state that this run resumes from, its list of rejects under the partial name; None to start again."""
        path = self._plan.state
        if not os.path.exists(path):
            return None
        self._saved = True
        try:
            self._before = load_state(path)
        except DataError:
            if resume:
                raise
            return None
        self._saved = not self._before.state.is_published
        if not resume:
            return None
        require_same_run(path, self._before.identity, self._plan.identity)
        if self._before.state.is_published:
            return None
        earlier = self._before.state
        self._check(earlier)
        if earlier.is_read:
            RejectsFile.reclaim(self._plan.rejects, earlier.rejects_bytes)
        return earlier if earlier.counts.num_records or earlier.is_read else None

    def _check(self, earlier: RunState) -> None:
        """Compare a state with this run's input and with itself."""
        path, counts = self._plan.state, earlier.counts
        try:
            if len(earlier.extents) != len(self._plan.targets):
                raise ValueError(f"it counts {len(earlier.extents)} outputs of {len(self._plan.targets)}")
            documents = {extent.num_documents for extent in earlier.extents} | {counts.num_documents}
            if len(documents) > 1:
                raise ValueError(f"it counts {' and '.join(map(str, sorted(documents)))} documents")
            if counts.num_records:
                check_position(self._plan.spans, earlier.position)
        except (ValueError, OSError) as error:
            raise DataError(f"{path} does not fit the input: {error}; run again without --resume.") from error

    def _begin(self, resume: bool, note: Callable[[str], None]) -> None:
        """Replace the state, which shows from now on what a killed run leaves, and remove what an earlier one left."""
        plan, before = self._plan, self._before
        if resume:
            why = f"there is no {plan.state}"
            if before is not None and before.state.is_published:
                why = f"the output that {plan.state} counts is not there any more"
            elif before is not None:
                why = f"{plan.state} counts no document yet"
            note(f"--resume: {why}, so this begins at the start.")
        elif self._saved and before is None:
            note(f"{plan.state} cannot be read, so what it counts is replaced.")
        elif self._saved:
            note(f"The unfinished output of an earlier run is replaced; --resume would have gone on from {plan.state}.")
        self._has_begun, self._saved = True, False
        left = [str(plan.state.with_name(name)) for name in (before.outputs if before is not None else ())]
        for partial_path in [path for target in left if target not in plan.targets for path in partial_paths(target)]:
            with storing(partial_path):
                partial_path.unlink(missing_ok=True)
        if plan.is_resumable:
            save_state(plan.state, RunRecord(plan.identity, plan.outputs, self.state))
        else:
            remove_state(plan.state)

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
        if not self._plan.is_resumable:
            return
        for writer in self._writers:
            if writer is not None:
                writer.files.flush()
        if self._rejects is not None:
            self._rejects.flush()
        save_state(self._plan.state, RunRecord(self._plan.identity, self._plan.outputs, self.state))
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
        if self._plan.is_resumable:
            self.state = replace(self.state, is_published=True)
            save_state(self._plan.state, RunRecord(self._plan.identity, self._plan.outputs, self.state))

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
        closers += [self._put_back_state] if remove and self._has_begun else []
        for close in closers:
            with suppress(Megatron3dError):  # what ended the run is said; no state counts what was still buffered
                close()

    def _put_back_state(self) -> None:
        """The state as it was before this run, where that is of a finished output, which still is there; else none."""
        before = self._before
        if before is not None and before.state.is_published and not self._is_publishing:
            save_state(self._plan.state, before)
        else:
            remove_state(self._plan.state)
