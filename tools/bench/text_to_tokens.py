"""Text to token files, beside the libraries that find the ids: MB of text a second, on the same texts and cores.

    python -m tools.bench.text_to_tokens --vocab-file vocab.json --merge-file merges.txt [--corpora DIR] [--workers 2]

The texts are those of the corpora in a folder (`.jsonl`, `.jsonl.gz`; the key `text`) and of the files of the installed
packages, each once, in an order drawn from a seed. This project runs as users run it, from the file to the token files;
a library has the texts in memory before its time begins, and keeps the ids as it gives them. Fast ones have more text
than slow ones, so that each takes seconds. Competitors take turns, and ratios are made within a round. Seconds of a
processor are those of all processes together: on a machine that others use too they are the better measure.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import re
import resource
import site
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from megatron3d.config.tool_parser import ToolParser
from tools.bench.peers.encoders import MODES
from tools.bench.rounds import TurnFailed, speed_ratio, take_turns
from tools.bench.tables import Table, processor_name, write_tables

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ("what", "MB", "MB/s", "megatron3d to it", "MB per second of a processor", "megatron3d to it")
ENDINGS = (".py", ".pyi", ".md", ".rst", ".txt", ".h", ".hpp", ".cuh", ".c", ".cpp", ".js", ".html")
MOST_CHARACTERS = 2_000_000  # of a file; larger ones are data
OURS = "megatron3d, file to token files"


@dataclass(frozen=True)
class Corpus:
    """A file of JSON lines and the bytes of its texts."""

    path: Path
    megabytes: float


def texts_of(corpora: Path | None, seed: int) -> Iterator[str]:
    """The texts of the corpora, then those of installed packages in an order of their own."""
    for path in sorted(corpora.rglob("*.jsonl*")) if corpora else []:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as lines:
            yield from (json.loads(line)["text"] for line in lines)
    found = (path for root in site.getsitepackages() for path in Path(root).rglob("*") if path.suffix in ENDINGS)
    files = sorted(found)
    random.Random(seed).shuffle(files)
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if len(text) <= MOST_CHARACTERS:
            yield text


def write_corpora(directory: Path, corpora: Path | None, sizes: Sequence[float], seed: int) -> list[Corpus]:
    """A corpus of each size in MB, of the same shuffled texts, each text once."""
    seen, lines, total = set(), [], 0
    for text in texts_of(corpora, seed):
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if text and digest not in seen:
            seen.add(digest)
            lines.append((len(text.encode()), json.dumps({"text": text}, ensure_ascii=False)))
            total += lines[-1][0]
        if total >= max(sizes) * 1e6:
            break
    random.Random(seed).shuffle(lines)
    found = []
    for number, size in enumerate(sizes):
        path, written = directory / f"corpus{number}.jsonl", 0
        with open(path, "w", encoding="utf-8") as file:
            for num_bytes, line in lines:
                if written >= size * 1e6:
                    break
                file.write(line + "\n")
                written += num_bytes
        found.append(Corpus(path, written / 1e6))
    return found


def ours_s(corpus: Corpus, encoder: str, args: argparse.Namespace) -> tuple[float, float]:
    """Seconds of `tools/preprocess_data.py` from start to end, and of the processor. Raises: TurnFailed."""
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", str(corpus.path)]
    command += ["--output-prefix", str(corpus.path.with_suffix("")), "--append-eod", "--encoder", encoder]
    command += [
        "--tokenizer-type",
        "GPT2BPETokenizer",
        "--vocab-file",
        args.vocab_file,
        "--merge-file",
        args.merge_file,
    ]
    began_s, cpu_s = time.perf_counter(), _children_s()
    _output_of([*command, "--workers", str(args.workers), "--log-interval", "1000000000"], OURS)
    return time.perf_counter() - began_s, _children_s() - cpu_s


def library_s(corpus: Corpus, mode: str, args: argparse.Namespace) -> tuple[float, float]:
    """Seconds in which a library finds the ids of texts in memory, and of the processor. Raises: TurnFailed."""
    command = [sys.executable, "-m", "tools.bench.peers.encoders", mode, str(corpus.path), str(args.workers)]
    said = _output_of([*command, args.vocab_file, args.merge_file], mode)
    found = re.search(r"^seconds (\S+) (\S+)$", said, re.MULTILINE)
    if found is None:
        raise TurnFailed(f"{mode} printed no seconds: {said[-200:]}")
    return float(found.group(1)), float(found.group(2))


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _output_of(command: list[str], name: str) -> str:
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        raise TurnFailed(f"{name}: exit code {ran.returncode}: {ran.stderr.strip()[-300:]}")
    return ran.stdout


def measure(table: Table, corpus: Corpus, encoder: str, library: str, args: argparse.Namespace) -> None:
    """Add the rows of this project with one encoder, and of the libraries that have as much text."""
    name = f"{OURS} (--encoder {encoder})"
    turns = {name: partial(ours_s, corpus, encoder, args)}
    modes = [mode for mode, speed in MODES.items() if speed == library]
    turns |= {mode: partial(library_s, corpus, mode, args) for mode in modes}
    cpu_s: dict[str, list[float]] = {what: [] for what in turns}

    def turn(what: str) -> float:
        wall_s, used_s = turns[what]()
        cpu_s[what].append(used_s)
        return wall_s

    seconds, failures = take_turns({what: partial(turn, what) for what in turns}, args.rounds)
    for what in seconds:
        cells = []
        for times in (seconds, cpu_s):
            ratio = str(speed_ratio(times[name], times[what])) if what != name and name in seconds else ""
            cells += [f"{corpus.megabytes / median(times[what]):.1f}", ratio]
        table.rows.append((what, f"{corpus.megabytes:.0f}", *cells))
    table.notes.extend(f"left out: {failure}" for failure in failures)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = ToolParser(description="Compare text to tokens with the libraries that find the ids.")
    p.add_argument("--vocab-file", required=True, metavar="FILE", help="GPT-2's vocab.json")
    p.add_argument("--merge-file", required=True, metavar="FILE", help="GPT-2's merges.txt")
    p.add_argument("--corpora", type=Path, metavar="DIR", help="folder of .jsonl and .jsonl.gz files")
    p.add_argument("--megabytes", type=float, default=300, metavar="MB", help="of text for gigatoken (default 300)")
    p.add_argument("--megabytes-slow", type=float, default=20, metavar="MB", help="of text for others (default 20)")
    p.add_argument("--workers", type=int, default=2, metavar="N", help="processes or threads of each (default 2)")
    p.add_argument("--rounds", type=int, default=3, metavar="N", help="turns of each (default 3)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the order of the texts")
    p.add_argument("--write", type=Path, metavar="PAGE", help="replace the table `text-to-tokens` of this page")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison and print its table."""
    args = parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        corpora = write_corpora(Path(directory), args.corpora, (args.megabytes, args.megabytes_slow), args.seed)
        caption = (
            f"GPT-2's BPE, {args.workers} processes or threads of each, {processor_name()}: medians of {args.rounds} "
            "rounds, and ratios with the lowest and highest."
        )
        table = Table("text-to-tokens", caption, COLUMNS)
        measure(table, corpora[0], "gigatoken", "fast", args)
        measure(table, corpora[1], "reference", "slow", args)
    print(table)
    if args.write:
        write_tables(args.write, [table])
    return 0


if __name__ == "__main__":
    sys.exit(main())
