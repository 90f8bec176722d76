"""Train a tokenizer on a text corpus: a byte-level BPE for a GPT, word pieces for a BERT.

    python tools/train_tokenizer.py --input corpus.jsonl --vocab-size 8192 --output-dir tokenizer

writes tokenizer/tokenizer.json (for --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer) and
vocab.json with merges.txt (for --tokenizer-type GPT2BPETokenizer).

    python tools/train_tokenizer.py --kind word-pieces --input corpus.jsonl --vocab-size 8192 --output-dir tokenizer

writes tokenizer/vocab.txt (for --tokenizer-type BertWordPieceLowerCase, or with --keep-case BertWordPieceCase). The
work is done in megatron3d/data/prepare/train_bpe.py and train_word_pieces.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron3d.config.tool_parser import ToolParser
from megatron3d.data.prepare.inputs import INPUT_HELP, STANDARD_INPUT, find_inputs
from megatron3d.data.prepare.rejects import add_bad_record_arguments, limits_from_arguments
from megatron3d.data.prepare.train_bpe import train_byte_level_bpe, write_tokenizer
from megatron3d.data.prepare.train_word_pieces import train_word_pieces, write_word_pieces
from megatron3d.errors import ConfigError
from megatron3d.process.command import run_command


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = ToolParser(description="Train a tokenizer.")
    p.add_argument("--kind", choices=("bpe", "word-pieces"), default="bpe", help="byte-level BPE (default), or BERT's")
    p.add_argument("--input", nargs="+", required=True, metavar="FILE", help=INPUT_HELP)
    p.add_argument("--json-key", default="text", metavar="KEY", help="key of the text (default text)")
    p.add_argument("--vocab-size", type=int, required=True, metavar="N", help="ids, special ones counted")
    p.add_argument("--min-frequency", type=int, default=2, metavar="N", help="rarer pairs are not merged (default 2)")
    p.add_argument("--keep-case", action="store_true", help="word pieces with capitals and accents")
    p.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="where the files go")
    add_bad_record_arguments(p.add_argument_group("bad records"))
    return p


def run(args: argparse.Namespace) -> None:
    """Train, write, and print what was written."""
    if args.keep_case and args.kind == "bpe":
        raise ConfigError("--keep-case is for --kind word-pieces; a byte-level BPE always keeps it, so leave it out")
    limits = limits_from_arguments(args)
    start_s = time.monotonic()
    files = find_inputs(args.input, note=note)
    if args.kind == "word-pieces" and STANDARD_INPUT in files:
        raise ConfigError("--input - cannot be used with --kind word-pieces, which reads its input twice; name a file.")
    options: dict[str, Any] = {
        "limits": limits,
        "note": note,
        "vocab_size": args.vocab_size,
        "min_frequency": args.min_frequency,
        "show_progress": sys.stderr.isatty(),
    }
    if args.kind == "bpe":
        tokenizer = train_byte_level_bpe(files, args.json_key, **options)
        written = write_tokenizer(tokenizer, args.output_dir)
    else:
        lower_case = not args.keep_case
        tokenizer = train_word_pieces(files, args.json_key, lower_case=lower_case, **options)
        written = write_word_pieces(tokenizer, args.output_dir, lower_case=lower_case)
    for path in written:
        print(f"wrote {path}")
    size = tokenizer.get_vocab_size()
    fewer = f", fewer than the {args.vocab_size:,} asked for: the corpus has no more pairs" * (size < args.vocab_size)
    print(f"{size:,} ids{fewer}, in {time.monotonic() - start_s:.1f} s")


def note(line: str) -> None:
    """A line for people, beside what is printed as the result."""
    print(line, file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    args = parser().parse_args(argv)
    return run_command(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
