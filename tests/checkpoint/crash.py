"""A small seam into system calls: run a body in a forked process and kill or fail it at its n-th call to the system.

Python announces opening, renaming, making and removing to audit hooks before it does them, so no code of the project
has to be written for the tests; writing and syncing are not announced and are wrapped here.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch

from megatron3d.errors import StorageError

ANNOUNCED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
DONE, REFUSED, BROKEN = 0, 3, 1


class Calls:
    """Counts calls to the system and does `at` instead of, or in the middle of, number `number`."""

    def __init__(self, number: int, at: Callable[[], None], *, from_there_on: bool = False) -> None:
        self.number, self.at, self.from_there_on, self.count = number, at, from_there_on, 0

    def install(self) -> None:
        """Watch this process for good; only for a process that ends soon."""
        sys.addaudithook(lambda event, _: self.happens() if event in ANNOUNCED else None)
        pwrite, fsync = os.pwrite, os.fsync

        def half_write(fd: int, data: Any, offset: int) -> int:
            written = pwrite(fd, data[: len(data) // 2], offset)  # A crash in the middle leaves a part of the data.
            self.happens()
            return written + pwrite(fd, data[len(data) // 2 :], offset + written)

        def late_sync(fd: int) -> None:
            self.happens()
            fsync(fd)

        os.pwrite, os.fsync = half_write, late_sync

    def happens(self) -> None:
        """One more call; act if it is the one."""
        self.count += 1
        if self.count == self.number or (self.from_there_on and self.count > self.number):
            self.at()


def kill() -> None:
    """End this process as a power cut or the kernel would."""
    os.kill(os.getpid(), signal.SIGKILL)


def fail(code: int) -> Callable[[], None]:
    """Refuse the call with an error of the system."""

    def refuse() -> None:
        raise OSError(code, os.strerror(code))

    return refuse


def in_fork(body: Callable[[], Any], calls: Calls | None = None) -> int:
    """Run `body` in a forked process; its exit code: DONE, REFUSED (StorageError), BROKEN, or minus a signal."""
    pid = os.fork()
    if pid == 0:
        code = BROKEN
        torch.set_num_threads(1)  # OpenMP's threads do not live in the fork; waiting for them would be for ever
        try:
            if calls is not None:
                calls.install()
            body()
            code = DONE
        except StorageError:
            code = REFUSED
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
