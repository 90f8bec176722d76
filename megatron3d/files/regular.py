"""Bytes of a regular file. What else bears its name may never end: reading a pipe waits for a writer."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def read_regular(path: Path) -> bytes:
    """The whole content.

    Raises:
        OSError: the system refused, or `path` is a pipe, a device, a directory or a socket.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # without O_NONBLOCK the opening waits
    with open(fd, "rb") as stream:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        return stream.read()
