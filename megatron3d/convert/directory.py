"""A directory in Hugging Face's layout: `config.json`, weights in one file or several, the tokenizer's files.

Reading maps the files and copies nothing until a tensor is asked for. Writing happens under a temporary name, reaches
the disk, and takes its name by one rename, so that a directory is whole or not there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron3d.checkpoint.shard_file import write_shard
from megatron3d.convert.family import HfConfig
from megatron3d.errors import CheckpointError, ConfigError
from megatron3d.files.json_text import parse_object
from megatron3d.storage.durable import sync_directory, write_file
from megatron3d.storage.refusals import refusal

CONFIG_NAME = "config.json"
_LONGEST_NAME = 255  # bytes, of Linux's file systems
# The format's names of the types that weights may have; others keep their own.
_DTYPE_OF_TAG = MappingProxyType({"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"})
_WEIGHTS, _PICKLED = "model.safetensors", "pytorch_model.bin"


@dataclass(frozen=True)
class StoredWeight:
    """One tensor of a directory: the file it lies in, its shape and dtype (torch's name), and how to read it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]


def read_config(directory: Path) -> HfConfig:
    """The `config.json` of a directory.

    Raises:
        CheckpointError: there is none, or it is no JSON object.
    """
    if not directory.is_dir():
        raise CheckpointError(f"--hf {directory} is not a directory; give one that holds {CONFIG_NAME} and the weights")
    path = directory / CONFIG_NAME
    return HfConfig(path, _json_object(path))


@contextmanager
def open_weights(directory: Path) -> Iterator[Mapping[str, StoredWeight]]:
    """The tensors of a directory by name, in `model.safetensors`, its shards, or `pytorch_model.bin`.

    A `.bin` is a pickle; it is read by torch's restricted unpickler, which builds tensors and runs no code.

    Raises:
        CheckpointError: no weights are there, or a file of them is missing or damaged.
    """
    for name, opener in ((_WEIGHTS, _open_safetensors), (_PICKLED, _open_pickled)):
        files = _weight_files(directory, name)
        if files:
            with ExitStack() as stack:
                found: dict[str, StoredWeight] = {}
                for file in files:
                    opened = opener(file, stack)
                    if twice := found.keys() & opened.keys():
                        name = min(twice)
                        raise CheckpointError(
                            f"{found[name].file} and {file} both hold the tensor {name}; keep the files of one model"
                        )
                    found |= opened
                yield found
            return
    raise CheckpointError(
        f"--hf {directory} holds no weights: neither {_WEIGHTS}, its shards with {_WEIGHTS}.index.json, nor {_PICKLED}"
    )


def _weight_files(directory: Path, name: str) -> list[Path]:
    """One file, or the shards that the index beside it names; none if neither is there."""
    if (directory / name).is_file():
        return [directory / name]
    index = directory / f"{name}.index.json"
    if not index.is_file():
        return []
    weight_map = _json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map, so the shards are not known; fetch the file again")
    if wrong := [name for name in weight_map.values() if not _stays_inside(name)]:
        raise CheckpointError(
            f"{index} names {wrong[0]!r:.100} as a file of weights, which is not a file inside {directory}; fetch the "
            "model again from a source that you trust"
        )
    files = [directory / file for file in sorted(set(weight_map.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{index} names {', '.join(missing)}, which is not in {directory}; fetch what is missing")
    return files


def _stays_inside(name: object) -> bool:
    """Whether a name from outside is that of a file below a directory; links there may lead where they want."""
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        return False
    path = PurePosixPath(name)
    is_short = len(name.encode()) <= _LONGEST_NAME  # the system has an error of its own for what it cannot look up
    return is_short and not path.is_absolute() and ".." not in path.parts


def _open_safetensors(file: Path, stack: ExitStack) -> dict[str, StoredWeight]:
    try:
        handle = stack.enter_context(safe_open(file, framework="pt"))
        names = list(handle.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors ({error}); fetch the file again") from error

    def stored(name: str) -> StoredWeight:
        entry = handle.get_slice(name)
        tag = entry.get_dtype()
        return StoredWeight(
            file, tuple(entry.get_shape()), _DTYPE_OF_TAG.get(tag, tag), lambda: handle.get_tensor(name)
        )

    return {name: stored(name) for name in names}


def _open_pickled(file: Path, stack: ExitStack) -> dict[str, StoredWeight]:
    try:
        values = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, the unpickler's among them
        raise CheckpointError(
            f"{file} cannot be read as plain tensors ({type(error).__name__}); it is damaged, or holds objects that "
            f"would run code; save it again as {_WEIGHTS}"
        ) from error
    if not isinstance(values, dict) or not all(isinstance(value, Tensor) for value in values.values()):
        raise CheckpointError(f"{file} holds something else than tensors by name; save it again as {_WEIGHTS}")

    def stored(tensor: Tensor) -> StoredWeight:
        dtype = str(tensor.dtype).removeprefix("torch.")
        return StoredWeight(file, tuple(tensor.shape), dtype, lambda: tensor)

    return {name: stored(tensor) for name, tensor in values.items()}


def _json_object(path: Path) -> dict[str, Any]:
    try:
        return parse_object(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} has no {path.name}; give the directory that save_pretrained wrote"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); fetch the file again") from error


def check_writable(directory: Path) -> None:
    """Refuse to write over what is there. Raises: ConfigError if `directory` is a file, or not empty."""
    if directory.is_dir() and not any(directory.iterdir()):
        return
    if directory.exists():
        raise ConfigError(f"--hf {directory} exists already; remove it, or give the path of a new directory")


def write_directory(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], files: Mapping[str, bytes]
) -> None:
    """Write a new directory: its `config.json`, `model.safetensors`, and `files` by path.

    Raises:
        ConfigError: `directory` exists and is not empty.
        StorageError: the file system refused; nothing of that name is there then.
    """
    check_writable(directory)
    directory = directory.absolute()
    temporary = directory.with_name(f".tmp-{directory.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        # Readers ask this entry which library's tensors these are.
        write_shard(temporary / _WEIGHTS, tensors, metadata={"format": "pt"})
        for name, content in files.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            write_file(temporary / name, [content])
        write_file(temporary / CONFIG_NAME, [(json.dumps(config, indent=2, sort_keys=True) + "\n").encode()])
        sync_directory(temporary)
        os.rename(temporary, directory)
        sync_directory(directory.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise refusal("write --hf", error, directory, way_out="give another directory") from error
