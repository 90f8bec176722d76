"""Drop the duplicates of a text corpus, exact and near ones, before it is made into token files.

    python tools/deduplicate.py --input 'crawl/*.jsonl.gz' --output clean.jsonl.gz --near 0.8

keeps the first record of each group as it is, and lists what was dropped, with the record that stays and the
similarity, in clean_duplicates.jsonl; bad records are listed in clean_rejects.jsonl. What a duplicate is: see
megatron3d/data/prepare/duplicates.py and docs/data.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron3d.config.tool_parser import ToolParser
from megatron3d.data.prepare.deduplicate import (
    OUTPUT_ENDINGS,
    DeduplicateCounts,
    DeduplicateRequest,
    deduplicate,
    duplicates_path,
    rejects_path,
)
from megatron3d.data.prepare.duplicates import NGRAM_UNITS, NearRule, check_near_rule
from megatron3d.data.prepare.inputs import INPUT_HELP, find_inputs
from megatron3d.data.prepare.rejects import add_bad_record_arguments, limits_from_arguments
from megatron3d.errors import ConfigError
from megatron3d.process.command import run_command

_LINE_EVERY_S = 5.0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    usual = NearRule()
    p = ToolParser(description="Drop the duplicates of a text corpus.")
    data = p.add_argument_group("input and output")
    data.add_argument("--input", nargs="+", required=True, metavar="FILE", help=INPUT_HELP)
    data.add_argument("--output", required=True, metavar="FILE", help=f"a file ending in {', '.join(OUTPUT_ENDINGS)}")
    data.add_argument("--json-key", default="text", metavar="KEY", help="the text that counts (default text)")
    data.add_argument(
        "--keep-columns", nargs="+", default=[], metavar="NAME", help="more columns of .parquet and .arrow to write"
    )
    drop = p.add_argument_group("what is dropped")
    drop.add_argument("--no-exact", action="store_true", help="keep texts that are equal but for white space and NFC")
    drop.add_argument("--near", type=float, metavar="S", help="drop texts of a Jaccard similarity from S on, as 0.8")
    drop.add_argument(
        "--num-perm", type=int, default=usual.num_perm, metavar="N", help="hashes of a text (default 128)"
    )
    drop.add_argument("--ngram", type=int, default=usual.ngram, metavar="N", help="length of the n-grams (default 5)")
    drop.add_argument(
        "--ngram-unit",
        choices=NGRAM_UNITS,
        default=usual.unit,
        help="of what (default words; characters for scripts without blanks between words, with --ngram 10 or so)",
    )
    drop.add_argument("--min-chars", type=int, default=0, metavar="N", help="drop shorter texts (default 0: none)")
    drop.add_argument("--max-chars", type=int, metavar="N", help="drop longer texts")
    add_bad_record_arguments(p.add_argument_group("bad records"))
    return p


def request_from_arguments(args: argparse.Namespace) -> DeduplicateRequest:
    """What the arguments ask for. Raises: ConfigError with what is impossible."""
    near = None
    if args.near is not None:
        near = NearRule(args.near, args.num_perm, args.ngram, args.ngram_unit)
        check_near_rule(near)
    if args.min_chars < 0 or (args.max_chars is not None and args.max_chars < args.min_chars):
        raise ConfigError(
            f"--min-chars {args.min_chars} and --max-chars {args.max_chars} leave no length; give numbers from 0 up, "
            "the second at least the first."
        )
    return DeduplicateRequest(
        args.json_key,
        exact=not args.no_exact,
        near=near,
        min_chars=args.min_chars,
        max_chars=args.max_chars,
        columns=tuple(args.keep_columns),
        limits=limits_from_arguments(args),
    )


class ProgressLines:
    """Prints a line to the error stream every few seconds."""

    def __init__(self) -> None:
        """Begin now."""
        self._last_s = time.monotonic()

    def __call__(self, counts: DeduplicateCounts) -> None:
        """Print what is done, how fast, and the time left."""
        if time.monotonic() - self._last_s < _LINE_EVERY_S:
            return
        self._last_s = time.monotonic()
        parts = [f"{counts.records:,} records", f"{counts.kept:,} kept"]
        parts.append(f"{counts.text_bytes / 1e6 / max(counts.elapsed_s, 1e-9):.2f} MB/s")
        if counts.input_share:
            parts.insert(0, f"{counts.input_share:.1%} of the input")
            parts.append(f"{counts.elapsed_s * (1 / counts.input_share - 1):,.0f} s left")
        print(", ".join(parts), file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> None:
    """Do what the arguments ask and print what was written."""
    request, output = request_from_arguments(args), Path(args.output)
    files = find_inputs(args.input, note=lambda line: print(line, file=sys.stderr))
    done = deduplicate(files, output, request, report=ProgressLines())
    print(f"wrote {output}: {done.kept:,} of {done.records:,} records")
    print(
        f"dropped {done.exact:,} exact and {done.near:,} near duplicates; they are listed in {duplicates_path(output)}"
    )
    if done.short or done.long:
        print(f"dropped {done.short:,} texts that are too short and {done.long:,} that are too long")
    if done.rejected:
        print(f"{done.rejected}; they are listed in {rejects_path(output)}")
    print(f"{done.text_bytes / 1e6:,.1f} MB of text in {done.elapsed_s:.1f} s")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    args = parser().parse_args(argv)
    return run_command(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
