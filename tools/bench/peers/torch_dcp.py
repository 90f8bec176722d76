"""torch.distributed.checkpoint in one process, as a way to store a dictionary of tensors."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse


def save(tensors: dict[str, torch.Tensor], directory: Path) -> None:
    """Replace the directory by one with the tensors; the files are synced to the disk."""
    shutil.rmtree(directory, ignore_errors=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(directory, sync_files=True))


def load(tensors: dict[str, torch.Tensor], directory: Path) -> None:
    """Read into the tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(directory))


@contextmanager
def alone() -> Iterator[None]:
    """A process group of this process, which asynchronous saves need."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


class AsyncSaves:
    """`async_save` into a directory, which it replaces each time; copies go to new memory or to buffers that stay."""

    def __init__(self, tensors: dict[str, torch.Tensor], directory: Path, *, keeps_buffers: bool) -> None:
        self._tensors, self._directory = tensors, directory
        on_host = StagingOptions(False, False, False, False)
        self._stager = DefaultStager(on_host) if keeps_buffers else None

    def stall_s(self) -> float:
        """Save; the time until the tensors may change. Returns when the files are on the disk."""
        shutil.rmtree(self._directory, ignore_errors=True)
        writer = dcp.FileSystemWriter(self._directory, sync_files=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            start_s = time.perf_counter()
            begun = dcp.async_save(self._tensors, storage_writer=writer, async_stager=self._stager)
            stall_s = time.perf_counter() - start_s
        (begun.upload_completion if isinstance(begun, AsyncSaveResponse) else begun).result()
        return stall_s
