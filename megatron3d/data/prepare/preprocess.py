"""Text corpora to token files: one reader, many encoders, one writer, and the order of the input throughout.

The reader hands batches of about 1 MiB to an executor (`executors.py`), whose workers parse and encode them
(`encode.py`); the writer (`output.py`) takes the results in the order of the input. So the output is the same, byte for
byte, for any executor and number of workers, and for a run that was ended and resumed as often as one likes.
"""

from __future__ import annotations

import functools
import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

from megatron3d.data.indexed import token_dtype
from megatron3d.data.prepare.abbreviations import language_rules
from megatron3d.data.prepare.corpus import read_blocks, span_bytes
from megatron3d.data.prepare.encode import EncodedBatch, EncodeRequest, encode_batch, tokenizer_of, with_chosen_encoder
from megatron3d.data.prepare.executors import Executor, Processes
from megatron3d.data.prepare.inputs import STANDARD_INPUT
from megatron3d.data.prepare.output import DEFAULT_CHECKPOINT_S, OutputPlan, PreprocessOutput, is_complete
from megatron3d.data.prepare.rejects import BadRecordLimits, RejectTally
from megatron3d.data.prepare.run_state import RunCounts, RunState, changed_files, run_identity, state_path
from megatron3d.data.prepare.shard import Shard, shard_spans
from megatron3d.data.prepare.spans import InputSpan
from megatron3d.errors import ConfigError, DataError


@dataclass(frozen=True)
class RunOptions:
    """How a corpus is worked through: by what, which part of it, from where on, and with how many bad records.

    `checkpoint_s` is the time between states that a killed run can be resumed from.
    """

    executor: Executor = field(default_factory=Processes)
    shard: Shard = field(default_factory=Shard)
    resume: bool = False
    checkpoint_s: float = DEFAULT_CHECKPOINT_S
    limits: BadRecordLimits = field(default_factory=BadRecordLimits)


@dataclass(frozen=True)
class PreprocessProgress:
    """How far preprocessing has come.

    `input_share` is the part of the input files that was read, 0 to 1, or None with standard input, whose end is not
    known. `rejected` counts the bad records by reason in words, and is empty where there are none. `text_bytes` and
    `elapsed_s` are of this run, the other counts also of those that it resumes: their documents are
    `resumed_documents`, their share of the input `resumed_share`.
    """

    num_documents: int
    num_empty: int
    num_sequences: int
    num_tokens: int
    text_bytes: int
    input_share: float | None
    elapsed_s: float
    rejected: str = ""
    resumed_documents: int = 0
    resumed_share: float = 0.0

    @property
    def megabytes_per_s(self) -> float:
        """Text encoded, in 10**6 bytes of UTF-8 a second."""
        return self.text_bytes / 1e6 / max(self.elapsed_s, 1e-9)

    @property
    def documents_per_s(self) -> float:
        """Documents encoded a second."""
        return (self.num_documents - self.resumed_documents) / max(self.elapsed_s, 1e-9)

    @property
    def left_s(self) -> float | None:
        """Seconds left if the rest goes like the part done; None if nobody knows what the rest is."""
        if self.input_share is None:
            return None
        left_share = max(0.0, 1 - self.input_share)  # a file may grow while it is read
        return self.elapsed_s * left_share / max(self.input_share - self.resumed_share, 1e-9)


def output_prefix(prefix: str, key: str, *, split_sentences: bool = False, shard: Shard | None = None) -> str:
    """Where the tokens of `key` go: Megatron-LM's names for documents that are and are not cut into sentences, and
    behind them which shard it is."""
    suffix = shard.suffix if shard is not None else ""
    return f"{prefix}_{key}_{'sentence' if split_sentences else 'document'}{suffix}"


def rejects_path(prefix: str, shard: Shard | None = None) -> Path:
    """The file that lists the bad records of a run."""
    return Path(f"{prefix}_rejects{shard.suffix if shard is not None else ''}.jsonl")


