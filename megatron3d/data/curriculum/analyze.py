"""Metrics of every fixed sample of a training split, in parallel, and the sorted index of each.

The samples are cut into parts, which do not depend on the number of workers. A part's numbers are written in one piece
under DIR/.parts; a run that was ended at any moment goes on with the parts that are missing, if it is asked for the
same samples and metrics. The indexes are written when all parts are there.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron3d.data.bert import BertForm, BertSamples
from megatron3d.data.curriculum.build import identity_of
from megatron3d.data.curriculum.index import SampleIdentity, write_index
from megatron3d.data.curriculum.metrics import LOSS, Metric, directory_name, find_metric, measured
from megatron3d.data.curriculum.samples import SampleReader, log_probabilities
from megatron3d.data.gpt import GPTSamples
from megatron3d.data.indexed import IndexedDataset
from megatron3d.data.masking import BertVocabulary, MaskingRules
from megatron3d.data.order import derive_seed
from megatron3d.data.splits import split_documents
from megatron3d.data.tokenizer import Tokenizer, TokenizerSpec
from megatron3d.errors import ConfigError, DataError, PeerError
from megatron3d.files.json_text import parse
from megatron3d.files.user_code import code_digest, is_user_code
from megatron3d.process.parent import watch_parent
from megatron3d.storage.atomic import atomic_path, write_text_atomically

NUM_PARTS = 512  # at most; a part has at least 64 samples
PARTS_NAME, PLAN_NAME, COUNTS_NAME = ".parts", "plan.json", "counts.npy"
Losses = Callable[[NDArray[np.int64]], NDArray[np.float64]]


@dataclass(frozen=True)
class BertOptions:
    """The options that a BERT's samples follow from, besides length and seed."""

    short_seq_prob: float = 0.1
    sentence_task: str | None = "order"


@dataclass(frozen=True)
class AnalyzeRequest:
    """What every worker needs to know.

    Attributes:
        prefix: of the token files.
        seq_length, split: as in training.
        metrics: names of metrics.
        tokenizer: that of the data; None where no metric needs text.
        vocab_size: bounds the ids, for metrics that count them.
        bert: what the samples of a BERT look like; None for those of a GPT.
        seed: of the run's data, and the corpus's place in --data-path: a BERT's samples follow from both.
        place: see `seed`.
        checkpoint: that of the metric `loss`; None without it.
    """

    prefix: str
    seq_length: int
    split: str
    metrics: tuple[str, ...]
    tokenizer: TokenizerSpec | None
    vocab_size: int | None
    bert: BertOptions | None = None
    seed: int = 1234
    place: int = 0
    checkpoint: str | None = None

    def stream(self) -> GPTSamples | BertSamples:
        """The training samples. Raises: DataError if the files cannot be used or hold no sample."""
        dataset = IndexedDataset(self.prefix)
        documents = split_documents(dataset.num_documents, self.split)[0]
        seed = derive_seed(self.seed, "train", self.place)
        if self.bert is not None:
            return BertSamples(dataset, documents, form=self._form(self.bert), seed=seed)
        return GPTSamples(dataset, documents, seq_length=self.seq_length, seed=seed)

    def _form(self, bert: BertOptions) -> BertForm:
        if self.tokenizer is None:
            raise ConfigError(f"the sentences of {self.prefix} need the tokenizer of a BERT; give --tokenizer-type.")
        return BertForm(
            self.seq_length,
            BertVocabulary.of_tokenizer(self.tokenizer.build()),
            MaskingRules(),
            short_seq_prob=bert.short_seq_prob,
            sentence_task=bert.sentence_task,
        )


