"""Training in fp8 against bf16: losses of one small model on one corpus, in a minute of a CPU.

    python -m tools.bench.compare_fp8 --input books.jsonl.gz wikipedia.jsonl.gz    train all, print the table
    python -m tools.bench.compare_fp8 --input ... --write                          put it into docs/fp8.md too
    python -m tools.bench.compare_fp8 --steps 40                                   on the standard library's sources

All runs see the same tokens in the same order from the same weights, and differ in the precision of their linear layers
alone. One more run in bf16 has a learning rate that is 0.2 % higher: its losses say how far apart two runs come that
nobody would tell apart. The casts and products are those of a GPU but for the order of fp32 sums, so the losses say
what a GPU's would; the times say nothing, since a CPU has no fp8. Without --input the text is what every Python
installation carries.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.config.check import resolve
from megatron3d.config.cli import parse_args
from megatron3d.config.run import RunConfig
from megatron3d.config.tool_parser import ToolParser
from megatron3d.data.build import GPTData, build_data
from megatron3d.data.loader import GlobalBatches
from megatron3d.models.zoo import architecture_of
from megatron3d.process.command import run_command
from megatron3d.train.setup import build_parts
from megatron3d.train.step import Rates, train_step
from tools.bench.tables import Table, write_tables
from tools.bench.training_runs import ROOT, tokenized

PAGE = ROOT / "docs" / "fp8.md"
VOCAB_SIZE, BATCH, LR, WARMUP, WEIGHT_DECAY = 1024, 8, 1e-3, 20, 0.1
LAST = 20  # steps whose training losses are averaged
COMMON = (
    "--num-layers 2 --hidden-size 128 --ffn-hidden-size 256 --num-attention-heads 2 --position-embedding-type rope "
    "--normalization RMSNorm --swiglu --disable-bias-linear --bf16 --hidden-dropout 0 --attention-dropout 0 "
    f"--weight-decay {WEIGHT_DECAY} --adam-beta2 0.95 --clip-grad 1 --split 97,3,0 --num-workers 0 --eval-iters 0 "
    f"--device cpu --seq-length 64 --vocab-size {VOCAB_SIZE} --micro-batch-size {BATCH} --global-batch-size {BATCH} "
    f"--lr {LR}"
)
COLUMNS = ("run", f"training loss, mean of the last {LAST} steps", "from bf16")


@dataclass(frozen=True)
class Contender:
    """A run by its name, the options that it has beside the common ones, and what its learning rate is times theirs."""

    name: str
    options: str
    rate: float = 1.0


BF16, *OTHERS = CONTENDERS = (
    Contender("bf16", ""),
    Contender("bf16, learning rate 0.2 % higher", "", 1.002),
    Contender("--fp8-format hybrid", "--fp8-format hybrid"),
    Contender("--fp8-format e4m3", "--fp8-format e4m3"),
    Contender("--fp8-format e4m3 --fp8-recipe blockwise", "--fp8-format e4m3 --fp8-recipe blockwise"),
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--input", nargs="+", metavar="FILE", help="a corpus as preprocess_data.py reads it")
    p.add_argument("--steps", type=int, default=200, help="of each run (default 200)")
    p.add_argument("--output", type=Path, default=ROOT / "out" / "fp8", help="where the tokenized corpus goes")
    p.add_argument("--write", action="store_true", help="replace the table of docs/fp8.md")
    return p


def main(arguments: Sequence[str]) -> None:
    """Train all, print, and write the page where asked.

    Raises: DataError if the corpus cannot be read.
    """
    args = parser().parse_args(arguments)
    torch.set_num_threads(1)
    data = tokenized(args.input, args.output / "data", VOCAB_SIZE)
    table = table_of({one.name: losses(one, data, args.steps) for one in CONTENDERS}, args.steps)
    print(table)
    if args.write:
        write_tables(PAGE, [table])


def config_of(contender: Contender, data: str) -> RunConfig:
    """The resolved run; `data` are the options of its corpus and of its length."""
    words = f"{COMMON} {contender.options} {data}".split()
    return resolve(parse_args(words, program="compare_fp8", description="", log=lambda line: None), 1)


def losses(contender: Contender, data: Path, num_steps: int) -> list[float]:
    """The training loss of every step."""
    config = config_of(contender, f"--data-path {data} --train-iters {num_steps}")
    builder = architecture_of(config.model).build_stage
    parts = build_parts(config, make_mesh(Layout()), torch.device("cpu"), builder)
    corpus = build_data(config.data, config.model, tokenizer=None, eod_token=0)
    assert isinstance(corpus, GPTData) and corpus.train is not None, f"{data} has no tokens to train on"
    found = []
    with GlobalBatches(corpus.reader(corpus.train), num_workers=0) as batches:
        for step in range(num_steps):
            rates = Rates(lr=contender.rate * LR * min(1.0, (step + 1) / WARMUP), weight_decay=WEIGHT_DECAY)
            found.append(train_step(parts, batches.read(step * BATCH, BATCH, 0, 1), rates, step=step).loss)
    print(f"{contender.name}: {found[-1]:.4f} at step {num_steps}", flush=True)
    return found


def table_of(found: dict[str, list[float]], num_steps: int) -> Table:
    """The last losses of each contender."""
    caption = f"2 layers, hidden 128, sequence 64, {BATCH} samples a step, {num_steps} steps."
    table = Table("fp8", caption, COLUMNS)
    last = {name: statistics.mean(losses[-LAST:]) for name, losses in found.items()}
    for name, loss in last.items():
        off = "" if name == BF16.name else f"{100 * (loss / last[BF16.name] - 1):+.2f} %"
        table.rows.append((f"`{name}`" if name.startswith("--") else name, f"{loss:.4f}", off))
    return table


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
