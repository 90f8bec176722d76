"""A detector of races: whatever is under way holds NaN until its `wait`, and what it reads must not change before.

Gloo on one machine is so fast that a result is nearly always there before anybody could read it too early. Within
`Detector`, every asynchronous collective, message, file transfer and host copy works on private copies instead. Its
destination is poisoned until `wait`, which sleeps at random first. So a missing wait makes NaN of a loss, and a tensor
that is written, changed or freed too early is a sentence in `problems`:

    destination   NaN from start to wait; anything else at the wait was written by somebody who did not own it
    source        compared at the wait with what it was at the start
    gathered      weights that are not gathered yet, or are freed, are NaN and not what the memory held before

What only a thread of ours touches is not seen here, but for its file transfers and copies; let it sleep instead.
"""

from __future__ import annotations

import random
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from megatron3d.comm import collectives, p2p, pairwise
from megatron3d.comm.device import HostCopies
from megatron3d.offload.block_file import BlockFile
from megatron3d.offload.file_store import FileStore
from megatron3d.zero.block_buffers import BlockedWeights
from megatron3d.zero.buffers import WeightBuffer, size_bytes

LONGEST_NAP_S = 2e-3
_FRAMES = 7  # of the call stack, in a sentence about a problem


def poison(x: Tensor) -> None:
    """Make NaN of every element, behind the back of autograd; bytes become those of a NaN."""
    x.data.fill_(torch.nan if x.is_floating_point() else 0xFF)


