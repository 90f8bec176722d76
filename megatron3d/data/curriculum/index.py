"""The index of one metric: the samples of a training split from the easiest to the hardest, with their numbers.

    DIR/METRIC/order.u32   the samples' numbers in rising order of the metric, uint32 (order.u64 beyond 2^32 samples)
    DIR/METRIC/value.f32   the metric of each, in the same order, float32
    DIR/METRIC/index.json  what the samples are of: digest of the corpus, documents, sequence length, tokenizer

All little-endian. The files are mapped, so that ranks of one machine share them. Ties stand in the order of the file.
A run that uses an index stops before its first step if the index is of other samples than its own.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron3d.errors import DataError
from megatron3d.files.json_text import parse
from megatron3d.storage.atomic import atomic_path, write_text_atomically

FORMAT = 1
JSON_NAME, VALUE_NAME = "index.json", "value.f32"


@dataclass(frozen=True)
class SampleIdentity:
    """Of which samples an index is: equal identities have equal samples.

    Attributes:
        dataset: digest of the token files (`data/content.py`).
        documents: the first document of the training split, and the one after the last.
        seq_length: S.
        num_samples: how many there are.
        kind: "tokens" for a GPT, "sentences" for a BERT, whose samples also depend on the next three.
        sample_seed: of the stream that makes the samples of a BERT.
        short_seq_prob, sentence_task: its options.
        tokenizer: digest of the tokenizer, None where none was given.
    """

    dataset: str
    documents: tuple[int, int]
    seq_length: int
    num_samples: int
    kind: str = "tokens"
    sample_seed: int | None = None
    short_seq_prob: float | None = None
    sentence_task: str | None = None
    tokenizer: str | None = None

    def differences(self, run: SampleIdentity) -> Iterator[str]:
        """A clause for each way in which the samples of `run` are others than those of the index."""
        named = {
            "kind": ("the kind of model", "train the other kind of model"),
            "dataset": ("the corpus, by its digest", "name the corpus it was made of"),
            "documents": ("the documents of the training split", "use its --split"),
            "seq_length": ("--seq-length", "use its length"),
            "sample_seed": ("the seed of the samples", "use its --seed and place in --data-path"),
            "short_seq_prob": ("--short-seq-prob", "use its share"),
            "sentence_task": ("the sentence task", "use its task"),
            "tokenizer": ("the tokenizer, by its digest", "use its tokenizer"),
        }
        for name, (label, remedy) in named.items():
            ours, theirs = getattr(self, name), getattr(run, name)
            if ours != theirs and not (name == "tokenizer" and None in (ours, theirs)):
                yield f"{label} is {_shown(ours)} there and {_shown(theirs)} in this run ({remedy})"


@dataclass(frozen=True)
class MetricIndex:
    """An index that is open. order: whole numbers [n]; value: float32 [n], rising.

    DeepSpeed's files may have values in float64, and have no identity: they do not say what they are of.
    """

    name: str
    order: NDArray[np.integer[Any]]
    value: NDArray[np.floating[Any]]
    identity: SampleIdentity | None

    @property
    def num_samples(self) -> int:
        """n."""
        return len(self.order)

    def num_admitted(self, bound: float, difficulty_type: str) -> int:
        """How many samples from the front of the order a bound admits.

        A value admits all samples up to it, in the precision of the file. Percentile p admits floor(n p / 100).
        """
        if difficulty_type == "value":
            return int(np.searchsorted(self.value, self.value.dtype.type(bound), side="right"))
        return min(self.num_samples, int(self.num_samples * bound / 100 + 1e-9))


def write_index(
    directory: Path, metric: str, values: NDArray[np.float64], identity: SampleIdentity, *, version: int | str
) -> None:
    """Sort the samples by `values` [n] and write the index to `directory`, the description last.

    Raises: OSError if the system refuses.
    """
    kept = values.astype("<f4")
    order = np.argsort(kept, kind="stable")
    name, dtype = ("order.u32", "<u4") if len(kept) <= 2**32 else ("order.u64", "<u8")
    (directory / JSON_NAME).unlink(missing_ok=True)
    for file, array in ((name, order.astype(dtype)), (VALUE_NAME, kept[order])):
        with atomic_path(directory / file) as beside:
            array.tofile(beside)
    described = {
        "format": FORMAT,
        "metric": metric,
        "metric_version": version,
        "order": name,
        "samples": dataclasses.asdict(identity),
    }
    write_text_atomically(directory / JSON_NAME, json.dumps(described, indent=2) + "\n")


def read_index(directory: Path) -> MetricIndex:
    """Open the index in `directory`. Raises: DataError if it is missing, damaged, or of another version."""
    path = directory / JSON_NAME
    try:
        described = parse(path.read_bytes(), unique_keys=True)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); make it by tools/analyze_data.py.") from error
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}); make it again by tools/analyze_data.py.") from error
    try:
        identity = _identity(described["samples"])
        name, order_name, version = str(described["metric"]), str(described["order"]), described["format"]
        wide = {"order.u32": "<u4", "order.u64": "<u8"}[order_name]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} lacks or misspells {error}; make it again by tools/analyze_data.py.") from error
    if version != FORMAT:
        raise DataError(f"{path} has format {version}, but this version reads format {FORMAT}; make it again.")
    order = _mapped(directory / order_name, wide, identity.num_samples)
    value = _mapped(directory / VALUE_NAME, "<f4", identity.num_samples)
    if (missing := missing_sample(order)) is not None:
        raise DataError(f"{directory / order_name} is damaged: sample {missing} is missing; make the index again.")
    if not (value[1:] >= value[:-1]).all():
        raise DataError(f"{directory / VALUE_NAME} is damaged: its numbers do not rise; make the index again.")
    return MetricIndex(name, order, value, identity)


def missing_sample(order: NDArray[np.integer[Any]]) -> int | None:
    """The least number that a row of n whole numbers from 0 up lacks of those below n; None if each is there once."""
    seen = np.zeros(len(order), dtype=bool)
    seen[order[(order >= 0) & (order < len(order))]] = True
    return None if seen.all() else int(np.argmin(seen))


def _identity(stored: dict[str, Any]) -> SampleIdentity:
    names = {field.name for field in dataclasses.fields(SampleIdentity)}
    if stored.keys() != names:
        raise ValueError(", ".join(sorted(names ^ stored.keys())))
    first, stop = (int(bound) for bound in stored["documents"])
    identity = SampleIdentity(**{**stored, "documents": (first, stop)})
    if not isinstance(identity.num_samples, int) or identity.num_samples < 1:
        raise ValueError(f"num_samples {identity.num_samples}")
    return identity


def _mapped(path: Path, dtype: str, count: int) -> NDArray[Any]:
    """`count` numbers in a file. Raises: DataError if it is missing or of another size."""
    wanted = count * np.dtype(dtype).itemsize
    try:
        size = path.stat().st_size
        if size == wanted:
            return np.memmap(path, dtype=dtype, mode="r")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); make the index again.") from error
    raise DataError(f"{path} holds {size} bytes, but {count} samples need {wanted}; make the index again.")


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"{value[0]} to {value[1]}"
    return f"{value:.8}" if isinstance(value, str) else str(value)
