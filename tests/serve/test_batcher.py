"""Micro-batches: who shares one, what is turned away, and that one failure hurts nobody else."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron3d.serve.batcher import Batcher, BatchOptions
from megatron3d.serve.classifier import EncodedSample
from megatron3d.serve.requests import RequestError


def row(number: int) -> EncodedSample:
    """A row that is known by its one token."""
    return EncodedSample([number], 1)


class Model:
    """Answers each row with its token, remembers its batches, and waits at a gate that a test opens."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, rows: Sequence[EncodedSample]) -> NDArray[np.float32]:
        """Token ids as outputs [B, 1]; a token below 0 fails."""
        self.batches.append([row.ids[0] for row in rows])
        assert self.gate.wait(30)
        if min(self.batches[-1]) < 0:
            raise ValueError(f"cannot run {self.batches[-1]}")
        return np.array(self.batches[-1], dtype=np.float32)[:, None]


def work(model: Model, options: BatchOptions, body: Callable[[Batcher], Coroutine[Any, Any, None]]) -> None:
    """Run `body` beside a batcher at work."""

    async def run() -> None:
        batcher = Batcher(model, options)
        task = asyncio.create_task(batcher.work())
        try:
            await asyncio.wait_for(body(batcher), 30)
        finally:
            model.gate.set()
            task.cancel()

    asyncio.run(run())


def test_requests_that_come_together_share_a_batch_and_get_their_own_answers() -> None:
    model = Model()

    async def body(batcher: Batcher) -> None:
        found = await asyncio.gather(*(batcher.logits([row(3 * n), row(3 * n + 1)]) for n in range(4)))
        assert [[int(logits_C[0]) for logits_C in each] for each in found] == [[3 * n, 3 * n + 1] for n in range(4)]
        assert batcher.counts.batches == 1 and batcher.counts.samples == 8

    work(model, BatchOptions(max_batch=16, max_wait_s=0.2), body)
    assert model.batches == [[0, 1, 3, 4, 6, 7, 9, 10]]


def test_a_full_batch_does_not_wait_and_none_is_larger() -> None:
    model = Model()

    async def body(batcher: Batcher) -> None:
        found = await batcher.logits([row(number) for number in range(9)])
        assert [int(logits_C[0]) for logits_C in found] == list(range(9))

    # Waiting for an hour would end the test.
    work(model, BatchOptions(max_batch=3, max_wait_s=3600.0), body)
    assert model.batches == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_what_comes_while_a_batch_runs_is_the_next_batch() -> None:
    model = Model()

    async def body(batcher: Batcher) -> None:
        model.gate.clear()
        first = asyncio.create_task(batcher.logits([row(0)]))
        while not model.batches:
            await asyncio.sleep(0.001)
        others = [asyncio.create_task(batcher.logits([row(number)])) for number in (1, 2, 3)]
        await asyncio.sleep(0.05)
        assert model.batches == [[0]] and not first.done()
        model.gate.set()
        await asyncio.gather(first, *others)

    work(model, BatchOptions(max_batch=8, max_wait_s=0.0), body)
    assert model.batches == [[0], [1, 2, 3]]


def test_too_many_waiting_texts_are_turned_away_and_those_there_are_answered() -> None:
    model = Model()

    async def body(batcher: Batcher) -> None:
        model.gate.clear()
        running = asyncio.create_task(batcher.logits([row(0)]))
        while not model.batches:
            await asyncio.sleep(0.001)
        waiting = asyncio.create_task(batcher.logits([row(1), row(2), row(3)]))
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="3 texts are waiting and 4 may") as caught:
            await batcher.logits([row(4), row(5)])
        assert caught.value.status == 503
        model.gate.set()
        assert len(await running) == 1 and len(await waiting) == 3
        assert len(await batcher.logits([row(6), row(7)])) == 2

    work(model, BatchOptions(max_batch=8, max_wait_s=0.0, max_waiting=4), body)


def test_a_batch_that_fails_fails_its_own_requests_and_the_next_one_runs() -> None:
    model = Model()

    async def body(batcher: Batcher) -> None:
        for _ in range(2):
            with pytest.raises(ValueError, match=r"cannot run \[-1\]"):
                await batcher.logits([row(-1)])
        assert int((await batcher.logits([row(5)]))[0][0]) == 5
        assert batcher.counts.batches == 1

    work(model, BatchOptions(max_wait_s=0.0), body)


def test_a_client_that_has_gone_is_not_computed_for() -> None:
    model = Model()

    async def body(batcher: Batcher) -> None:
        model.gate.clear()
        running = asyncio.create_task(batcher.logits([row(0)]))
        while not model.batches:
            await asyncio.sleep(0.001)
        gone, stays = (asyncio.create_task(batcher.logits([row(number)])) for number in (1, 2))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        model.gate.set()
        await asyncio.gather(running, stays)

    work(model, BatchOptions(max_wait_s=0.0), body)
    assert model.batches == [[0], [2]]
