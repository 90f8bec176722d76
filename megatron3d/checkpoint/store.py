"""Who writes and who reads what: PyTorch's distributed checkpointing plans, our files hold the bytes.

The planners hand DCP the boxes of each rank. For a save it removes boxes that several ranks offer (the least loaded
rank keeps one), and refuses overlaps; for a load it intersects what a rank wants with what was stored, which is all
that resharding is. The storage writes one safetensors file for each rank and `index.json` last. With `group=None` it is
one process and needs no process group.

DCP takes most of a second to import, so `save` and `load` import this module when they have something to store.
"""

from __future__ import annotations

import io
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from megatron3d.checkpoint.index import (
    Index,
    StoredBox,
    StoredFile,
    StoredTensor,
    box_key,
    document_text,
    write_index,
)
from megatron3d.checkpoint.ranks import error_of_rank, waiting_for
from megatron3d.checkpoint.refusals import storage_errors
from megatron3d.checkpoint.shard_file import open_shard, read_box, write_shard
from megatron3d.errors import CheckpointError
from megatron3d.params.boxes import Box, ShardView
from megatron3d.storage.durable import write_file

T = TypeVar("T")

# Takes the path and the boxes of a rank's file; returns its size in bytes and the CRC-32 of each box.
Stage = Callable[[Path, Mapping[str, Tensor]], tuple[int, Mapping[str, int]]]


def write_tensors(
    directory: Path,
    tensors: Mapping[str, ShardView],
    *,
    step: int,
    documents: Mapping[str, dict[str, Any]],
    group: ProcessGroup | None,
    rank: int,
) -> None:
    """Write what the ranks hold, the documents and, last, the index into an existing directory. Collective.

    Every rank passes the boxes it holds; a box that several ranks hold is written by one of them. Together they
    must cover every tensor exactly once.

    Raises:
        StorageError: the file system refused a write of any rank (raised on all).
        ValueError, RuntimeError: boxes that overlap, leave a gap or disagree between ranks.
    """
    _save(_Writer(directory, step=step, rank=rank, documents=documents), tensors, group)


def stage_tensors(
    directory: Path,
    tensors: Mapping[str, ShardView],
    *,
    step: int,
    stage: Stage,
    group: ProcessGroup | None,
    rank: int,
) -> Index | None:
    """Have what this rank would write into `directory` copied by `stage`, to be written later. Collective.

    Returns:
        The index of the checkpoint, without documents, on rank 0; None on the others.

    Raises:
        Megatron3dError: what `stage` raised on any rank (raised on all).
        ValueError, RuntimeError: as `write_tensors`.
    """
    writer = _StagingWriter(directory, step=step, rank=rank, stage=stage)
    _save(writer, tensors, group)
    return writer.index


def _save(writer: _Writer, tensors: Mapping[str, ShardView], group: ProcessGroup | None) -> None:
    with _quiet(), _our_errors(group), waiting_for("saving", group):
        dcp.save(
            dict(tensors),
            storage_writer=writer,
            planner=_BoxSavePlanner(),
            process_group=group,
            no_dist=group is None,
        )


def read_tensors(
    directory: Path, tensors: Mapping[str, ShardView], *, index: Index, group: ProcessGroup | None
) -> None:
    """Fill the buffers of `tensors` from the stored boxes that intersect theirs, converting dtypes. Collective.

    Names and full shapes must have been checked against the index.

    Raises:
        CheckpointError: a file that is missing or damaged on any rank (raised on all).
    """
    with _quiet(), _our_errors(group), waiting_for("loading", group):
        dcp.load(
            dict(tensors),
            storage_reader=_Reader(directory, index),
            planner=_BoxLoadPlanner(),
            process_group=group,
            no_dist=group is None,
        )


