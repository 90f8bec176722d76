"""Text corpora to token files: one reader, many encoders, one writer, and the order of the input throughout.

The reader hands batches of about 256 KiB to worker processes, which parse and encode them; the writer takes the results
in the order they were handed out. At most four batches a worker are under way, so memory does not grow with the
corpus, and the output is the same, byte for byte, for any number of workers. Signals are the parent's to handle: it
ends the workers when it is asked to stop, and they end by themselves when it is killed.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TypeVar

from megatron3d.data.indexed import IndexedDatasetWriter, token_dtype
from megatron3d.data.prepare.abbreviations import language_rules
from megatron3d.data.prepare.corpus import read_batches, span_bytes
from megatron3d.data.prepare.encode import EncodeRequest, encode_batch, tokenizer_of, with_chosen_encoder
from megatron3d.data.prepare.inputs import STANDARD_INPUT
from megatron3d.data.prepare.rejects import BadRecordLimits, RejectsFile, RejectTally
from megatron3d.data.prepare.spans import whole_files
from megatron3d.errors import ConfigError, DataError, PeerError
from megatron3d.process.parent import watch_parent

_BATCHES_PER_WORKER = 4
_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True)
class PreprocessProgress:
    """How far preprocessing has come.

    `input_share` is the part of the input files that was read, 0 to 1, or None with standard input, whose end is not
    known. `rejected` counts the bad records by reason in words, and is empty where there are none.
    """

    num_documents: int
    num_empty: int
    num_sequences: int
    num_tokens: int
    text_bytes: int
    input_share: float | None
    elapsed_s: float
    rejected: str = ""

    @property
    def megabytes_per_s(self) -> float:
        """Text encoded, in 10**6 bytes of UTF-8 a second."""
        return self.text_bytes / 1e6 / max(self.elapsed_s, 1e-9)

    @property
    def documents_per_s(self) -> float:
        """Documents encoded a second."""
        return self.num_documents / max(self.elapsed_s, 1e-9)

    @property
    def left_s(self) -> float | None:
        """Seconds left if the rest goes like the part done; None if nobody knows what the rest is."""
        if self.input_share is None:
            return None
        return self.elapsed_s * (1 - self.input_share) / max(self.input_share, 1e-9)


def output_prefix(prefix: str, key: str, *, split_sentences: bool = False) -> str:
    """Where the tokens of `key` go: Megatron-LM's names for documents that are and are not cut into sentences."""
    return f"{prefix}_{key}_{'sentence' if split_sentences else 'document'}"


def rejects_path(prefix: str) -> Path:
    """The file that lists the bad records of a run."""
    return Path(f"{prefix}_rejects.jsonl")


def _ignore(line: str) -> None:
    """Take a line that nobody asked for."""


