"""Show what is in a token file: counts, lengths, and the text of its beginning if a tokenizer is given.

    python tools/inspect_dataset.py my_text_document --tokenizer-type GPT2BPETokenizer \
        --vocab-file vocab.json --merge-file merges.txt --verify --histogram lengths.png
    python tools/inspect_dataset.py my_text_document ... --sample 1000 --seq-length 1024 --split 969,30,1

`--verify` reads all tokens, and ends with exit code 3 where something is wrong with them. `--sample` shows what a
training run reads as that sample, with the documents that it consists of.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron3d.config.tool_parser import ToolParser, too_small
from megatron3d.data.indexed import IndexedDataset
from megatron3d.data.splits import SPLIT_NAMES
from megatron3d.data.tiktoken_file import add_tiktoken_arguments, tiktoken_from_arguments
from megatron3d.data.tokenizer import TOKENIZER_TYPES, Tokenizer, TokenizerSpec
from megatron3d.data.verify import document_lengths, verify_dataset
from megatron3d.errors import ConfigError, DataError
from megatron3d.process.command import run_command

IDS_PER_READ = 1 << 22
_LINE_EVERY_S = 5.0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = ToolParser(description="Show what is in a token file.")
    p.add_argument("prefix", help="prefix of the .bin/.idx pair")
    p.add_argument("--document", type=int, default=0, metavar="I", help="which document to show (default 0)")
    p.add_argument("--num-tokens", type=int, default=64, metavar="N", help="tokens of it to show (default 64)")
    p.add_argument("--verify", action="store_true", help="read all tokens, and report every document that is wrong")
    p.add_argument("--histogram", metavar="FILE.png", help="draw the lengths of the documents")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    sample = p.add_argument_group("a sample of a GPT, as a training run with these options reads it")
    sample.add_argument("--sample", type=int, metavar="I", help="show sample I, counted from 0")
    sample.add_argument("--seq-length", type=int, metavar="S", help="tokens of a sample")
    sample.add_argument("--sample-of", choices=SPLIT_NAMES, default="train", help="of which data (default train)")
    sample.add_argument("--split", default="969,30,1", metavar="SHARES", help="shares of the documents (969,30,1)")
    sample.add_argument("--seed", type=int, default=1234, metavar="N", help="seed of the run (default 1234)")
    tokenizer = p.add_argument_group("tokenizer, to show the tokens as text and to check the ids")
    tokenizer.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES)
    tokenizer.add_argument("--vocab-file", metavar="FILE")
    tokenizer.add_argument("--merge-file", metavar="FILE")
    tokenizer.add_argument("--tokenizer-model", metavar="PATH")
    tokenizer.add_argument("--vocab-size", type=int, metavar="N", help="ids of it; without a tokenizer, for --verify")
    tokenizer.add_argument("--eod-token", type=int, metavar="N", help="end of a document (default: the tokenizer's)")
    add_tiktoken_arguments(tokenizer)
    return p


def check(args: argparse.Namespace) -> None:
    """Raises: ConfigError with all that the options alone show to be impossible."""
    problems = too_small(
        (
            ("--num-tokens", args.num_tokens, 0),
            ("--sample", args.sample, 0),
            ("--seq-length", args.seq_length, 1),
            ("--vocab-size", args.vocab_size, 1),
        )
    )
    if args.sample is not None and args.seq_length is None:
        problems.append(f"--sample {args.sample} needs --seq-length S: how samples are cut depends on it.")
    if problems:
        raise ConfigError("\n".join(problems))


def length_histogram(dataset: IndexedDataset) -> list[dict[str, int]]:
    """How many documents have 0, 1, 2-3, 4-7, ... tokens; rows without documents at either end are left out."""
    lengths = document_lengths(dataset)
    # frexp gives the exponent e with 2**(e-1) <= x < 2**e exactly, and 0 for 0
    exponents = np.frexp(lengths.astype(np.float64))[1]
    counts = np.bincount(exponents)
    first = int(exponents.min()) if len(exponents) else 0
    return [
        {"from": 1 << (e - 1) if e else 0, "to": (1 << e) - 1, "documents": int(counts[e])}
        for e in range(first, len(counts))
    ]


def inspect(
    args: argparse.Namespace,
    *,
    draw: Callable[..., None] | None,
    show: Callable[..., dict[str, Any]] | None,
) -> dict[str, Any]:
    """All there is to show, as plain values. `draw` makes the picture, `show` a sample, where they are asked for.

    Raises: DataError if the files are damaged, the document does not exist, or an id is outside the vocabulary (with
    --verify that is one of the problems found).
    """
    dataset = IndexedDataset(args.prefix)
    if not 0 <= args.document < max(1, dataset.num_documents):
        raise DataError(
            f"--document {args.document} does not exist: {args.prefix} has 0 to {dataset.num_documents - 1}."
        )
    tokens = dataset.document(args.document)[: args.num_tokens].tolist() if dataset.num_documents else []
    tokenizer = tokenizer_of(args)
    found: dict[str, Any] = {
        "prefix": args.prefix,
        "dtype": dataset.dtype.name,
        "documents": dataset.num_documents,
        "sequences": len(dataset),
        "tokens": dataset.num_tokens,
        **ids_found(args, dataset, tokenizer),
        "document_lengths": length_histogram(dataset),
        "document": args.document,
        "first_tokens": tokens,
    }
    if tokenizer is not None:
        found["text"] = tokenizer.decode(tokens)
    if draw is not None:
        draw(document_lengths(dataset), Path(args.histogram), title=args.prefix)
    if show is not None:
        found["sample"] = show(
            dataset,
            args.sample,
            seq_length=args.seq_length,
            of=args.sample_of,
            split=args.split,
            seed=args.seed,
            decode=None if tokenizer is None else tokenizer.decode,
        )
    return found


def tokenizer_of(args: argparse.Namespace) -> Tokenizer | None:
    """The tokenizer of the options, None without one."""
    if args.tokenizer_type is None:
        return None
    files = (args.vocab_file, args.merge_file, args.tokenizer_model)
    tiktoken = tiktoken_from_arguments(args)
    return TokenizerSpec(args.tokenizer_type, *files, vocab_size=args.vocab_size, tiktoken=tiktoken).build()


def ids_found(args: argparse.Namespace, dataset: IndexedDataset, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The smallest and the largest id, and with --verify all that was counted and the problems.

    Raises: DataError if an id is outside the vocabulary, without --verify.
    """
    if args.verify:
        eod = args.eod_token if args.eod_token is not None or tokenizer is None else tokenizer.eod
        verified = verify_dataset(
            dataset,
            vocab_size=args.vocab_size if tokenizer is None else tokenizer.vocab_size,
            eod_token=eod,
            report=ProgressLines(),
        )
        facts = dataclasses.asdict(verified)
        ends = {name: facts.pop(name) for name in ("smallest_id", "largest_id")}
        return {**ends, "verified": {"eod_token": eod, **facts}}
    smallest, largest = id_range(dataset)
    if tokenizer is None or smallest is None or largest is None:
        return {"smallest_id": smallest, "largest_id": largest}
    if not 0 <= smallest <= largest < tokenizer.vocab_size:
        raise DataError(
            f"{dataset.bin_path} has ids from {smallest} to {largest}, but "
            f"{args.tokenizer_type} has {tokenizer.vocab_size}; this is another tokenizer's data."
        )
    return {"smallest_id": smallest, "largest_id": largest}


