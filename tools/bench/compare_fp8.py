"""Training in fp8 against bf16: losses of one model on one corpus, from one command that resumes.

    python -m tools.bench.compare_fp8 --input books.jsonl.gz wikipedia.jsonl.gz    train all, print the table
    python -m tools.bench.compare_fp8 --input ... --write                          put it into docs/fp8.md too

All runs see the same tokens in the same order from the same weights, and differ in the precision of their linear layers
alone. The casts and their products are those of a GPU but for the order of fp32 sums, so the losses say what a GPU's
would; the times say nothing, since a CPU has no fp8. What is done is not repeated: a run that was interrupted resumes
from its last checkpoint. Without --input the text is what every Python installation carries.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence

from megatron3d.process.command import run_command
from megatron3d.train.metrics import read_records
from tools.bench.tables import Table, write_tables
from tools.bench.training_runs import ROOT, Contender, Run, comparison_parser, finish, steps_of, tokenized

PAGE = ROOT / "docs" / "fp8.md"
VOCAB_SIZE, SEQ_LENGTH, GLOBAL_BATCH = 1024, 128, 8
INTERVAL = 50  # steps from one evaluation to the next
LAST = 20  # steps whose training losses are averaged
COMMON = (
    "--num-layers 4 --hidden-size 256 --ffn-hidden-size 768 --num-attention-heads 4 --position-embedding-type rope "
    "--normalization RMSNorm --swiglu --disable-bias-linear --bf16 --lr 6e-4 "
    "--hidden-dropout 0 --attention-dropout 0 --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1 --split 97,3,0 "
    "--lr-decay-style constant --lr-decay-iters 1000000 --lr-warmup-iters 20 --log-interval 50 --num-workers 0 "
    f"--device cpu --seq-length {SEQ_LENGTH} --vocab-size {VOCAB_SIZE} --micro-batch-size {GLOBAL_BATCH} "
    f"--global-batch-size {GLOBAL_BATCH}"
)
BF16, *IN_FP8 = CONTENDERS = (
    Contender("bf16", "no fp8", ""),
    Contender("tensorwise", "--fp8-format hybrid", "--fp8-format hybrid"),
    Contender("blockwise", "--fp8-format e4m3 --fp8-recipe blockwise", "--fp8-format e4m3 --fp8-recipe blockwise"),
)
COLUMNS = ("run", "options", f"training loss, mean of the last {LAST} steps", "held-out loss", "from bf16")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = comparison_parser(__doc__ or "", ROOT / "out" / "fp8", "docs/fp8.md")
    p.set_defaults(tokens=200 * GLOBAL_BATCH * SEQ_LENGTH, seeds=1)
    return p


def main(arguments: Sequence[str]) -> None:
    """Train what is not trained yet, print, and write the page where asked.

    Raises:
        ConfigError: a number is not above 0.
        DataError: the corpus cannot be read, or a run ended before its last step.
    """
    args = parser().parse_args(arguments)
    num_steps = steps_of(args, GLOBAL_BATCH * SEQ_LENGTH, INTERVAL)
    data = tokenized(args.input, args.output / "data", VOCAB_SIZE)
    runs = [
        Run(contender, seed, num_steps, args.output / f"{contender.name}-{seed}", COMMON, INTERVAL)
        for seed in range(1, args.seeds + 1)
        for contender in CONTENDERS
    ]
    for run in runs:
        finish(run, data)
    table = table_of(runs, num_steps)
    print(table)
    if args.write:
        write_tables(PAGE, [table])


def table_of(runs: Sequence[Run], num_steps: int) -> Table:
    """The last losses of each contender, means over the seeds."""
    seeds = len({run.seed for run in runs})
    of_seeds = f"means of {seeds} seeds" if seeds > 1 else "one seed"
    caption = (
        f"4 layers, hidden 256, sequence {SEQ_LENGTH}, {GLOBAL_BATCH} samples a step, {num_steps} steps, {of_seeds}."
    )
    table = Table("fp8", caption, COLUMNS)
    held_out = {
        one.name: statistics.mean(run.losses()[-1][1] for run in runs if run.contender is one) for one in CONTENDERS
    }
    for one in CONTENDERS:
        training = statistics.mean(training_loss(run) for run in runs if run.contender is one)
        off = 100 * (held_out[one.name] / held_out[BF16.name] - 1)
        shown = "" if one is BF16 else f"{off:+.2f} %"
        table.rows.append((one.name, one.description, f"{training:.4f}", f"{held_out[one.name]:.4f}", shown))
    return table


def training_loss(run: Run) -> float:
    """The mean of the last steps' losses."""
    found = {r["step"]: r["loss"] for r in read_records(run.metrics) if r.get("loss") is not None}
    return statistics.mean(found[step] for step in sorted(found)[-LAST:])


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
