"""Loading: fill buffers of any layout from a checkpoint of any other, or put one tensor together whole."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron3d.checkpoint import ranks
from megatron3d.checkpoint.index import INDEX_NAME, Index, read_index
from megatron3d.checkpoint.shard_file import open_shard, read_box
from megatron3d.errors import CheckpointError, MisfitError
from megatron3d.files.json_text import parse_object
from megatron3d.files.regular import read_regular
from megatron3d.params.boxes import ShardView
from megatron3d.storage.checksum import crc32

# Options that set the number of rows of a parameter, by its name without prefix.
_ROW_OPTIONS = {
    "embedding.word.weight": "--vocab-size",
    "head.output.weight": "--vocab-size",
    "embedding.position.weight": "--max-position-embeddings",
}
_LISTED = 5  # problems listed in one message; a wrong model disagrees in every tensor


def load_tensors(
    directory: Path,
    tensors: Mapping[str, ShardView],
    *,
    group: ranks.ProcessGroup | None,
    may_be_left: Callable[[str], bool] = lambda name: True,
    may_be_missing: Callable[[str], bool] = lambda name: False,
) -> None:
    """Fill the buffers of `tensors` in place from the checkpoint in `directory`. Collective over `group`.

    The layout that wrote the checkpoint does not matter. Values are converted to the dtype of the buffers. Stored
    tensors that nobody asks for are not read; every stored box that is touched is checked byte by byte. The ranks
    first agree that they see the same checkpoint.

    Args:
        directory: the checkpoint.
        tensors: what this rank holds under each name.
        group: all ranks that load together, or None in a single process.
        may_be_left: whether a stored tensor of this name may be asked for by no rank; default any may.
        may_be_missing: whether a tensor of this name may be missing in the checkpoint, and its buffer stay as it is;
            default none may.

    Raises:
        CheckpointError: no such checkpoint, another one on another rank, a tensor that is missing, has another shape
            or is left over, a file that is missing or damaged; raised on every rank. Buffers may then be filled in
            part.
    """
    from megatron3d.checkpoint.store import read_tensors  # which takes most of a second

    index = agreed_index(directory, group)
    tensors = {name: one for name, one in tensors.items() if name in index.tensors or not may_be_missing(name)}
    ranks.on_every_rank(lambda: _check_tensors(directory, index, tensors), group)
    _check_left_over(directory, index, tensors, group, may_be_left)
    read_tensors(directory, tensors, index=index, group=group)


def agreed_index(directory: Path, group: ranks.ProcessGroup | None) -> Index:
    """The index of a checkpoint, once it is sure that all ranks see the same one. Collective over `group`.

    The index has checksums of all documents and tensors, so ranks that agree on it read equal bytes or an error.

    Raises:
        CheckpointError: there is no whole index, or the ranks see different ones; raised on every rank.
    """
    seen = ranks.gathered(_describe_local(directory), group)
    if len({digest for digest, _ in seen}) > 1:
        views = "; ".join(f"rank {rank} sees {text}" for rank, (_, text) in enumerate(seen))
        raise CheckpointError(
            f"the ranks do not see the same checkpoint: {views}; nothing was loaded; the directory must lie on a file "
            "system that all nodes share and show the same files to all of them"
        )
    return ranks.on_every_rank(lambda: read_index(directory), group)


def _describe_local(directory: Path) -> tuple[str, str]:
    """(digest, words) of what this rank sees in a checkpoint's place."""
    try:
        digest = hashlib.sha256(read_regular(directory / INDEX_NAME)).hexdigest()
        return digest, f"{directory} at step {read_index(directory).step}, digest {digest[:8]}"
    except FileNotFoundError:
        return "absent", f"no checkpoint {directory}"
    except (OSError, CheckpointError) as error:
        return f"damaged: {error}", f"a damaged {directory / INDEX_NAME}"


