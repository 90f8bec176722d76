"""What the C library keeps of freed memory, counted by the pages that the system has to map again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from megatron3d.process.allocator import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1] == "keep":
    assert keep_freed_memory()
block = bytes(range(1, 2)) * (64 << 20)
del block
before = faults()
block = bytes(range(1, 2)) * (64 << 20)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is meant")
def test_a_block_that_is_freed_and_taken_again_is_mapped_once_where_memory_is_kept() -> None:
    """Pages of 4 KiB; huge pages would make fewer faults of the second, which is the one that is compared with."""
    faults = {
        mode: int(
            subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, check=True, text=True).stdout
        )
        for mode in ("keep", "default")
    }
    assert faults["keep"] < faults["default"] / 10
