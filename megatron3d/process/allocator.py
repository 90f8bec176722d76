"""The C library's allocator: memory that one step frees is kept for the next, not returned to the system.

glibc returns large blocks to the system as soon as they are freed, and the next step, which needs the same blocks,
pays for having each page of them cleared and mapped again. The process keeps its largest size instead, which it would
reach again a step later. Tensors on a CPU are allocated this way; those on a GPU have an allocator of torch's.
"""

from __future__ import annotations

import ctypes
import platform

KEPT_BYTES = 2**31 - 1
"""The largest number that `mallopt` takes: smaller blocks come from memory that is kept, larger ones from the system,
and as much may lie free at the end of what is kept."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> bool:
    """Keep what is freed from now on, for the whole process; returns whether its C library can: glibc does.

    Source: mallopt(3).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return all(library.mallopt(option, KEPT_BYTES) == 1 for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))
