"""Join token files into one, in the order given (or of the names, for a directory).

python tools/merge_datasets.py --input DIR --output-prefix all
python tools/merge_datasets.py --inputs a_text_document b_text_document --output-prefix all
python tools/merge_datasets.py --shards my_text_document --output-prefix my_text_document
"""

from __future__ import annotations

import argparse
import glob
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron3d.config.tool_parser import ToolParser
from megatron3d.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron3d.data.prepare.shard import Shard
from megatron3d.errors import ConfigError, DataError
from megatron3d.process.command import run_command


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = ToolParser(description="Join token files into one.")
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", type=Path, metavar="DIR", help="all .bin/.idx pairs of this directory, by name")
    source.add_argument("--inputs", nargs="+", metavar="PREFIX", help="prefixes of .bin/.idx pairs, in this order")
    source.add_argument("--shards", metavar="PREFIX", help="PREFIX-00000-of-00016 and the others, all of them")
    p.add_argument("--output-prefix", required=True, metavar="P", help="writes P.bin and P.idx")
    return p


def find_prefixes(directory: Path) -> list[str]:
    """The prefixes of all token files in a directory, sorted.

    Raises: DataError if the directory does not exist, has none, or has one file of a pair without the other.
    """
    names = {path.with_suffix("") for path in directory.glob("*") if path.suffix in (".bin", ".idx")}
    if not names:
        raise DataError(f"--input {directory} has no .bin or .idx file; give a directory of token files.")
    return [str(name) for name in sorted(names)]


def find_shards(prefix: str) -> list[str]:
    """The prefixes of the shards of one job of `tools/preprocess_data.py --shard`, in order.

    Raises: DataError if there is none, if one is missing, or if there are those of several jobs.
    """
    names = Path(prefix).parent.glob(f"{glob.escape(Path(prefix).name)}-*-of-*.idx")
    matches = [match for name in names if (match := re.fullmatch(r".*-([0-9]{5,6})-of-([0-9]{5,6})\.idx", name.name))]
    counts = sorted({int(match[2]) for match in matches})
    if not counts:
        raise DataError(f"--shards {prefix}: there is no {prefix}-00000-of-N.idx; name shards without -I-of-N.")
    if len(counts) > 1:
        raise DataError(
            f"--shards {prefix}: there are shards of {' and of '.join(map(str, counts))}; remove those of other runs."
        )
    count, found = counts[0], {int(match[1]) for match in matches}
    missing = [Shard(index, count) for index in range(count) if index not in found]
    if missing:
        raise DataError(
            f"--shards {prefix}: {len(missing)} of {count} shards are not finished, the first of them "
            f"{prefix}{missing[0].suffix}; run tools/preprocess_data.py --shard {missing[0]}."
        )
    return [f"{prefix}{Shard(index, count).suffix}" for index in range(count)]


def distinct_prefixes(prefixes: Sequence[str], *, note: Callable[[str], None]) -> list[str]:
    """The prefixes without those whose files an earlier one names, by another spelling or link too.

    `note` takes a line about each: the result would hold its documents twice.
    """
    found: dict[tuple[object, ...], str] = {}
    for prefix in prefixes:
        files = tuple(_identity(Path(f"{prefix}{ending}")) for ending in (".bin", ".idx"))
        if files in found:
            spelled = f" (as {found[files]})" if found[files] != prefix else ""
            note(f"{prefix} is named already{spelled}; it is merged once, at its first place.")
        found.setdefault(files, prefix)
    return list(found.values())


def _identity(path: Path) -> object:
    """What a file is by any of its names, hard links too; of one that is missing the name."""
    try:
        status = os.stat(path)
    except OSError:
        return path  # missing or out of reach, which opening it reports
    return status.st_dev, status.st_ino


def merge(prefixes: Sequence[str], output_prefix: str) -> IndexedDataset:
    """Write all documents of `prefixes` to `output_prefix` and open the result.

    Raises: DataError if the files are damaged or differ in dtype; ConfigError if the output is among the inputs.
    """
    if Path(output_prefix).resolve() in {Path(prefix).resolve() for prefix in prefixes}:
        raise ConfigError(f"--output-prefix {output_prefix} is one of the inputs; choose another name.")
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    for dataset in datasets:
        if dataset.dtype != datasets[0].dtype:
            raise DataError(
                f"{dataset.prefix} holds {dataset.dtype.name} but {datasets[0].prefix} {datasets[0].dtype.name}: they "
                f"come from different vocabularies; preprocess them with the same tokenizer."
            )
        if dataset.modes is not None:
            raise DataError(f"{dataset.prefix} is multimodal (it has modes); only text can be merged.")
    with IndexedDatasetWriter(output_prefix, datasets[0].dtype) as writer:
        for dataset in datasets:
            writer.add_dataset(dataset)
    return IndexedDataset(output_prefix)


def run(args: argparse.Namespace) -> None:
    """Merge and print what was written."""
    if args.shards is not None:
        named = find_shards(args.shards)
    else:
        named = args.inputs or find_prefixes(args.input)
    prefixes = distinct_prefixes(named, note=print)
    merged = merge(prefixes, args.output_prefix)
    print(
        f"wrote {args.output_prefix}.bin and .idx: {len(prefixes)} inputs, {merged.num_documents:,} documents, "
        f"{merged.num_tokens:,} tokens of {merged.dtype.name}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    args = parser().parse_args(argv)
    return run_command(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
