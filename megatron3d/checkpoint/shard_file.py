"""One safetensors file of boxes: written box by box without a second copy in memory, checked box by box when read.

The file is written here and not by the safetensors package because its writer hides the reason the system gave for a
failure and takes no checksum; it is read through the package, which is the proof that the format is kept.

Source: the safetensors format: 8 bytes little-endian length of the header, a JSON header with dtype, shape and byte
range of every entry, then the bytes of the entries without gaps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron3d.checkpoint.index import StoredBox, StoredTensor
from megatron3d.errors import CheckpointError
from megatron3d.storage.checksum import crc32
from megatron3d.storage.durable import write_file

_TAGS: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8  # of the first byte of data, so that a reader may map every dtype in place


def write_shard(
    path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> tuple[int, dict[str, int]]:
    """Write `tensors` (any device) as one safetensors file; return its size in bytes and the CRC-32 of each entry.

    `metadata` is free text that the format keeps for readers of the file.

    Raises:
        OSError: the system refused.
        ValueError: a dtype that the format does not know.
    """
    header, names = shard_header(tensors, metadata)
    checksums = write_file(path, _buffers(header, [tensors[name] for name in names]))
    size = len(header) + sum(tensor.nbytes for tensor in tensors.values())
    return size, dict(zip(names, checksums[1:], strict=True))


def shard_header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> tuple[bytes, list[str]]:
    """What the file of `tensors` begins with, and their names in the order in which their bytes follow.

    Raises:
        ValueError: a dtype that the format does not know.
    """
    # Wide elements first: every entry then starts at a multiple of its own element size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    return _header({name: tensors[name] for name in names}, metadata), names


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _TAGS:
            raise ValueError(f"{name} has dtype {tensor.dtype}, which a checkpoint cannot hold; use {list(_TAGS)}")
        end = position + tensor.nbytes
        entries[name] = {"dtype": _TAGS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _buffers(header: bytes, tensors: list[Tensor]) -> Iterator[memoryview | bytes]:
    yield header
    for tensor in tensors:
        yield bytes_of(tensor)


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the host: of a dense one there the very memory, otherwise of a copy."""
    return tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy().data


@contextmanager
def open_shard(path: Path, size_bytes: int, *, for_data: bool = True) -> Iterator[safe_open]:
    """Open a safetensors file whose size is known; the length is checked first because a short map ends in SIGBUS.

    Without `for_data` only its header is to be read: the map is then read-only, where torch's counts as memory of the
    process in limits such as `ulimit -d`.

    Raises:
        CheckpointError: the file is missing, has another length, or its header is damaged.
    """
    try:
        found = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"checkpoint file {path} is missing ({error.strerror}); {_FIX}") from error
    if found != size_bytes:
        raise CheckpointError(f"checkpoint file {path} is damaged: {found} bytes long instead of {size_bytes}; {_FIX}")
    try:
        handle = safe_open(path, framework="pt" if for_data else "np")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"checkpoint file {path} is damaged: its header cannot be read ({error}); {_FIX}") from (
            error
        )
    with handle:
        yield handle


def check_entry(handle: safe_open, path: Path, name: str, tensor: StoredTensor, stored: StoredBox) -> None:
    """Check that the header of the file describes the box as the index does, without reading the data.

    Raises:
        CheckpointError: no such entry, or another dtype or shape.
    """
    try:
        entry = handle.get_slice(stored.key)
        found = (entry.get_dtype(), tuple(entry.get_shape()))
    except SafetensorError as error:
        raise CheckpointError(_damaged(path, name, stored, f"no entry {stored.key} ({error})")) from error
    expected = (_TAGS[tensor.dtype], stored.box.size)
    if found != expected:
        raise CheckpointError(_damaged(path, name, stored, f"its header says {found} instead of {expected}"))


def unknown_entries(handle: safe_open, path: Path, known: set[str]) -> list[str]:
    """A sentence for each entry of the file that the index does not name; no save leaves one."""
    unknown = sorted(set(handle.keys()) - known)
    return [f"checkpoint file {path} has the entry {key}, which the index does not name" for key in unknown]


def read_box(handle: safe_open, path: Path, name: str, tensor: StoredTensor, stored: StoredBox) -> Tensor:
    """Read one box, in its shape, on the CPU, and check every byte of it against the index.

    Raises:
        CheckpointError: the entry is missing, described otherwise, or its checksum disagrees.
    """
    check_entry(handle, path, name, tensor, stored)
    data: Tensor = handle.get_tensor(stored.key)
    checksum = crc32(bytes_of(data))
    if checksum != stored.crc32:
        raise CheckpointError(_damaged(path, name, stored, f"checksum {checksum:08x} instead of {stored.crc32:08x}"))
    return data


_FIX = "load an earlier checkpoint with --ckpt-step or --fall-back-to-previous-checkpoint"


def _damaged(path: Path, name: str, stored: StoredBox, reason: str) -> str:
    box = f"{prod(stored.box.size)} elements at {stored.box.offset}"
    return f"checkpoint file {path} is damaged at tensor {name} ({box}): {reason}; {_FIX}"