class Detector:
    """Within its block everything asynchronous is poisoned and watched; of the process, and taken back at the end.

    Attributes:
        problems: a sentence for each race that was seen.
        counts: how many operations of each kind were watched.
    """

    def __init__(self, seed: int) -> None:
        """Args: `seed` of the naps, which should differ between ranks."""
        self.problems: list[str] = []
        self.counts: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._under_way: dict[int, Watched] = {}
        self._patches = ExitStack()

    def nap(self) -> None:
        """Sleep for as long as chance has it."""
        time.sleep(self._random.random() * LONGEST_NAP_S)

    def watch(self, kind: str, finish: Callable[[], object], *, reads: Sequence[Tensor] = (), **more: Any) -> Watched:
        """Poison and snapshot what an operation that has just been started on private copies writes and reads."""
        self.counts[kind] += 1
        watched = Watched(self, kind, finish, reads, **more)
        self._under_way[id(watched)] = watched
        return watched

    def is_over(self, watched: Watched) -> bool:
        """Note that an operation was waited for; whether it was before."""
        return self._under_way.pop(id(watched), None) is None

    def __enter__(self) -> Detector:
        """Patch what starts asynchronous operations."""
        shim = _Distributed(self)
        for owner, name, value in (
            (collectives, "dist", shim),
            (p2p, "dist", shim),
            (collectives, "_gather_flat", _gather(self, collectives._gather_flat)),
            (collectives, "_scatter_flat", _scatter(self, collectives._scatter_flat)),
            (pairwise, "start_all_gather", _gather(self, pairwise.start_all_gather)),
            (pairwise, "start_reduce_scatter", _scatter(self, pairwise.start_reduce_scatter)),
            (HostCopies, "start", _host_copy(self)),
            (FileStore, "start_read", _file_read(self, FileStore.start_read)),
            (FileStore, "start_write", _file_write(self, FileStore.start_write)),
            (BlockFile, "read", _slow(self, BlockFile.read)),
            (BlockFile, "write", _slow(self, BlockFile.write)),
            (WeightBuffer, "start_gather", _poison_gathered(WeightBuffer.start_gather)),
            (WeightBuffer, "free", _poison_freed(WeightBuffer.free)),
            (BlockedWeights, "start_gather", _poison_block_to_come(BlockedWeights.start_gather)),
            (BlockedWeights, "free", _poison_freed_blocks(BlockedWeights.free)),
        ):
            self._patches.enter_context(mock.patch.object(owner, name, value))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the patches back, and report what nobody has waited for."""
        self._patches.close()
        if error is None:
            self.problems += [f"{one.kind} was never waited for; {one.started}" for one in self._under_way.values()]
        self._under_way.clear()


class Watched:
    """An operation under way, and the `wait` of it: stands for a `dist.Work`, a `Transfer` or a `Copy`."""

    def __init__(
        self,
        detector: Detector,
        kind: str,
        finish: Callable[[], object],
        reads: Sequence[Tensor] = (),
        *,
        lands_in: Tensor | None = None,
        lands_at: Tensor | None = None,
        poisons: Tensor | None = None,
        spares: slice | None = None,
    ) -> None:
        """Watch it from here on.

        Args:
            detector: takes the problems.
            kind: what it is, for sentences.
            finish: waits for the real operation.
            reads: what it would read: may not change until the wait.
            lands_in: the private copy with its result.
            lands_at: where the result goes at the wait.
            poisons: what is undefined until then, `lands_at` included; by default just that.
            spares: elements of it that stay as they are.
        """
        self.kind, self.started = kind, _here()
        self._detector, self._finish = detector, finish
        self._reads = [(x, _bytes(x).clone(), x.data_ptr()) for x in reads]
        self._lands_in, self._lands_at = lands_in, lands_at
        self._poisoned = lands_at if poisons is None else poisons
        if self._poisoned is not None:
            self._address = self._poisoned.data_ptr()
            kept = None if spares is None else self._poisoned.data.view(-1)[spares].clone()
            poison(self._poisoned)
            if kept is not None:
                self._poisoned.data.view(-1)[spares].copy_(kept)
            self._image = _bytes(self._poisoned).clone()

    def is_completed(self) -> bool:
        """Gloo cannot tell either."""
        return False

    def wait(self, *_: object) -> bool:
        """Finish, compare, and bring the result to where it belongs."""
        self._detector.nap()
        self._finish()
        if not self._detector.is_over(self):
            self._compare()
            if self._lands_at is not None and self._lands_in is not None and _is_there(self._lands_at):
                self._lands_at.data.copy_(self._lands_in.view(self._lands_at.shape))
        return True

    def _compare(self) -> None:
        for x, before, address in self._reads:
            if not _is_there(x) or x.data_ptr() != address:
                self._report("what it reads was freed")
            elif not torch.equal(_bytes(x), before):
                self._report("what it reads was changed")
        if self._poisoned is not None:
            if not _is_there(self._poisoned) or self._poisoned.data_ptr() != self._address:
                self._report("where it writes was freed")
            elif not torch.equal(_bytes(self._poisoned), self._image):
                self._report("where it writes was written")

    def _report(self, what: str) -> None:
        self._detector.problems.append(f"{self.kind}: {what} before its wait; started {self.started}; now {_here()}")


class _Distributed:
    """`torch.distributed` with watched sums and messages."""

    def __init__(self, detector: Detector) -> None:
        self._detector = detector

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def all_reduce(self, x: Tensor, op: Any, *, group: Any, async_op: bool) -> Watched:
        assert async_op, "collectives are start/finish pairs"
        private = x.detach().clone()
        work = dist.all_reduce(private, op, group=group, async_op=True)
        return self._detector.watch("all_reduce", work.wait, lands_in=private, lands_at=x)

    def batch_isend_irecv(self, posts: Sequence[dist.P2POp]) -> list[Watched]:
        privates = [post.tensor.detach().clone() for post in posts]
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(post.op, private, post.peer, group=post.group, tag=post.tag)
                for post, private in zip(posts, privates, strict=True)
            ]
        )
        watched = []
        for post, private, work in zip(posts, privates, works, strict=True):
            # The private copy of what is sent must live as long as the operation does: `finish` holds it.
            finish = lambda work=work, private=private: work.wait()  # noqa: E731
            if post.op is dist.isend:
                watched.append(self._detector.watch("send", finish, reads=[post.tensor]))
            else:
                watched.append(self._detector.watch("receive", finish, lands_in=private, lands_at=post.tensor))
        return watched


def _gather(detector: Detector, real: Callable[..., Any]) -> Callable[..., Watched]:
    def gather(whole: Tensor, x: Tensor, *among: Any, **options: Any) -> Watched:
        private, source = torch.empty_like(whole), x.detach().clone()
        work = real(private, source, *among, **options)
        # This rank's part of the destination, where that is the source, may be read all along.
        spares = _elements_of(x, whole)
        return detector.watch("all_gather", work.wait, reads=[x], lands_in=private, lands_at=whole, spares=spares)

    return gather


def _scatter(detector: Detector, real: Callable[..., Any]) -> Callable[..., Watched]:
    def scatter(part: Tensor, x: Tensor, *among: Any, **options: Any) -> Watched:
        private, source = torch.empty_like(part), x.detach().clone()
        work = real(private, source, *among, **options)
        if _elements_of(part, x) is None:
            return detector.watch("reduce_scatter", work.wait, reads=[x], lands_in=private, lands_at=part)
        # In place the rest of the source is undefined, also afterwards.
        return detector.watch("reduce_scatter", work.wait, lands_in=private, lands_at=part, poisons=x)

    return scatter


def _host_copy(detector: Detector) -> Callable[..., Watched]:
    def start(self: HostCopies, target: Tensor, source: Tensor) -> Watched:
        private = torch.empty_like(target).copy_(source)
        return detector.watch("host copy", lambda: None, reads=[source], lands_in=private, lands_at=target)

    return start


def _file_read(detector: Detector, real: Callable[..., Any]) -> Callable[..., Watched]:
    def start_read(self: FileStore, name: str, into: Tensor) -> Watched:
        private = torch.empty_like(into)
        transfer = real(self, name, private)
        return detector.watch("file read", transfer.wait, lands_in=private, lands_at=into)

    return start_read


def _file_write(detector: Detector, real: Callable[..., Any]) -> Callable[..., Watched]:
    def start_write(self: FileStore, name: str, source: Tensor) -> Watched:
        transfer = real(self, name, source.clone())
        return detector.watch("file write", transfer.wait, reads=[source])

    return start_write


def _slow(detector: Detector, real: Callable[..., None]) -> Callable[..., None]:
    def move(self: BlockFile, *arguments: Any, **more: Any) -> None:
        detector.nap()
        real(self, *arguments, **more)

    return move


def _poison_gathered(real: Callable[[WeightBuffer], None]) -> Callable[[WeightBuffer], None]:
    def start_gather(self: WeightBuffer) -> None:
        if self.full.untyped_storage().nbytes() == 0:
            self.full.untyped_storage().resize_(size_bytes(self.full))
            poison(self.full)
        real(self)

    return start_gather


def _poison_freed(real: Callable[[WeightBuffer], None]) -> Callable[[WeightBuffer], None]:
    def free(self: WeightBuffer) -> None:
        if self.is_sharded and _is_there(self.full):
            self.finish_gather()
            poison(self.full)
        real(self)

    return free


def _poison_block_to_come(real: Callable[[BlockedWeights], None]) -> Callable[[BlockedWeights], None]:
    def start_gather(self: BlockedWeights) -> None:
        is_new = not self._slots
        real(self)
        if is_new:
            poison(self._slots[1])

    return start_gather


def _poison_freed_blocks(real: Callable[[BlockedWeights], None]) -> Callable[[BlockedWeights], None]:
    def free(self: BlockedWeights) -> None:
        self.finish_gather()
        for slot in self._slots:
            poison(slot)
        real(self)

    return free


def _elements_of(part: Tensor, whole: Tensor) -> slice | None:
    """Where in a flat tensor another one lies; None if it does not."""
    start, stop = whole.data_ptr(), whole.data_ptr() + size_bytes(whole)
    if not start <= part.data_ptr() < stop:
        return None
    first = (part.data_ptr() - start) // whole.element_size()
    return slice(first, first + part.numel())


def _bytes(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(-1).view(torch.uint8)


def _is_there(x: Tensor) -> bool:
    return x.numel() == 0 or x.untyped_storage().nbytes() > 0


def _here() -> str:
    frames = (frame for frame, _ in traceback.walk_stack(None) if frame.f_code.co_filename != __file__)
    return " < ".join(f"{Path(one.f_code.co_filename).name}:{one.f_lineno}" for one in islice(frames, _FRAMES))