class ProgressLines:
    """Prints to the error stream how much of a file was read, every few seconds."""

    def __init__(self) -> None:
        """Begin now."""
        self._start_s = self._last_s = time.monotonic()

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        """Print the share, the speed and the time left, if the last line is old enough."""
        now_s = time.monotonic()
        if now_s - self._last_s < _LINE_EVERY_S or done_bytes == total_bytes:
            return
        self._last_s, elapsed_s = now_s, now_s - self._start_s
        left_s = elapsed_s * (total_bytes - done_bytes) / done_bytes
        print(
            f"{done_bytes / total_bytes:.1%} read, {done_bytes / 1e6 / elapsed_s:,.0f} MB/s, {left_s:,.0f} s left",
            file=sys.stderr,
            flush=True,
        )


def id_range(dataset: IndexedDataset) -> tuple[int | None, int | None]:
    """The smallest and the largest id in the file, or None for both where it has no tokens."""
    num_stored = dataset.bin_path.stat().st_size // dataset.dtype.itemsize
    ends = []
    for first in range(0, num_stored, IDS_PER_READ):
        ids = dataset.read_at(first * dataset.dtype.itemsize, min(IDS_PER_READ, num_stored - first))
        ends.append((int(ids.min()), int(ids.max())))
    return (min(low for low, _ in ends), max(high for _, high in ends)) if ends else (None, None)