class _BoxSavePlanner(dcp.DefaultSavePlanner):
    """Offers the boxes of `ShardView`s; DCP's own planner removes duplicates and balances the load."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        """List every box of this rank as one item to write."""
        items = []
        self.box_tensors: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        for name, view in self.state_dict.items():
            for box, tensor in view.box_tensors():
                self.box_tensors[name, box.offset] = tensor
                items.append(_write_item(name, view, box))
        self.plan = SavePlan(items)
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Refuse ranks that disagree and gaps; let DCP remove duplicates and refuse overlaps."""
        _check_agreement(all_plans)
        _check_cover(all_plans)
        return super().create_global_plan(all_plans)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The part of a buffer that is an item."""
        return self.box_tensors[index.fqn, tuple(index.offset or ())]


def _write_item(name: str, view: ShardView, box: Box) -> WriteItem:
    offset, size = torch.Size(box.offset), torch.Size(box.size)
    data = TensorWriteData(
        ChunkStorageMetadata(offset, size), TensorProperties(dtype=view.data.dtype), torch.Size(view.full_shape)
    )
    return WriteItem(MetadataIndex(name, offset), WriteItemType.SHARD, tensor_data=data)


def _check_agreement(plans: list[SavePlan]) -> None:
    # DCP recognises a duplicate by name and offset alone and would drop the larger of two boxes that start together.
    seen: dict[tuple[str, Any], tuple[int, WriteItem]] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            for key in (item.index.fqn, item.index.offset), (item.index.fqn, None):
                first_rank, first = seen.setdefault(key, (rank, item))
                mine, theirs = _data_of(item), _data_of(first)
                same = (mine.size, mine.properties.dtype) == (theirs.size, theirs.properties.dtype)
                if not same or (key[1] is not None and mine.chunk.sizes != theirs.chunk.sizes):
                    both = f"{_describe(first)} and {_describe(item)}"
                    raise ValueError(f"ranks {first_rank} and {rank} disagree about {item.index.fqn}: {both}")


def _check_cover(plans: list[SavePlan]) -> None:
    # DCP looks for gaps only where there are several ranks, and does not say how large they are.
    boxes = {item.index: _data_of(item) for plan in plans for item in plan.items}
    held: Counter[str] = Counter()
    for index, data in boxes.items():
        held[index.fqn] += prod(data.chunk.sizes)
    for index, data in boxes.items():
        if held[index.fqn] < prod(data.size):
            raise ValueError(f"the ranks hold {held[index.fqn]} of the {prod(data.size)} elements of {index.fqn}")


def _data_of(item: WriteItem) -> TensorWriteData:
    assert item.tensor_data is not None, f"{item.index} is no tensor, and only tensors are saved"
    return item.tensor_data


def _tensor_of(value: Tensor | io.BytesIO) -> Tensor:
    assert isinstance(value, Tensor), "only tensors are saved"
    return value


def _describe(item: WriteItem) -> str:
    data = _data_of(item)
    box = f"a box of {tuple(data.chunk.sizes)} at {tuple(data.chunk.offsets)}"
    return f"{box} of {tuple(data.size)} {data.properties.dtype}"


class _BoxLoadPlanner(dcp.DefaultLoadPlanner):
    """Asks for exactly the boxes this rank holds; DCP intersects them with what was stored."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Remember the views; nothing is flattened or initialised."""
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator
        self.box_tensors = {
            (name, box.offset): tensor for name, view in state_dict.items() for box, tensor in view.box_tensors()
        }

    def create_local_plan(self) -> LoadPlan:
        """One read for every intersection of a wanted with a stored box; together they must fill the buffers."""
        items: list[ReadItem] = []
        for name, view in self.state_dict.items():
            if not view.boxes:
                continue
            chunks = [ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.size)) for box in view.boxes]
            stored = self.metadata.state_dict_metadata[name] if self.metadata is not None else None
            assert isinstance(stored, TensorStorageMetadata), f"{name} is no tensor of the checkpoint"
            reads = create_read_items_for_chunk_list(name, stored, chunks)
            found = sum(prod(item.lengths) for item in reads)
            if found != view.data.numel():
                raise CheckpointError(
                    f"the checkpoint holds {found} of the {view.data.numel()} elements of {name} needed"
                )
            items += reads
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The part of a buffer that a read fills; DCP narrows it to the intersection."""
        return self.box_tensors[index.fqn, tuple(index.offset or ())]


@dataclass(frozen=True)
class _Written:
    """What a rank reports of one box it wrote; travels to rank 0, which writes the index."""

    stored: StoredBox
    file_size_bytes: int


class _Writer(StorageWriter):
    """One safetensors file for each rank that has something to write; rank 0 adds the documents and the index."""

    def __init__(self, directory: Path, *, step: int, rank: int, documents: Mapping[str, dict[str, Any]]) -> None:
        self.directory, self.step, self.rank, self.documents = directory, step, rank, documents

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the boxes of this rank's plan."""
        boxes = {_key(item.index): _tensor_of(planner.resolve_data(item)) for item in plan.items}
        if not boxes:
            return _finished([])
        name = f"rank{self.rank:05d}.safetensors"
        size, checksums = self._take(self.directory / name, boxes)
        results = []
        for item in plan.items:
            key, chunk = _key(item.index), _data_of(item).chunk
            stored = StoredBox(Box(tuple(chunk.offsets), tuple(chunk.sizes)), name, key, checksums[key])
            results.append(WriteResult(item.index, boxes[key].nbytes, _Written(stored, size)))
        return _finished(results)

    def _take(self, path: Path, boxes: Mapping[str, Tensor]) -> tuple[int, Mapping[str, int]]:
        with storage_errors(path):
            return write_shard(path, boxes)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the documents and then the index (rank 0; every rank's file is on the disk by now)."""
        documents = {f"{name}.json": self._document(f"{name}.json", d) for name, d in self.documents.items()}
        write_index(self.directory, self._index(metadata, results, documents))

    def _index(self, metadata: Metadata, results: list[list[WriteResult]], documents: dict[str, StoredFile]) -> Index:
        written = [result.storage_data for of_rank in results for result in of_rank]
        by_key = {w.stored.key: w.stored for w in written}
        return Index(
            step=self.step,
            tensors={
                name: StoredTensor(
                    tuple(tensor.size),
                    tensor.properties.dtype,
                    tuple(by_key[box_key(name, tuple(chunk.offsets))] for chunk in tensor.chunks),
                )
                for name, tensor in metadata.state_dict_metadata.items()
                if isinstance(tensor, TensorStorageMetadata)  # as all are
            },
            files={w.stored.file: w.file_size_bytes for w in written},
            documents=documents,
        )

    def _document(self, file: str, document: dict[str, Any]) -> StoredFile:
        text = document_text(document)
        with storage_errors(self.directory / file):
            (checksum,) = write_file(self.directory / file, [text])
        return StoredFile(len(text), checksum)

    def reset(self, checkpoint_id: Any = None) -> None:
        """Part of DCP's interface: the directory was given at the start."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Part of DCP's interface: the directory exists already."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Part of DCP's interface: nothing to add to a plan."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Part of DCP's interface: nothing to add to the plans."""
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Part of DCP's interface: paths only."""
        return isinstance(checkpoint_id, Path)


class _StagingWriter(_Writer):
    """Has boxes copied instead of written, and keeps the index (rank 0)."""

    def __init__(self, directory: Path, *, step: int, rank: int, stage: Stage) -> None:
        super().__init__(directory, step=step, rank=rank, documents={})
        self._stage = stage
        self.index: Index | None = None

    def _take(self, path: Path, boxes: Mapping[str, Tensor]) -> tuple[int, Mapping[str, int]]:
        return self._stage(path, boxes)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Keep the index: no file is on the disk yet."""
        self.index = self._index(metadata, results, {})


class _Reader(StorageReader):
    """Reads whole stored boxes, checks each once, and hands the intersections to the planner."""

    def __init__(self, directory: Path, index: Index) -> None:
        self.directory, self.index = directory, index
        # By place and not by the entry's name in the file, which a damaged index may have wrong.
        self.stored = {box_key(name, s.box.offset): s for name, tensor in index.tensors.items() for s in tensor.boxes}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index in DCP's words."""
        tensors: dict[str, STORAGE_TYPES] = {
            name: TensorStorageMetadata(
                TensorProperties(dtype=tensor.dtype),
                torch.Size(tensor.shape),
                [ChunkStorageMetadata(torch.Size(s.box.offset), torch.Size(s.box.size)) for s in tensor.boxes],
            )
            for name, tensor in self.index.tensors.items()
        }
        return Metadata(state_dict_metadata=tensors, storage_meta=StorageMeta())

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy every intersection into its place, opening each file once and reading each box once."""
        by_file: dict[str, dict[str, list[ReadItem]]] = defaultdict(lambda: defaultdict(list))
        for item in plan.items:
            key = _key(item.storage_index)
            by_file[self.stored[key].file][key].append(item)
        for file, by_key in sorted(by_file.items()):
            path = self.directory / file
            with open_shard(path, self.index.files[file]) as handle:
                for key, items in by_key.items():
                    name = items[0].storage_index.fqn
                    data = read_box(handle, path, name, self.index.tensors[name], self.stored[key])
                    for item in items:
                        _copy(data, item, planner)
        return _finished(None)

    def reset(self, checkpoint_id: Any = None) -> None:
        """Part of DCP's interface: the directory was given at the start."""

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Part of DCP's interface: the index was given at the start."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Part of DCP's interface: nothing to add to a plan."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Part of DCP's interface: nothing to add to the plans."""
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Part of DCP's interface: paths only."""
        return isinstance(checkpoint_id, Path)


def _copy(data: Tensor, item: ReadItem, planner: LoadPlanner) -> None:
    part = data[tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))]
    target = planner.resolve_tensor(item)
    target.copy_(part)
    planner.commit_tensor(item, target)


def _key(index: MetadataIndex) -> str:
    return box_key(index.fqn, tuple(index.offset or ()))


def _finished(value: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(value)
    return future


@contextmanager
def _quiet() -> Iterator[None]:
    # A single process is a case we ask for, not an accident to be warned of at every save.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


@contextmanager
def _our_errors(group: ProcessGroup | None) -> Iterator[None]:
    # DCP has gathered the failures of all ranks, so every rank raises the same one here.
    try:
        yield
    except CheckpointException as error:
        rank = min(error.failures)
        cause = error.failures[rank][0]
        if group is None:
            raise cause from None
        raise error_of_rank(rank, cause) from cause
