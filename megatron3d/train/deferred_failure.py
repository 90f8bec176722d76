"""Errors that leave the model whole, deferred until all ranks have saved: those of reports and of reading data.

In the middle of a step a failing rank can only end: the others are in collectives that it will not come to, and its own
weights may be half updated. A report fails between steps, and a batch is read before the step that uses it, so that
either can wait for the next vote (every step and every batch of an evaluation has one): all ranks then save and end.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron3d.comm.collectives import gather_values
from megatron3d.comm.mesh import Mesh
from megatron3d.data.batch import Batch
from megatron3d.data.loader import GlobalBatches
from megatron3d.errors import PeerError


class DeferredFailure:
    """The first such error of this rank, if there is one."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self.error: Exception | None = None

    @property
    def reason(self) -> str | None:
        """Why this rank wants all to stop, if it does."""
        return None if self.error is None else f"rank {self._mesh.rank} failed: {type(self.error).__name__}"

    def keep(self, action: Callable[[], None]) -> None:
        """Run an action that concerns nothing but this rank's reports, and keep what it raises."""
        try:
            action()
        except Exception as error:
            self.take(error)

    def take(self, error: Exception) -> None:
        """Keep an error; the first one is the cause."""
        if self.error is None:
            self.error = error

    def raise_on_all_ranks(self, outcome: str) -> None:
        """End the run on every rank if any has failed; collective, to be called when the save is made.

        Raises: the error on the ranks that have one; PeerError on the others.
        """
        reasons = gather_values(self.reason, self._mesh.world)
        found = next(filter(None, reasons), None)
        if self.error is not None:
            raise self.error
        if found is not None:
            raise PeerError(f"{found}; {outcome}; its own message says more")


class PreparedBatches:
    """A reader of global batches for one rank, which can be asked to read one before it is needed."""

    def __init__(self, batches: GlobalBatches, mesh: Mesh, failure: DeferredFailure) -> None:
        self._batches, self._readers, self._failure = batches, mesh.batch, failure
        self._prepared: dict[tuple[int, int], Batch] = {}

    def prepare(self, consumed_samples: int, global_batch_size: int) -> None:
        """Read this batch now; an error is kept for the next vote."""
        key = (consumed_samples, global_batch_size)
        if key in self._prepared:
            return

        def read() -> None:
            self._prepared[key] = self._batches.read(*key, self._readers.rank, self._readers.size)

        self._failure.keep(read)

    def read(self, consumed_samples: int, global_batch_size: int, dp_rank: int, dp_size: int) -> Batch:
        """The batch, as `GlobalBatches.read` gives it; others that were prepared before it are dropped.

        Raises: what the reader raises, if it was not prepared.
        """
        batch = self._prepared.pop((consumed_samples, global_batch_size), None)
        for key in [key for key in self._prepared if key[0] <= consumed_samples]:
            del self._prepared[key]
        return batch if batch is not None else self._batches.read(consumed_samples, global_batch_size, dp_rank, dp_size)