def analyze(
    request: AnalyzeRequest,
    output: Path,
    *,
    workers: int,
    tokenizer_digest: str | None,
    losses: Losses | None,
    report: Callable[[int, int], None],
) -> SampleIdentity:
    """Write the index of each metric under `output`, going on with what an earlier run left there.

    Args:
        request: samples and metrics.
        output: the directory.
        workers: processes; the loss is computed in this one.
        tokenizer_digest: of the tokenizer's files, for the description of the index.
        losses: mean loss of each of B rows of S + 1 tokens; needed by the metric `loss`.
        report: called with the parts that are done, and all parts, after each.

    Raises:
        ConfigError: a metric is not known or lacks what it needs; `output` has parts of something else.
        DataError: the data cannot be used, or a metric fails.
        PeerError: a worker was killed.
        OSError: the system refuses to write.
    """
    metrics = _metrics(request, losses)
    reader = SampleReader(request.stream(), None)
    identity = identity_of(reader.stream, tokenizer_digest)
    parts = _parts(identity.num_samples)
    folder = output / PARTS_NAME
    _begin(folder, request, identity, len(parts))
    if any(metric.needs_frequencies for metric in metrics) and not (folder / COUNTS_NAME).exists():
        assert request.vocab_size is not None, "metrics that count ids passed the checks without a vocabulary"
        with atomic_path(folder / COUNTS_NAME) as beside, beside.open("wb") as file:
            np.save(file, reader.count_tokens(request.vocab_size))
    missing = [part for part in parts if not _path(folder, part).exists()]
    done = len(parts) - len(missing)
    for _ in _measured_parts(request, folder, missing, workers):
        done += 1
        report(done, len(parts))
    _add_losses(request, reader, folder, parts, losses)
    _write_indexes(request, output, parts, identity)
    shutil.rmtree(folder)
    return identity


def measure_part(request: AnalyzeRequest, folder: Path, part: range) -> range:
    """Measure the samples of one part and write their numbers, float64 [metrics, samples]; what a worker does."""
    metrics = _own_metrics(request)
    reader = _reader_of(request)
    log_probability = None
    if any(metric.needs_frequencies for metric in metrics):
        log_probability = _log_probabilities_of(folder / COUNTS_NAME)
    values = np.empty((len(metrics), len(part)))
    for column, number in enumerate(part):
        sample = reader.read(number, log_probability)
        values[:, column] = [measured(metric, sample) for metric in metrics]
    _save(_path(folder, part), values)
    return part


def _metrics(request: AnalyzeRequest, losses: Losses | None) -> list[Metric]:
    """The metrics but the loss. Raises: ConfigError with all that they lack."""
    problems = []
    names = [directory_name(name) for name in request.metrics]
    if not names or len(set(names)) < len(names):
        problems.append(f"--metrics {','.join(request.metrics)} must name at least one metric, and each once.")
    metrics = _own_metrics(request)
    for metric in metrics:
        if metric.needs_text and request.tokenizer is None:
            problems.append(f"--metrics {metric.name} needs the text of the samples; give --tokenizer-type.")
        if metric.needs_frequencies and request.vocab_size is None:
            problems.append(f"--metrics {metric.name} counts ids; give --tokenizer-type, or --vocab-size.")
    if LOSS in request.metrics and losses is None:
        problems.append(f"--metrics {LOSS} needs a model; give --load CHECKPOINT.")
    if LOSS in request.metrics and request.bert is not None:
        problems.append(f"--metrics {LOSS} is the loss of the next token, which a BERT does not have; leave it out.")
    if problems:
        raise ConfigError("\n".join(problems))
    return metrics


def _own_metrics(request: AnalyzeRequest) -> list[Metric]:
    return [find_metric(name) for name in request.metrics if name != LOSS]


