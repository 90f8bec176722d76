"""The bytes of a file that others may cut short or replace while it is read.

A memory map of such a file kills the process with SIGBUS, without a word, at the first byte that is no longer there.
Reading with `pread` costs a system call and a copy for each stretch and says instead what is missing; threads may read
at the same time, since no position is shared.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megatron3d.errors import DataError


class TokenFile:
    """A file of numbers, open for reading at any byte offset until nobody refers to it any more."""

    def __init__(self, path: Path) -> None:
        """Open the file. Raises: DataError if it cannot be opened."""
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(
                f"{path} cannot be opened ({error.strerror}); check the path and its permissions."
            ) from error
        self.size_bytes = os.fstat(self._fd).st_size
        weakref.finalize(self, os.close, self._fd)

    def read(self, offset: int, count: int, dtype: DTypeLike) -> NDArray:
        """`count` numbers from byte `offset` on, in an array of their own.

        Raises: DataError if the file ends before them, as it was cut short after it was opened, or cannot be read.
        """
        numbers = np.empty(count, dtype=dtype)
        rest, at = numbers.data.cast("B") if count else memoryview(b""), offset
        while rest:
            try:
                done = os.preadv(self._fd, [rest], at)
            except OSError as error:
                raise DataError(
                    f"{self.path} cannot be read at byte {at}: {error.strerror}; look at its disk, and copy it again."
                ) from error
            if not done:
                raise DataError(
                    f"{self.path} ends at byte {os.fstat(self._fd).st_size}, and bytes {offset} to "
                    f"{offset + numbers.nbytes} are needed: it held {self.size_bytes} bytes when it was opened and was "
                    "cut short since. Copy or preprocess it again, and resume from the last checkpoint."
                )
            rest, at = rest[done:], at + done
        return numbers
