"""Verify a checkpoint, or all of a --save directory: exit code 0 if everything is whole, 4 if anything is not.

    python tools/verify_checkpoint.py out/gpt                      # the latest, every byte of it
    python tools/verify_checkpoint.py out/gpt --all --level headers
    python tools/verify_checkpoint.py out/gpt/iter_0000020

A line for each checkpoint that is whole and a sentence for each problem go to standard output, progress to standard
error. Nothing is changed. See docs/checkpoint.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron3d.config.tool_parser import ToolParser
from megatron3d.errors import CheckpointError, ConfigError, Megatron3dError

_PROGRESS_INTERVAL_S = 2.0
_CHECKED = {
    "sizes": "sizes and index agree",
    "headers": "sizes, headers and index agree",
    "full": "every byte agrees with its checksum",
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = ToolParser(description="Verify checkpoints; exit code 0 if whole, 4 if not.")
    p.add_argument("directory", type=Path, metavar="DIR", help="directory of checkpoints (its latest), or one of them")
    p.add_argument("--ckpt-step", type=int, metavar="N", help="the checkpoint of this step instead of the latest")
    p.add_argument("--all", action="store_true", help="every checkpoint in DIR, and what `latest` names")
    p.add_argument(
        "--level",
        choices=tuple(_CHECKED),
        default="full",
        help="sizes: lengths of files, and the index; headers: also what each file says it holds; full (default): "
        "also every byte",
    )
    return p


if __name__ == "__main__":
    parser().parse_args()  # --help and mistakes of spelling are answered before the imports below, which take seconds

from megatron3d.checkpoint.directory import (
    Level,
    find_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    unfinished_directories,
    verify,
)
from megatron3d.checkpoint.index import Index, parse_index


class ProgressLines:
    """Prints how much of a checkpoint was read, and how fast, every few seconds."""

    def __init__(self, name: str, total_bytes: int) -> None:
        """Begin at nothing."""
        self._name, self._total_bytes = name, total_bytes
        self._start_s = self._next_s = time.monotonic()
        self._next_s += _PROGRESS_INTERVAL_S
        self.done_bytes = 0

    def __call__(self, count: int) -> None:
        """Count more bytes, and print where it is time to."""
        self.done_bytes += count
        if time.monotonic() < self._next_s:
            return
        self._next_s = time.monotonic() + _PROGRESS_INTERVAL_S
        share = self.done_bytes / max(1, self._total_bytes)
        print(f"{self._name}: {share:.1%} of {_size(self._total_bytes)}, {self.rate()}", file=sys.stderr, flush=True)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._start_s

    def rate(self) -> str:
        """Bytes a second so far."""
        return f"{_size(self.done_bytes / max(self.elapsed_s, 1e-9))}/s"


def verify_one(directory: Path, level: Level) -> list[str]:
    """Verify one checkpoint and report whether it is complete; returns what is wrong with it."""
    try:
        index = parse_index(directory)
    except CheckpointError as error:
        return [str(error)]
    progress = ProgressLines(directory.name, _total_bytes(index))
    problems = verify(directory, level, on_bytes=progress)
    if not problems:
        num_boxes = sum(len(tensor.boxes) for tensor in index.tensors.values())
        read = f" ({progress.elapsed_s:.1f} s, {progress.rate()})" if level == "full" else ""
        print(
            f"{directory} is whole: step {index.step}, {len(index.tensors)} tensors in {num_boxes} boxes of "
            f"{len(index.files)} files, {len(index.documents)} documents, {_size(_total_bytes(index))}; "
            f"{_CHECKED[level]}{read}",
            flush=True,
        )
    return problems


def verify_all(root: Path, level: Level) -> list[str]:
    """Verify every checkpoint in `root` and what `latest` names; returns what is wrong.

    Raises:
        CheckpointError: there is none.
    """
    checkpoints, unfinished = list_checkpoints(root), unfinished_directories(root)
    if not checkpoints and not unfinished:
        find_checkpoint(root)  # raises with what is there instead
    problems = [f"{path} is not a checkpoint: it has no index.json; remove it, or copy it again" for path in unfinished]
    try:
        if latest_checkpoint(root) is None:
            problems.append(f"{root} has no file named latest, so no run resumes from it; name a step with --ckpt-step")
    except CheckpointError as error:
        problems.append(str(error))
    for checkpoint in checkpoints:
        problems += verify_one(checkpoint, level)
    return problems


def run(args: argparse.Namespace) -> int:
    """Verify what is asked for, print what is wrong, and return the exit code.

    Raises:
        ConfigError: the options exclude each other.
        CheckpointError: there is no checkpoint.
    """
    if args.all and args.ckpt_step is not None:
        raise ConfigError(f"--all and --ckpt-step {args.ckpt_step} exclude each other; give one of them")
    if args.all:
        problems = verify_all(args.directory, args.level)
    else:
        problems = verify_one(find_checkpoint(args.directory, args.ckpt_step), args.level)
    for problem in problems:
        print(problem)
    return CheckpointError.exit_code if problems else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    try:
        return run(parser().parse_args(argv))
    except Megatron3dError as error:
        # The sentences of the library name the option that other programs take the directory by.
        print(f"error: {str(error).replace('--load ', '', 1)}", file=sys.stderr)
        return error.exit_code


def _total_bytes(index: Index) -> int:
    return sum(index.files.values()) + sum(document.size_bytes for document in index.documents.values())


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} GB"


if __name__ == "__main__":
    sys.exit(main())
