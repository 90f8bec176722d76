"""Global batches: the samples [c, c + G) of a stream, of which each data-parallel rank reads its part.

After c consumed samples the next global batch of G samples is the numbers c .. c + G - 1, whatever the layout. Rank r
of dp reads the G/dp numbers from c + r*G/dp on, in order; cut into micro-batches of B with `Batch.split`,
micro-batch m holds the B numbers from c + r*G/dp + m*B on. Put in the order (rank, micro-batch, row), a global batch
is the same list of samples for every dp and B. Tensor and pipeline ranks read their own copies; nobody broadcasts.

The number of consumed samples is the whole state: a resumed run, with another dp or batch size if need be, reads on
where the last one stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Generic, TypeVar

from megatron3d.data.batch import Batch


@dataclass(frozen=True)
class BatchPart:
    """One rank's part of one global batch: which sample numbers, by `first` and `count`."""

    consumed_samples: int
    global_batch_size: int
    dp_rank: int
    dp_size: int

    def __post_init__(self) -> None:
        """Raises: ValueError if the batch does not divide among the ranks or a number is out of range."""
        if not 0 <= self.dp_rank < self.dp_size or self.consumed_samples < 0 or self.global_batch_size < 1:
            raise ValueError(f"no such part of a global batch: {self}")
        if self.global_batch_size % self.dp_size:
            raise ValueError(f"a global batch of {self.global_batch_size} does not divide among dp={self.dp_size}")

    @property
    def count(self) -> int:
        """Samples of this rank, G/dp."""
        return self.global_batch_size // self.dp_size

    @property
    def first(self) -> int:
        """The first sample number of this rank."""
        return self.consumed_samples + self.dp_rank * self.count

    def following(self) -> BatchPart:
        """The same rank's part of the next global batch, if its size stays the same."""
        return replace(self, consumed_samples=self.consumed_samples + self.global_batch_size)


BatchT = TypeVar("BatchT", bound=Batch)


class GlobalBatches(Generic[BatchT]):
    """Reads one rank's batches, ahead of time in threads.

    Reading ahead is a guess that the next batch follows the last with the same size; a wrong guess (a batch-size
    ramp, a jump after a resume) costs the reading, never the result. Use as a context manager, or `close()`.
    """

    def __init__(self, reader: Callable[[int, int], BatchT], *, num_workers: int) -> None:
        """`reader(first, count)` makes the batch of those sample numbers, in any thread; `num_workers` batches are
        read ahead, 0 reads in the caller's thread."""
        self._reader = reader
        self._num_ahead = num_workers
        self._threads = ThreadPoolExecutor(num_workers, "read-ahead") if num_workers > 0 else None
        self._ahead: dict[BatchPart, Future[BatchT]] = {}

    def read(self, consumed_samples: int, global_batch_size: int, dp_rank: int, dp_size: int) -> BatchT:
        """All G/dp samples of this rank of the global batch that follows `consumed_samples`.

        Raises: what the reader raises, such as DataError for a token id outside the vocabulary; ValueError if the
        global batch does not divide among the ranks.
        """
        part = BatchPart(consumed_samples, global_batch_size, dp_rank, dp_size)
        if self._threads is None:
            return self._reader(part.first, part.count)
        future = self._ahead.pop(part, None) or self._submit(self._threads, part)
        self._read_ahead_of(self._threads, part)
        return future.result()

    def read_by(self, reader: Callable[[int, int], BatchT]) -> None:
        """Let another reader make the batches from now on; what was read ahead is dropped."""
        self._reader = reader
        for guess in list(self._ahead):
            self._ahead.pop(guess).cancel()

    def close(self) -> None:
        """Stop the threads; what they have read ahead is dropped. The object cannot read afterwards."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()

    def __enter__(self) -> GlobalBatches[BatchT]:
        """The reader itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def _read_ahead_of(self, threads: ThreadPoolExecutor, part: BatchPart) -> None:
        """Ask the threads for the batches after `part`, and drop guesses that are not among them."""
        wanted = []
        for _ in range(self._num_ahead):
            part = part.following()
            wanted.append(part)
        for guess in self._ahead.keys() - set(wanted):
            self._ahead.pop(guess).cancel()
        for guess in wanted:
            if guess not in self._ahead:
                self._ahead[guess] = self._submit(threads, guess)

    def _submit(self, threads: ThreadPoolExecutor, part: BatchPart) -> Future[BatchT]:
        """Ask the threads for one batch."""
        return threads.submit(self._reader, part.first, part.count)
