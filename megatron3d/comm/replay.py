"""Replay: what the collectives of a forward gave, for a second run of that forward, which then communicates nothing.

Activation recomputation runs a forward twice. A forward that is recorded keeps the results of its collectives in their
order; the second run asks for the same collectives in the same order and gets these results. Anywhere else collectives
just run. One `Replay` belongs to the layers of one rank; every recorded forward has results of its own, so any number
of them may be under way.

Source: Singh et al. 2023 (arXiv:2303.06318), section 4.3, communication-aware checkpointing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

from torch import Tensor

from megatron3d.comm.collectives import Pending

Result = TypeVar("Result")


class Replay:
    """Runs collectives, or takes their results from the first run of the same forward."""

    def __init__(self) -> None:
        self._results: deque[Any] | None = None
        self._is_second = False

    def run(self, collective: Callable[[], Result]) -> Result:
        """The result of a collective of a forward: a tensor that nobody changes in place, some of them, or a plain
        value."""
        if self._results is None:
            return collective()
        if self._is_second:
            return self._results.popleft()
        result = collective()
        self._results.append(_apart(result))
        return result

    def start(self, collective: Callable[[], Pending]) -> Pending:
        """The same for a collective under way: started, or over already in the second run."""
        if self._results is not None and self._is_second:
            return Pending(self._results.popleft())
        pending = collective()
        if self._results is not None:
            self._results.append(_apart(pending.destination))
        return pending

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts for a forward and for the second run of it."""
        results: deque[Any] = deque()
        return self._within(results, is_second=False), self._within(results, is_second=True)

    @contextmanager
    def _within(self, results: deque[Any], *, is_second: bool) -> Iterator[None]:
        before = self._results, self._is_second
        self._results, self._is_second = results, is_second
        try:
            yield
        finally:
            self._results, self._is_second = before


def _apart(result: Any) -> Any:
    """Tensors of their own: one that autograd gets as an output would keep the graph that it is part of."""
    if isinstance(result, tuple):
        return tuple(_apart(one) for one in result)
    return result.detach() if isinstance(result, Tensor) else result
