"""What the ranks of a run do together around checkpoints: act or fail as one, and exchange plain values.

With `group=None` everything is one process and needs no process group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron3d.comm.waiting import Waiting
from megatron3d.errors import Megatron3dError

__all__ = ["ProcessGroup", "error_of_rank", "from_first", "gathered", "on_every_rank", "waiting_for"]

T = TypeVar("T")


def on_every_rank(action: Callable[[], T], group: ProcessGroup | None) -> T:
    """Run `action` on every rank; if it fails on any, every rank raises. Collective over `group`.

    Without this agreement the ranks that succeeded would wait in the next collective for one that has left.

    Raises:
        Exception: whatever `action` raised, on the ranks on which it did.
        Megatron3dError: on the others, the error of the lowest failing rank, if it was one meant for the user.
        RuntimeError: on the others, any other error of the lowest failing rank.
    """
    failure: Exception | None = None
    results: list[T] = []
    try:
        results.append(action())
    except Exception as error:
        failure = error
    if group is not None:
        reports: list[Exception | None] = [None] * dist.get_world_size(group)
        with waiting_for("the ranks' agreement on files", group):
            dist.all_gather_object(reports, _portable(failure), group=group)
        first = next(((rank, report) for rank, report in enumerate(reports) if report is not None), None)
        if failure is None and first is not None:
            raise error_of_rank(*first)
    if failure is not None:
        raise failure
    return results[0]


def gathered(value: T, group: ProcessGroup | None) -> list[T]:
    """Every rank's value, in rank order. Collective over `group`."""
    if group is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def from_first(decide: Callable[[], T], group: ProcessGroup | None) -> T:
    """What `decide` gives on the first rank of `group`, on every rank. Collective.

    Raises:
        Megatron3dError, RuntimeError: what `decide` raised, as `on_every_rank` does.
    """
    is_first = group is None or dist.get_rank(group) == 0
    decided = on_every_rank(lambda: decide() if is_first else None, group)
    return cast(T, gathered(decided, group)[0])


def waiting_for(what: str, group: ProcessGroup | None) -> Waiting:
    """The note of what this rank waits for, for the report of a run that hangs."""
    return Waiting(what, "world", [] if group is None else dist.get_process_group_ranks(group))


def _portable(failure: Exception | None) -> Exception | None:
    # What travels must survive pickling, which only our own errors promise.
    return failure if failure is None or isinstance(failure, Megatron3dError) else RuntimeError(repr(failure))


def error_of_rank(rank: int, cause: BaseException) -> Exception:
    """What the other ranks raise for an error of `rank`."""
    if isinstance(cause, Megatron3dError):
        return type(cause)(f"rank {rank}: {cause}")
    return RuntimeError(f"rank {rank} failed in a checkpoint: {cause!r}")