def preprocess(
    files: Sequence[Path],
    prefix: str,
    *,
    request: EncodeRequest,
    options: RunOptions,
    report: Callable[[PreprocessProgress], None],
    note: Callable[[str], None],
) -> PreprocessProgress | None:
    """Encode the documents of `files` into the `.bin/.idx` of `output_prefix`, one pair a key; the final progress, or
    None where a run that is to be resumed is complete.

    With `request.splitting` each sentence is a sequence; a text that is a list is taken as sentences already. An empty
    text is a document without sequences, as in Megatron-LM, so that the keys of one corpus stay in step. A bad
    record is left out of all keys and listed in `rejects_path`. `report` is called after each batch; `note` takes lines
    about what an earlier run left and about the encoder that is used.

    Raises: ConfigError if --append-eod meets a tokenizer without such a token or with one of its own at the end,
    --lang is unknown, or the run to be resumed was another one or is unknown; DataError for input that cannot be read,
    holds no token at all or more bad records than allowed, and for a damaged state; StorageError if the output cannot
    be written; PeerError if a worker was killed; InUseError if another run writes the same output. No output appears
    in these cases.
    """
    _check(files, prefix, request, options)
    spans = _spans(files, options.shard)
    plan = _plan(files, spans, prefix, request, options)
    if options.resume and is_complete(plan):
        return None
    if not spans:
        note(f"--shard {options.shard}: no record of the input begins in this shard; its output is empty.")
    start_s, total_bytes = time.monotonic(), _total_bytes(spans)
    with PreprocessOutput(plan, resume=options.resume, checkpoint_s=options.checkpoint_s, note=note) as output:
        resumed = output.state
        progress = _progress(resumed, resumed, 0, total_bytes, plan.dtype.itemsize, start_s)
        tally = _tally(options.limits, resumed.counts)
        text_bytes = 0
        with closing(_encoded(spans, request, options, resumed, note)) as batches:
            for batch in batches:
                tally.add(batch.num_documents + len(batch.rejects), batch.rejects)
                output.append(batch, _state_behind(batch, output.state, tally))
                text_bytes += batch.text_bytes
                progress = _progress(output.state, resumed, text_bytes, total_bytes, plan.dtype.itemsize, start_s)
                report(replace(progress, rejected=tally.summary if tally.num_rejected else ""))
        tally.finish()
        if options.shard.count == 1:
            _require_tokens(files, request.json_keys, output.state)
        for file in changed_files(plan.identity, files) if plan.is_resumable else ():
            note(f"{file} has changed since this run began; the output holds what it was when it was read.")
    return replace(progress, rejected=tally.summary if tally.num_rejected else "")


def _check(files: Sequence[Path], prefix: str, request: EncodeRequest, options: RunOptions) -> None:
    """Raises: ConfigError for a request that cannot be carried out."""
    tokenizer = tokenizer_of(request.tokenizer)
    problems = []
    if request.append_eod and tokenizer.eod is None:
        problems.append(
            f"--append-eod cannot be used: {request.tokenizer.tokenizer_type} has no end-of-document token; leave the "
            f"option out or choose another tokenizer."
        )
    elif request.append_eod and request.special_tokens and tokenizer.suffix[-1:] == (tokenizer.eod,):
        problems.append(
            "--append-eod and --tokenizer-hf-include-special-tokens would end each document twice: the tokenizer puts "
            f"the end of a text, id {tokenizer.eod}, there itself; leave --append-eod out."
        )
    rejects = rejects_path(prefix, options.shard)
    if os.path.exists(rejects) and any(file != STANDARD_INPUT and rejects.samefile(file) for file in files):
        problems.append(f"--input names {rejects}, which lists the bad records of a run with this --output-prefix.")
    if STANDARD_INPUT in files and options.resume:
        problems.append("--resume: what was read from standard input cannot be read again; name files with --input.")
    if STANDARD_INPUT in files and options.shard.count > 1:
        problems.append(
            f"--shard {options.shard}: standard input has no parts that could be found without reading it; name files "
            f"with --input."
        )
    if problems:
        raise ConfigError("\n".join(problems))
    if request.splitting is not None:
        language_rules(request.splitting.language)


