"""The sentence for a refusal of the file system under --save, the same whatever was being written there."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from megatron3d.storage import refusals


def storage_errors(path: Path) -> AbstractContextManager[None]:
    """Turn an `OSError` met while writing below `path` into a `StorageError` with the reason and what to do."""
    return refusals.storage_errors(
        "write checkpoint file",
        path,
        assurance="earlier checkpoints are untouched",
        way_out="give another --save directory, which all nodes of the run share",
    )