def preprocess(
    files: Sequence[Path],
    prefix: str,
    *,
    request: EncodeRequest,
    workers: int,
    report: Callable[[PreprocessProgress], None],
    limits: BadRecordLimits | None = None,
    note: Callable[[str], None] = _ignore,
) -> PreprocessProgress:
    """Encode all documents of `files` into the `.bin/.idx` of `output_prefix`, one pair a key; the final progress.

    With `request.splitting` each sentence is a sequence; a text that is a list is taken as sentences already. An empty
    text is a document without sequences, as in Megatron-LM, so that the keys of one corpus stay in step. A bad
    record is left out of all keys and listed in `rejects_path`. `report` is called after each batch, `note` with a line
    about the encoder that is used.

    Raises: ConfigError if --append-eod meets a tokenizer without such a token or with one of its own at the end, or
    --lang is unknown; DataError for input that cannot be read, holds no token at all or more bad records than `limits`
    (by default the default ones) allow; StorageError if the output cannot be written; PeerError if a worker was killed.
    No output appears in these cases.
    """
    tokenizer = tokenizer_of(request.tokenizer)
    if request.append_eod and tokenizer.eod is None:
        raise ConfigError(
            f"--append-eod cannot be used: {request.tokenizer.tokenizer_type} has no end-of-document token; leave the "
            f"option out or choose another tokenizer."
        )
    if request.append_eod and request.special_tokens and tokenizer.suffix[-1:] == (tokenizer.eod,):
        raise ConfigError(
            "--append-eod and --tokenizer-hf-include-special-tokens would end each document twice: the tokenizer puts "
            f"the end of a text, id {tokenizer.eod}, there itself; leave --append-eod out."
        )
    if request.splitting is not None:
        language_rules(request.splitting.language)
    spans = whole_files(files)
    total_bytes = None if STANDARD_INPUT in files else max(1, sum(map(span_bytes, spans)))
    start_s = time.monotonic()
    progress = PreprocessProgress(0, 0, 0, 0, 0, 0.0, 0.0)
    limits = limits or BadRecordLimits()
    tally = RejectTally(limits)
    batches = read_batches(spans, request.json_keys, max_line_bytes=limits.max_line_bytes)
    if (first := next(batches, None)) is not None:
        request = with_chosen_encoder(request, first, note)
        batches = chain((first,), batches)
    with ExitStack() as stack:
        dtype = token_dtype(tokenizer.vocab_size)
        is_split = request.splitting is not None
        targets = [output_prefix(prefix, key, split_sentences=is_split) for key in request.json_keys]
        writers = [stack.enter_context(IndexedDatasetWriter(target, dtype)) for target in targets]
        rejects = stack.enter_context(RejectsFile(rejects_path(prefix)))
        num_tokens = [0] * len(writers)
        for batch in _map_in_order(functools.partial(encode_batch, request), batches, workers):
            rejects.add(batch.rejects)
            tally.add(batch.num_documents + len(batch.rejects), batch.rejects)
            for place, (writer, encoded) in enumerate(zip(writers, batch.keys)):
                writer.add_documents(encoded.tokens, encoded.sequence_lengths, encoded.sequences_per_document)
                num_tokens[place] += len(encoded.tokens)
            progress = PreprocessProgress(
                progress.num_documents + batch.num_documents,
                progress.num_empty + int(sum((encoded.sequences_per_document == 0).sum() for encoded in batch.keys)),
                progress.num_sequences + sum(len(encoded.sequence_lengths) for encoded in batch.keys),
                sum(num_tokens),
                progress.text_bytes + batch.text_bytes,
                None if total_bytes is None else batch.input_bytes / total_bytes,
                time.monotonic() - start_s,
                tally.summary if tally.num_rejected else "",
            )
            report(progress)
        tally.finish()
        _require_tokens(files, dict(zip(request.json_keys, num_tokens)), progress.num_documents)
    return progress


def _map_in_order(work: Callable[[_In], _Out], items: Iterable[_In], workers: int) -> Iterator[_Out]:
    """`work` on each item, in `workers` processes (1: in this one), results in the order of the items.

    Raises: what `work` raised for the first item that failed; PeerError if a worker was killed.
    """
    if workers <= 1:
        yield from map(work, items)
        return
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_become_worker, initargs=(os.getpid(),))
    try:
        pending = deque()
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) >= workers * _BATCHES_PER_WORKER:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise PeerError(
            f"One of the {workers} workers was killed, most likely for want of memory; use fewer --workers or cut "
            f"very long documents."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _become_worker(parent_pid: int) -> None:
    """Leave signals of the whole group (Ctrl-C, a scheduler's SIGTERM) to the parent, and end when it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    watch_parent(parent_pid, lambda: os._exit(1))


def _require_tokens(files: Sequence[Path], num_tokens: dict[str, int], num_documents: int) -> None:
    """Raises: DataError if a key has no token in the whole corpus."""
    for key, count in num_tokens.items():
        if count == 0:
            names = ", ".join(str(file) for file in files[:3]) + (" ..." if len(files) > 3 else "")
            raise DataError(
                f"The corpus {names} is empty: its {num_documents} documents have no token under the key {key!r}; "
                f"nothing was written. Check --input and --json-keys."
            )
