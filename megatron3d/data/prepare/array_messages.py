"""Results of workers whose arrays travel as they lie in memory: written to the connection from there, read in place.

Everything else of a result is sent as `multiprocessing` does. An array inside that would be copied three times on the
way, and of the ids of a fast encoder the copies would take as long as finding them does elsewhere.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray


class WithArrays(ABC):
    """A result that holds arrays of one dimension."""

    @abstractmethod
    def arrays(self) -> tuple[NDArray, ...]:
        """The arrays, in an order of their own."""

    @abstractmethod
    def with_arrays(self, arrays: Sequence[NDArray]) -> Self:
        """The same with other arrays, in that order."""


def send_answer(connection: Connection, is_result: bool, value: Any) -> None:
    """Send a result, or an error that takes its place. Raises: OSError if nobody reads."""
    arrays = [np.ascontiguousarray(array) for array in value.arrays()] if isinstance(value, WithArrays) else []
    sizes = [(array.dtype.str, len(array)) for array in arrays]
    rest = value.with_arrays([array[:0] for array in arrays]) if isinstance(value, WithArrays) else value
    connection.send((is_result, rest, sizes))
    for array in arrays:
        left = array.view(np.uint8).data
        while left:
            left = left[os.write(connection.fileno(), left) :]


def receive_answer(connection: Connection) -> tuple[bool, Any]:
    """What `send_answer` sent. Raises: EOFError or OSError if the sender is gone."""
    is_result, value, sizes = connection.recv()
    arrays = [np.empty(size, dtype) for dtype, size in sizes]
    for array in arrays:
        left = array.view(np.uint8).data
        while left:
            if not (num_read := os.readv(connection.fileno(), [left])):
                raise EOFError("the connection ended inside an array")
            left = left[num_read:]
    return is_result, value.with_arrays(arrays) if isinstance(value, WithArrays) else value
