"""CRC-32, the checksum of everything that is stored: zlib's numbers, at the speed of memory.

zlib takes 0.25 to 0.45 s for a GB. isal, bindings of Intel's ISA-L, folds by carry-less multiplication and takes
0.08 s; it is a dependency on the processors that it is built for. Where it is not installed, zlib gives equal numbers.
"""

from __future__ import annotations

try:
    from isal.isal_zlib import crc32

    LIBRARY = "isal"
except ImportError:
    from zlib import crc32

    LIBRARY = "zlib"

__all__ = ["LIBRARY", "crc32"]