def _plan(
    files: Sequence[Path], spans: Sequence[InputSpan], prefix: str, request: EncodeRequest, options: RunOptions
) -> OutputPlan:
    """Which files are written, and what they depend on."""
    shard, is_split = options.shard, request.splitting is not None
    is_resumable = STANDARD_INPUT not in files
    return OutputPlan(
        tuple(output_prefix(prefix, key, split_sentences=is_split, shard=shard) for key in request.json_keys),
        token_dtype(tokenizer_of(request.tokenizer).vocab_size),
        rejects_path(prefix, shard),
        state_path(prefix, shard),
        spans,
        run_identity(request, files, shard, max_line_bytes=options.limits.max_line_bytes) if is_resumable else {},
        is_resumable,
    )


def _spans(files: Sequence[Path], shard: Shard) -> list[InputSpan]:
    """What the shard reads. Raises: DataError if a file cannot be read."""
    try:
        return shard_spans(files, shard)
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read ({error.strerror or error}).") from error


def _total_bytes(spans: Sequence[InputSpan]) -> int | None:
    """The bytes to be read; None with standard input."""
    is_known = all(span.file != STANDARD_INPUT for span in spans)
    return max(1, sum(map(span_bytes, spans))) if is_known else None


def _encoded(
    spans: Sequence[InputSpan],
    request: EncodeRequest,
    options: RunOptions,
    resumed: RunState,
    note: Callable[[str], None],
) -> Generator[EncodedBatch, None, None]:
    """The encoded batches behind the state, in order."""
    if resumed.is_read or not spans:
        return
    position = resumed.position if resumed.counts.num_records else None
    batches = read_blocks(
        spans,
        request.json_keys,
        start=position,
        max_line_bytes=options.limits.max_line_bytes,
        by_range=options.executor.sees_files,
    )
    if (first := next(batches, None)) is None:
        return
    work = functools.partial(encode_batch, with_chosen_encoder(request, first, note))
    yield from options.executor.map_in_order(work, chain((first,), batches))


def _tally(limits: BadRecordLimits, counts: RunCounts) -> RejectTally:
    """The counts of bad records, from where an earlier run left them."""
    return RejectTally(limits, counts.num_records, Counter(counts.rejects_by_reason), counts.first_reject)


def _state_behind(batch: EncodedBatch, before: RunState, tally: RejectTally) -> RunState:
    """The position and the counts behind a batch."""
    counts = RunCounts(
        before.counts.num_documents + batch.num_documents,
        before.counts.num_empty + int(sum((encoded.sequences_per_document == 0).sum() for encoded in batch.keys)),
        before.counts.num_sequences + sum(len(encoded.sequence_lengths) for encoded in batch.keys),
        tally.num_records,
        dict(tally.by_reason),
        tally.first_message,
    )
    return replace(before, position=batch.end, counts=counts, input_bytes=batch.input_bytes)


def _progress(
    state: RunState, resumed: RunState, text_bytes: int, total_bytes: int | None, itemsize: int, start_s: float
) -> PreprocessProgress:
    """What a state means for people."""
    counts = state.counts
    return PreprocessProgress(
        counts.num_documents,
        counts.num_empty,
        counts.num_sequences,
        sum(extent.bin_bytes for extent in state.extents) // itemsize,
        text_bytes,
        None if total_bytes is None else state.input_bytes / total_bytes,
        time.monotonic() - start_s,
        resumed_documents=resumed.counts.num_documents,
        resumed_share=resumed.input_bytes / (total_bytes or 1),
    )


def _require_tokens(files: Sequence[Path], keys: Sequence[str], state: RunState) -> None:
    """Raises: DataError if a key has no token in the whole corpus."""
    for key, extent in zip(keys, state.extents):
        if extent.bin_bytes == 0:
            names = ", ".join(str(file) for file in files[:3]) + (" ..." if len(files) > 3 else "")
            raise DataError(
                f"The corpus {names} is empty: its {state.counts.num_documents} documents have no token under the key "
                f"{key!r}; nothing was written. Check --input and --json-keys."
            )
