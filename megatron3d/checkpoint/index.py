"""The index of a checkpoint: which tensors it holds, and in which file each box of each tensor lies, as plain data.

`index.json` is written last into a checkpoint; a directory without it is not a checkpoint. It carries a checksum of
itself, of every box and of every document, so that a flipped bit anywhere is found when the part it hit is read.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron3d.errors import CheckpointError
from megatron3d.params.boxes import Box

INDEX_NAME = "index.json"
FORMAT = "megatron3d-checkpoint"
VERSION = 1

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}


@dataclass(frozen=True)
class StoredBox:
    """One box of a tensor on disk: entry `key` of the safetensors file `file`, with the CRC-32 of its bytes."""

    box: Box
    file: str
    key: str
    crc32: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk: full shape, element type and the boxes that together cover it exactly once."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: tuple[StoredBox, ...]


@dataclass(frozen=True)
class StoredFile:
    """A document beside the tensors: its size and the CRC-32 of its bytes."""

    size_bytes: int
    crc32: int


@dataclass(frozen=True)
class Index:
    """Everything a checkpoint holds: `files` maps each tensor file to its size in bytes."""

    step: int
    tensors: dict[str, StoredTensor]
    files: dict[str, int]
    documents: dict[str, StoredFile]

    def to_json(self) -> str:
        """The text of `index.json`, its own checksum included."""
        body = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "files": self.files,
            "documents": {
                name: {"size_bytes": f.size_bytes, "crc32": _hex(f.crc32)} for name, f in self.documents.items()
            },
            "tensors": {name: _tensor_to_json(tensor) for name, tensor in self.tensors.items()},
        }
        return json.dumps({"crc32": _hex(_checksum(body)), **body}, indent=1)

    @classmethod
    def from_json(cls, text: str, path: Path) -> Index:
        """Read the text of an `index.json`; `path` is for the message.

        Raises:
            CheckpointError: not JSON, not this format, a version from the future, or a checksum that disagrees.
        """
        try:
            body = json.loads(text)
            claimed = body.pop("crc32")
            known = body["format"] == FORMAT and body["version"] == VERSION
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} is not the index of a checkpoint ({error}); load an earlier one with --ckpt-step"
            ) from error
        if not known:
            raise CheckpointError(
                f"{path} says format {body['format']} version {body['version']}, "
                f"this program reads {FORMAT} version {VERSION}; use the program version that wrote it"
            )
        if claimed != _hex(_checksum(body)):
            raise CheckpointError(
                f"{path} is damaged: checksum {_hex(_checksum(body))} of its contents, it says {claimed}; "
                "load an earlier checkpoint with --ckpt-step"
            )
        return cls(
            step=body["step"],
            tensors={name: _tensor_from_json(entry) for name, entry in body["tensors"].items()},
            files=body["files"],
            documents={name: StoredFile(d["size_bytes"], int(d["crc32"], 16)) for name, d in body["documents"].items()},
        )


def read_index(directory: Path) -> Index:
    """Read the index of the checkpoint in `directory`.

    Raises:
        CheckpointError: there is no index, it cannot be read or it is damaged.
    """
    path = directory / INDEX_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{directory} is not a checkpoint: it has no {INDEX_NAME}; give the directory that --save wrote"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); load an earlier one with --ckpt-step") from error
    return Index.from_json(text, path)


def box_key(name: str, offset: tuple[int, ...]) -> str:
    """Name of a box inside a safetensors file: `model/embedding.word.weight@128,0`."""
    return f"{name}@{','.join(map(str, offset))}"


def _hex(checksum: int) -> str:
    return f"{checksum:08x}"


def _checksum(body: dict[str, Any]) -> int:
    # Over a canonical form, so that reformatting the file does not count as damage.
    return zlib.crc32(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def _tensor_to_json(tensor: StoredTensor) -> dict[str, Any]:
    boxes = [
        {"offset": s.box.offset, "size": s.box.size, "file": s.file, "key": s.key, "crc32": _hex(s.crc32)}
        for s in tensor.boxes
    ]
    return {"shape": tensor.shape, "dtype": str(tensor.dtype).removeprefix("torch."), "boxes": boxes}


def _tensor_from_json(entry: dict[str, Any]) -> StoredTensor:
    boxes = tuple(
        StoredBox(Box(tuple(b["offset"]), tuple(b["size"])), b["file"], b["key"], int(b["crc32"], 16))
        for b in entry["boxes"]
    )
    return StoredTensor(tuple(entry["shape"]), DTYPES[entry["dtype"]], boxes)
