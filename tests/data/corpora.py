"""Small token files with known contents, and the real data beside the checkout where there is some."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megatron3d.data.indexed import IndexedDataset, IndexedDatasetWriter

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data, which is not here")


def write_documents(prefix: Path, documents: list[list[int]], dtype: type = np.uint16) -> IndexedDataset:
    """One sequence a document."""
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return IndexedDataset(prefix)


def counting_documents(lengths: list[int]) -> list[list[int]]:
    """Documents whose tokens are 0, 1, 2, ... throughout, so that a token says where it stands."""
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    return [list(range(first, last)) for first, last in pairwise(bounds.tolist())]
