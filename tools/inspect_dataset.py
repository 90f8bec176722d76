"""Show what is in a token file: counts, lengths, and the text of its beginning if a tokenizer is given.

    python tools/inspect_dataset.py my_text_document --tokenizer-type GPT2BPETokenizer \
        --vocab-file vocab.json --merge-file merges.txt
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron3d.config.tool_parser import ToolParser
from megatron3d.data.indexed import IndexedDataset
from megatron3d.data.tiktoken_file import add_tiktoken_arguments, tiktoken_from_arguments
from megatron3d.data.tokenizer import TOKENIZER_TYPES, TokenizerSpec
from megatron3d.errors import DataError, Megatron3dError

IDS_PER_READ = 1 << 22


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = ToolParser(description="Show what is in a token file.")
    p.add_argument("prefix", help="prefix of the .bin/.idx pair")
    p.add_argument("--document", type=int, default=0, metavar="I", help="which document to show (default 0)")
    p.add_argument("--num-tokens", type=int, default=64, metavar="N", help="tokens of it to show (default 64)")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    tokenizer = p.add_argument_group("tokenizer, to show the tokens as text and to check the ids")
    tokenizer.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES)
    tokenizer.add_argument("--vocab-file", metavar="FILE")
    tokenizer.add_argument("--merge-file", metavar="FILE")
    tokenizer.add_argument("--tokenizer-model", metavar="PATH")
    tokenizer.add_argument("--vocab-size", type=int, metavar="N")
    add_tiktoken_arguments(tokenizer)
    return p


def length_histogram(dataset: IndexedDataset) -> list[dict[str, int]]:
    """How many documents have 0, 1, 2-3, 4-7, ... tokens; rows without documents at either end are left out."""
    sums = np.concatenate([[0], np.cumsum(dataset.lengths, dtype=np.int64)])
    lengths = np.diff(sums[dataset.document_bounds])
    # frexp gives the exponent e with 2**(e-1) <= x < 2**e exactly, and 0 for 0
    exponents = np.frexp(lengths.astype(np.float64))[1]
    counts = np.bincount(exponents)
    first = int(exponents.min()) if len(exponents) else 0
    return [
        {"from": 1 << (e - 1) if e else 0, "to": (1 << e) - 1, "documents": int(counts[e])}
        for e in range(first, len(counts))
    ]


def inspect(args: argparse.Namespace) -> dict[str, Any]:
    """All there is to show, as plain values.

    Raises: DataError if the files are damaged, the document does not exist, or an id is outside the vocabulary.
    """
    dataset = IndexedDataset(args.prefix)
    if not 0 <= args.document < max(1, dataset.num_documents):
        raise DataError(
            f"--document {args.document} does not exist: {args.prefix} has 0 to {dataset.num_documents - 1}."
        )
    tokens = dataset.document(args.document)[: args.num_tokens].tolist() if dataset.num_documents else []
    smallest, largest = id_range(dataset)
    found: dict[str, Any] = {
        "prefix": args.prefix,
        "dtype": dataset.dtype.name,
        "documents": dataset.num_documents,
        "sequences": len(dataset),
        "tokens": dataset.num_tokens,
        "smallest_id": smallest,
        "largest_id": largest,
        "document_lengths": length_histogram(dataset),
        "document": args.document,
        "first_tokens": tokens,
    }
    if args.tokenizer_type:
        files = (args.vocab_file, args.merge_file, args.tokenizer_model)
        tiktoken = tiktoken_from_arguments(args)
        tokenizer = TokenizerSpec(args.tokenizer_type, *files, vocab_size=args.vocab_size, tiktoken=tiktoken).build()
        if smallest is not None and largest is not None and not 0 <= smallest <= largest < tokenizer.vocab_size:
            raise DataError(
                f"{dataset.bin_path} has ids from {smallest} to {largest}, but "
                f"{args.tokenizer_type} has {tokenizer.vocab_size}; this is another tokenizer's data."
            )
        found["text"] = tokenizer.decode(tokens)
    return found


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
    lines.append(f"document {found['document']} begins: {' '.join(map(str, found['first_tokens']))}")
    if "text" in found:
        lines.append(found["text"])
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    args = parser().parse_args(argv)
    try:
        found = inspect(args)
    except Megatron3dError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(found) if args.json else as_text(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