def as_text(found: dict[str, Any]) -> str:
    """The same for a reader, with a bar for each row of the histogram."""
    lines = [
        f"{found['prefix']}: {found['documents']:,} documents, {found['sequences']:,} sequences, {found['tokens']:,} "
        f"tokens of {found['dtype']}, ids {found['smallest_id']} to {found['largest_id']}",
        "tokens of a document:",
    ]
    most = max((row["documents"] for row in found["document_lengths"]), default=1)
    for row in found["document_lengths"]:
        bar = "#" * round(40 * row["documents"] / most)
        lines.append(f"  {row['from']:>10,} to {row['to']:<10,} {row['documents']:>12,} {bar}")
    if "verified" in found:
        lines.append(_verified_as_text(found["verified"]))
    lines.append(f"document {found['document']} begins: {' '.join(map(str, found['first_tokens']))}")
    if "text" in found:
        lines.append(found["text"])
    if "sample" in found:
        lines += _sample_as_text(found["sample"])
    return "\n".join(lines)


def _verified_as_text(facts: dict[str, Any]) -> str:
    parts = [f"all {facts['tokens']:,} tokens were read: {facts['empty_documents']:,} documents are empty"]
    if facts["eod_ended"] is not None:
        parts.append(f"{facts['eod_ended']:,} end with the token {facts['eod_token']}")
        parts.append(f"which stands in {facts['eod_inside']:,} other places")
    if facts["outside"] is not None:
        parts.append(f"{facts['outside']:,} ids are outside the vocabulary")
    return ", ".join(parts) + f"; {len(facts['problems'])} problems"


def _sample_as_text(sample: dict[str, Any]) -> list[str]:
    lines = [f"sample {sample['number']} of {sample['of']}, of {sample['per_epoch']:,} in an epoch:"]
    for part in sample["parts"]:
        last = part["first"] + part["count"] - 1
        lines.append(f"--- document {part['document']}, tokens {part['first']} to {last} of {part['num_tokens']}")
        lines.append(part.get("text", " ".join(map(str, part["tokens"]))))
    return lines


def run(args: argparse.Namespace, draw: Callable[..., None] | None, show: Callable[..., dict[str, Any]] | None) -> None:
    """Print what there is to show.

    Raises: as `inspect`, and DataError for what --verify found.
    """
    check(args)
    found = inspect(args, draw=draw, show=show)
    print(json.dumps(found) if args.json else as_text(found))
    if problems := found.get("verified", {}).get("problems"):
        raise DataError("\n".join(problems))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    args = parser().parse_args(argv)
    draw = show = None
    if args.histogram is not None:
        from megatron3d.data.length_picture import draw_length_histogram as draw
    if args.sample is not None:
        from megatron3d.data.shown_sample import shown_sample as show
    return run_command(lambda: run(args, draw, show))


if __name__ == "__main__":
    sys.exit(main())