def _check_left_over(
    directory: Path,
    index: Index,
    tensors: Mapping[str, ShardView],
    group: ranks.ProcessGroup | None,
    may_be_left: Callable[[str], bool],
) -> None:
    """Raise on every rank if a stored tensor is asked for by no rank and may not be left."""
    names = [name for name in sorted(index.tensors) if not may_be_left(name)]
    if not names:
        return
    asked = {number for number, name in enumerate(names) if name in tensors and tensors[name].boxes}
    held = set().union(*ranks.gathered(asked, group))
    left = [name for number, name in enumerate(names) if number not in held]
    if left:
        more = f" and {len(left) - _LISTED} more" if len(left) > _LISTED else ""
        raise MisfitError(
            f"checkpoint {directory} has tensors that the model of this run lacks: {', '.join(left[:_LISTED])}{more}; "
            "give the model options of the run that wrote it (see its run.json)"
        )


def _check_tensors(directory: Path, index: Index, tensors: Mapping[str, ShardView]) -> None:
    problems = [
        problem for name, view in tensors.items() if view.boxes and (problem := _problem(index, name, view)) is not None
    ]
    if problems:
        more = f"; and {len(problems) - _LISTED} more tensors" if len(problems) > _LISTED else ""
        raise MisfitError(f"checkpoint {directory} does not fit: {'; '.join(problems[:_LISTED])}{more}")


def _problem(index: Index, name: str, view: ShardView) -> str | None:
    stored = index.tensors.get(name)
    if stored is None:
        return f"it has no tensor {name}; {_advice_missing(name)}"
    if stored.shape == view.full_shape:
        return None
    return f"{name} has shape {stored.shape} there and {view.full_shape} here; {_advice(name, stored.shape, view)}"


def _advice_missing(name: str) -> str:
    if name.startswith("model/"):
        return "give the model options of the run that wrote it (see its run.json)"
    return "it was saved without optimizer state: use --no-load-optim or --finetune"


def _advice(name: str, saved: tuple[int, ...], view: ShardView) -> str:
    option = _ROW_OPTIONS.get(name.partition("/")[2])
    wanted = view.full_shape
    if option is None or len(saved) != 2 or saved[1:] != wanted[1:]:
        return "give the model options of the run that wrote it (see its run.json)"
    relation = "larger" if wanted[0] > saved[0] else "smaller"
    return f"{option} {wanted[0]} is {relation} than the checkpoint's {saved[0]}; use {option} {saved[0]}"


def assemble(directory: Path, name: str) -> Tensor:
    """One whole tensor of a checkpoint, on the CPU and in its stored dtype; needs no process group.

    Raises:
        CheckpointError: no such tensor, or a file of it is missing or damaged.
    """
    index = read_index(directory)
    if name not in index.tensors:
        raise CheckpointError(f"checkpoint {directory} has no tensor {name}; it has {', '.join(sorted(index.tensors))}")
    tensor = index.tensors[name]
    with ExitStack() as files:
        handles = {
            file: files.enter_context(open_shard(directory / file, index.files[file]))
            for file in sorted({stored.file for stored in tensor.boxes})
        }
        # The sizes of the files are checked now, and with them that there is as much to hold.
        full = torch.empty(tensor.shape, dtype=tensor.dtype)
        for stored in tensor.boxes:
            full[stored.box.slices()] = read_box(handles[stored.file], directory / stored.file, name, tensor, stored)
    return full


def tensor_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Name and full shape of every tensor in a checkpoint, for tools that convert or inspect it.

    Raises:
        CheckpointError: there is no checkpoint or its index is damaged.
    """
    return {name: tensor.shape for name, tensor in read_index(directory).tensors.items()}


def read_document(directory: Path, name: str) -> dict[str, Any]:
    """The document NAME.json of a checkpoint, as it was passed to the save.

    Raises:
        CheckpointError: there is no such document or it was changed since it was written.
    """
    index, file = read_index(directory), f"{name}.json"
    if file not in index.documents:
        raise CheckpointError(f"checkpoint {directory} has no {file}; it has {', '.join(sorted(index.documents))}")
    try:
        data = read_regular(directory / file)
    except OSError as error:
        raise CheckpointError(f"checkpoint file {directory / file} cannot be read ({error.strerror})") from error
    if crc32(data) != index.documents[file].crc32:
        raise CheckpointError(
            f"checkpoint file {directory / file} was changed or damaged: its checksum disagrees with {INDEX_NAME}; "
            "load an earlier checkpoint with --ckpt-step"
        )
    try:
        return parse_object(data)
    except ValueError as error:
        raise CheckpointError(
            f"checkpoint file {directory / file} cannot be read ({error}); load an earlier checkpoint with --ckpt-step"
        ) from error