def _parts(num_samples: int) -> list[range]:
    size = max(64, -(-num_samples // NUM_PARTS))
    return [range(first, min(first + size, num_samples)) for first in range(0, num_samples, size)]


def _begin(folder: Path, request: AnalyzeRequest, identity: SampleIdentity, num_parts: int) -> None:
    """Write down what is being measured. Raises: ConfigError if parts of something else are there."""
    plan: dict[str, Any] = {
        "samples": dataclasses.asdict(identity),
        "metrics": [[name, _version(name)] for name in request.metrics],
        "checkpoint": request.checkpoint,
        "parts": num_parts,
    }
    path = folder / PLAN_NAME
    wanted = json.loads(json.dumps(plan))
    if path.exists():
        try:
            found = parse(path.read_bytes(), unique_keys=True)
        except ValueError:
            found = None
        if found == wanted:
            return
        raise ConfigError(
            f"{folder} holds parts of another analysis, which was ended; give the --output, the metrics, the data "
            "and the checkpoint of that one to go on with it, or remove the folder."
        )
    write_text_atomically(path, json.dumps(plan, indent=2) + "\n")


def _version(name: str) -> int | str:
    if name == LOSS:
        return 1
    return code_digest(name) if is_user_code(name) else find_metric(name).version


def _measured_parts(request: AnalyzeRequest, folder: Path, parts: Sequence[range], workers: int) -> Iterator[range]:
    """Measure parts in processes (1: in this one), in any order.

    Raises: what `measure_part` raised; PeerError if a worker was killed.
    """
    work = functools.partial(measure_part, request, folder)
    if workers <= 1 or len(parts) < 2:
        yield from map(work, parts)
        return
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context(method),
        initializer=_become_worker,
        initargs=(os.getpid(),),
    )
    try:
        for future in as_completed([pool.submit(work, part) for part in parts]):
            yield future.result()
    except BrokenProcessPool as error:
        raise PeerError(
            f"One of the {workers} workers was killed, most likely for want of memory; use fewer --workers and start "
            "again: what is done is kept."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _become_worker(parent_pid: int) -> None:
    """Leave signals of the whole group to the parent, and end when it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    watch_parent(parent_pid, lambda: os._exit(1))


@functools.lru_cache(maxsize=1)
def _reader_of(request: AnalyzeRequest) -> SampleReader:
    """Open once in each process."""
    tokenizer: Tokenizer | None = None if request.tokenizer is None else request.tokenizer.build()
    return SampleReader(request.stream(), tokenizer)


@functools.lru_cache(maxsize=1)
def _log_probabilities_of(path: Path) -> NDArray[np.float64]:
    return log_probabilities(_load(path))


def _add_losses(
    request: AnalyzeRequest, reader: SampleReader, folder: Path, parts: Sequence[range], losses: Losses | None
) -> None:
    """Compute the loss of each part's samples, if it is asked for, beside the other numbers of the part."""
    if LOSS not in request.metrics:
        return
    assert losses is not None and isinstance(reader.stream, GPTSamples), "checked by _metrics"
    for part in parts:
        if not (path := _path(folder, part, LOSS)).exists():
            rows = np.stack([reader.stream.fixed(number, number) for number in part])
            _save(path, losses(rows))


def _write_indexes(request: AnalyzeRequest, output: Path, parts: Sequence[range], identity: SampleIdentity) -> None:
    others = [name for name in request.metrics if name != LOSS]
    folder = output / PARTS_NAME
    values = np.concatenate([_load(_path(folder, part), (len(others), len(part))) for part in parts], axis=1)
    for name in request.metrics:
        if name == LOSS:
            files = [_path(folder, part, LOSS) for part in parts]
            found = np.concatenate([_load(file, (len(part),)) for file, part in zip(files, parts, strict=True)])
        else:
            found = values[others.index(name)]
        version = _version(name)
        write_index(output / directory_name(name), name, found, identity, version=version)


def _path(folder: Path, part: range, name: str = "part") -> Path:
    return folder / f"{name}_{part.start:012d}.npy"


def _save(path: Path, values: NDArray[Any]) -> None:
    with atomic_path(path) as beside, beside.open("wb") as file:
        np.save(file, values)


def _load(path: Path, shape: tuple[int, ...] | None = None) -> NDArray[Any]:
    """Raises: DataError if a file is damaged or, where a shape is given, of another one."""
    try:
        values = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(f"{path} is damaged ({error}); remove it and start again.") from error
    if shape is not None and values.shape != shape:
        raise DataError(f"{path} holds {values.shape} numbers, not {shape}; remove it and start again.")
    return values
