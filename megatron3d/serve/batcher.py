"""Samples of many requests through the model together: what waits while one batch runs becomes the next batch.

A batch begins at most `max_wait_s` after its first sample came; under load nothing waits for the clock, because the
samples that came in the meantime fill the batch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron3d.serve.classifier import EncodedSample
from megatron3d.serve.requests import OVERLOADED, RequestError

Run = Callable[[Sequence[EncodedSample]], NDArray[np.float32]]


@dataclass(frozen=True)
class BatchOptions:
    """Samples of a batch at most, how long the first of them waits for others, and how many may wait in all."""

    max_batch: int = 32
    max_wait_s: float = 0.002
    max_waiting: int = 1024


@dataclass
class BatchCounts:
    """Batches run so far, and samples in them."""

    batches: int = 0
    samples: int = 0


class Batcher:
    """Collects samples on one event loop and runs them on one thread of its own."""

    def __init__(self, run: Run, options: BatchOptions) -> None:
        self.options, self.counts = options, BatchCounts()
        self._run = run
        self._waiting: asyncio.Queue[tuple[EncodedSample, asyncio.Future[NDArray[np.float32]]]] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")

    async def logits(self, rows: Sequence[EncodedSample]) -> list[NDArray[np.float32]]:
        """The outputs [C] of each row.

        Raises:
            RequestError: 503, too many samples wait already.
        """
        waiting, most = self._waiting.qsize(), self.options.max_waiting
        if waiting + len(rows) > most:
            raise RequestError(OVERLOADED, f"{waiting} texts are waiting and {most} may; try again in a moment")
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in rows]
        for row, future in zip(rows, futures):
            self._waiting.put_nowait((row, future))
        return await asyncio.gather(*futures)

    async def work(self) -> None:
        """Run batches until cancelled."""
        try:
            while True:
                batch = [await self._waiting.get()]
                if self._waiting.qsize() < self.options.max_batch - 1:
                    await asyncio.sleep(self.options.max_wait_s)
                while len(batch) < self.options.max_batch and not self._waiting.empty():
                    batch.append(self._waiting.get_nowait())
                await self._run_batch(batch)
        finally:
            self._thread.shutdown(wait=False)

    async def _run_batch(self, batch: list[tuple[EncodedSample, asyncio.Future[NDArray[np.float32]]]]) -> None:
        # A client that has gone has cancelled its futures, and nobody waits for those.
        wanted = [(row, future) for row, future in batch if not future.done()]
        if not wanted:
            return
        rows = [row for row, _ in wanted]
        try:
            found_BC = await asyncio.get_running_loop().run_in_executor(self._thread, self._run, rows)
        except Exception as error:
            for _, future in wanted:
                if not future.done():
                    future.set_exception(error)
            return
        self.counts.batches += 1
        self.counts.samples += len(rows)
        for (_, future), logits_C in zip(wanted, found_BC):
            if not future.done():
                future.set_result(logits_C)
