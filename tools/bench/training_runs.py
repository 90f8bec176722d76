"""Training runs of several models on one corpus, each from several seeds, which resume where they were interrupted.

What the comparisons `compare_experts` and `compare_data_efficiency` share: the corpus, the runs, and their held-out
losses.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron3d.config.tool_parser import ToolParser
from megatron3d.data.prepare.corpus import iterate_texts
from megatron3d.data.prepare.inputs import find_inputs
from megatron3d.errors import ConfigError, DataError
from megatron3d.train.metrics import read_records

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Contender:
    """A model by its name, how it is described, and the options that it has beside those that all share."""

    name: str
    description: str
    options: str


@dataclass(frozen=True)
class Run:
    """The training run of a contender with one seed, in its directory.

    Attributes:
        contender: what is trained.
        seed: of weights and order alike.
        num_steps: until its end; a longer run continues a shorter one.
        directory: of its checkpoint, metrics and log.
        common: the options that all contenders share.
        interval: steps from one evaluation (and checkpoint) to the next.
    """

    contender: Contender
    seed: int
    num_steps: int
    directory: Path
    common: str
    interval: int

    @property
    def metrics(self) -> Path:
        """Its metrics file."""
        return self.directory / "metrics.jsonl"

    def command(self, data: Path) -> list[str]:
        """The options of pretrain_gpt.py; the same again, or for more steps, go on where it stopped."""
        intervals = f"--eval-interval {self.interval} --save-interval {self.interval}"
        own = f"--seed {self.seed} --train-iters {self.num_steps} {intervals}"
        words = f"{self.common} {self.contender.options} {own} --eval-iters 16 --keep-last 1".split()
        paths = {"--save": self.directory / "checkpoint", "--metrics-file": self.metrics, "--data-path": data}
        return [*words, *(word for name, path in paths.items() for word in (name, str(path)))]

    def losses(self) -> list[tuple[int, float]]:
        """(step, held-out loss of the tokens) of each evaluation so far, up to the last step."""
        records = read_records(self.metrics) if self.metrics.exists() else []
        # Only a model of several losses has them by name.
        found = [(r["step"], r.get("valid_lm_loss", r["valid_loss"])) for r in records if "valid_loss" in r]
        return [(step, loss) for step, loss in found if loss is not None and step <= self.num_steps]


def comparison_parser(description: str, output: Path, page: str) -> argparse.ArgumentParser:
    """The options that all comparisons have; `page` is where --write puts the table."""
    p = ToolParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--input", nargs="+", metavar="FILE", help="a corpus as preprocess_data.py reads it")
    p.add_argument("--tokens", type=int, default=1_000_000, help="of a run (default 1,000,000)")
    p.add_argument("--seeds", type=int, default=3, help="runs of each kind (default 3)")
    p.add_argument("--output", type=Path, default=output, help="where runs go")
    p.add_argument("--write", action="store_true", help=f"replace the table of {page} and its pictures")
    return p


def steps_of(args: argparse.Namespace, tokens_per_step: int, interval: int) -> int:
    """The steps of a run of --tokens, a multiple of `interval`. Raises: ConfigError if nothing is left to train."""
    num_steps = args.tokens // (tokens_per_step * interval) * interval
    if num_steps < 1 or args.seeds < 1:
        raise ConfigError(
            f"--tokens {args.tokens} and --seeds {args.seeds} leave nothing to train; give at least one seed and "
            f"{tokens_per_step * interval} tokens, after which the first evaluation is"
        )
    return num_steps


def tokenized(inputs: Sequence[str] | None, directory: Path, vocab_size: int) -> Path:
    """The prefix of the tokenized corpus, which is made unless it is there; without `inputs` the text is what every
    Python installation carries."""
    prefix = directory / "corpus"
    done = directory / "done"
    if done.exists():
        return directory / "corpus_text_document"
    directory.mkdir(parents=True, exist_ok=True)
    text = directory / "corpus.jsonl"
    if inputs is None:
        run_tool("quickstart_corpus.py", "--output", text)
    else:
        write_shuffled(inputs, text)
    run_tool("train_tokenizer.py", "--input", text, "--output-dir", directory, "--vocab-size", vocab_size)
    files = ("--vocab-file", directory / "vocab.json", "--merge-file", directory / "merges.txt", "--append-eod")
    run_tool(
        "preprocess_data.py", "--input", text, "--output-prefix", prefix, "--tokenizer-type", "GPT2BPETokenizer", *files
    )
    done.touch()
    return directory / "corpus_text_document"


def write_shuffled(inputs: Sequence[str], path: Path) -> None:
    """All documents in the order of their hashes, so that the held-out ones are a fair sample."""
    texts = iterate_texts(find_inputs(inputs, note=print), "text")
    ordered = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in ordered)


def run_tool(name: str, *words: object) -> None:
    """Run a tool of this project, which prints its own progress.

    Raises: DataError if it fails; it has printed why.
    """
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, words)]
    code = subprocess.run(command, check=False).returncode
    if code:
        raise DataError(f"tools/{name} ended with exit code {code}; its message is above")


def finish(run: Run, data: Path) -> None:
    """Train a run to its end, or from its last checkpoint, unless it is finished.

    Raises: DataError if it ends before.
    """
    run.directory.mkdir(parents=True, exist_ok=True)
    log = run.directory / "log.txt"
    if run.losses()[-1:] and run.losses()[-1][0] == run.num_steps:
        return
    command = [sys.executable, str(ROOT / "pretrain_gpt.py"), *run.command(data)]
    with log.open("a", encoding="utf-8") as file:
        code = subprocess.run(command, check=False, stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        raise DataError(
            f"{run.contender.name} of seed {run.seed} ended with exit code {code}; {log} says why, and the same "
            "command goes on where it stopped"
        )
    print(f"{run.contender.name}, seed {run.seed}: held-out loss {run.losses()[-1][1]:.4f}", flush=True)
