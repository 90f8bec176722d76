"""A digest in the last bytes of an ONNX file, so that a file changed anywhere is refused instead of served.

ONNX Runtime loads a file with a flipped bit in its weights and computes with it. The digest is SHA-256 of all bytes
before it, written as one more entry of the model's metadata: a message of protobuf may have its fields in any order, so
the file stays one that every program of ONNX reads.

Source: the encoding of protobuf (field numbers and lengths), and `metadata_props` in onnx.proto3: field 14 of
ModelProto, of entries with key (1) and value (2).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from megatron3d.errors import DataError

_KEY = b"megatron3d.sha256"
_HEX_BYTES = 64
_CHUNK_BYTES = 1 << 20


def _field(number: int, content_length: int) -> bytes:
    """The head of a field of bytes that are fewer than 128."""
    assert content_length < 0x80, f"{content_length} bytes need a longer head"
    return bytes([number << 3 | 2, content_length])


_ENTRY = _field(1, len(_KEY)) + _KEY + _field(2, _HEX_BYTES)
_HEAD = _field(14, len(_ENTRY) + _HEX_BYTES) + _ENTRY
DIGEST_BYTES = len(_HEAD) + _HEX_BYTES


def append_digest(path: Path) -> None:
    """Add the digest to a finished file that has none yet. Raises: OSError if the file system refuses."""
    digest = _digest_of(path, path.stat().st_size)
    with open(path, "ab") as file:
        file.write(_HEAD + digest)


def check_digest(path: Path) -> None:
    """Compare a file with its digest.

    Raises:
        DataError: the file cannot be read, has no digest, or has changed since it got it.
    """
    try:
        length = path.stat().st_size - DIGEST_BYTES
        with open(path, "rb") as file:
            file.seek(max(0, length))
            found = file.read()
        wanted = _HEAD + _digest_of(path, length) if length >= 0 else b""
    except OSError as error:
        raise DataError(f"--model {path} cannot be read ({error.strerror or error}); name a file") from error
    if length < 0 or not found.startswith(_HEAD):
        raise DataError(
            f"--model {path} does not end with the digest that tools/export_onnx.py writes: it was cut, changed, or "
            "exported by another program or version; export it again"
        )
    if found != wanted:
        raise DataError(
            f"--model {path} is damaged or was changed: its SHA-256 is {wanted[-_HEX_BYTES:].decode()[:12]}..., and "
            f"{found[-_HEX_BYTES:].decode(errors='replace')[:12]}... was written with it; copy or export it again"
        )


def _digest_of(path: Path, length: int) -> bytes:
    """SHA-256 of the first `length` bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while length > 0 and (chunk := file.read(min(length, _CHUNK_BYTES))):
            digest.update(chunk)
            length -= len(chunk)
    return digest.hexdigest().encode()
