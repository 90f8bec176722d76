"""DeepSpeed's index of one metric: two token files in Megatron's layout, whose items are read as they lie.

    index_to_sample   item i: the numbers of the samples that have the i-th value, or lie in the i-th percentile
    index_to_metric   item i: that value

Their dtype codes are those of Megatron's token files up to 5, but 6 to 8 stand for uint16, uint32 and uint64. The files
do not say what their samples are: number i is taken for fixed sample i of the corpus in file order, which an analysis
of the samples in that order has given.

Source: DeepSpeed, `deepspeed/runtime/data_pipeline/data_sampling/`: `data_analyzer.py` and `indexed_dataset.py`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron3d.data.curriculum.index import MetricIndex, missing_sample
from megatron3d.data.indexed import HEADER_BYTES, MAGIC, VERSION
from megatron3d.errors import DataError

DTYPES: Mapping[int, np.dtype] = MappingProxyType(
    {
        code: np.dtype(name)
        for code, name in enumerate(("<u1", "<i1", "<i2", "<i4", "<i8", "<u2", "<u4", "<u8"), start=1)
    }
)


def read_deepspeed_index(name: str, to_sample: str, to_metric: str, *, needs_values: bool) -> MetricIndex:
    """The index in the files of two prefixes.

    Without `needs_values`, which percentiles do not, `to_metric` is not read, as in DeepSpeed: of an index that was
    merged to percentiles it has other items.

    Raises: DataError if a file is missing or damaged, values do not rise, or a sample is not there once.
    """
    sizes, order = _items(to_sample)
    if needs_values:
        metric_sizes, metric = _items(to_metric)
        if len(metric_sizes) != len(sizes) or (metric_sizes != 1).any():
            raise DataError(
                f"{to_metric}.bin must have one value for each of the {len(sizes)} items of {to_sample}.bin, but has "
                f"{len(metric)} in {len(metric_sizes)} items; give the two files of one metric."
            )
    else:
        metric = np.arange(len(sizes))
    if len(metric) > 1 and not (metric[1:] > metric[:-1]).all():
        raise DataError(f"{to_metric}.bin does not rise from item to item; make it again by DeepSpeed's analyzer.")
    if (missing := missing_sample(order)) is not None:
        raise DataError(
            f"{to_sample}.bin has {len(order)} numbers of samples, but not each from 0 on once: {missing} is missing; "
            "make it again by DeepSpeed's analyzer."
        )
    narrow = metric.astype("<f4")
    kept = narrow if np.array_equal(narrow.astype(np.float64), metric.astype(np.float64)) else metric.astype("<f8")
    return MetricIndex(name, order, np.repeat(kept, sizes), None)


def _items(prefix: str) -> tuple[NDArray[np.int32], NDArray[Any]]:
    """The sizes of all items, int32, and their numbers in a row. Raises: DataError if a file is damaged."""
    idx_path, bin_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    missing = [str(path) for path in (bin_path, idx_path) if not path.is_file()]
    if missing:
        raise DataError(
            f"The DeepSpeed index {prefix} needs {' and '.join(missing)}, which cannot be found; give the prefixes of "
            "index_to_sample and index_to_metric files, without .bin and .idx."
        )
    try:
        index, size = idx_path.read_bytes(), bin_path.stat().st_size
    except OSError as error:
        raise DataError(f"{idx_path} cannot be read ({error.strerror}); give readable files.") from error
    if len(index) < HEADER_BYTES or index[:9] != MAGIC:
        raise DataError(f"{idx_path} is no index of DeepSpeed's: it begins with {index[:9]!r}, not {MAGIC!r}.")
    _, version, code, num_items, num_bounds = struct.unpack("<9sQBQQ", index[:HEADER_BYTES])
    expected = HEADER_BYTES + 12 * num_items + 8 * num_bounds
    if version != VERSION or code not in DTYPES or len(index) != expected:
        raise DataError(
            f"{idx_path} has version {version}, dtype code {code} and {len(index)} bytes; {num_items} items need "
            f"version {VERSION}, a code from 1 to {max(DTYPES)} and {expected} bytes. Copy or make it again."
        )
    sizes = np.frombuffer(index, "<i4", num_items, HEADER_BYTES)
    wanted = int(sizes.sum(dtype=np.int64)) * DTYPES[code].itemsize
    if num_items == 0 or (sizes < 0).any() or wanted != size or size == 0:
        raise DataError(f"{bin_path} holds {size} bytes, but {idx_path} accounts for {wanted}; copy or make it again.")
    return sizes, np.memmap(bin_path, dtype=DTYPES[code], mode="r")
