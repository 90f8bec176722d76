"""torch.distributed.checkpoint in one process, as a way to store a dictionary of tensors."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp


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
