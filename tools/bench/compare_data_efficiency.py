"""What a curriculum and random layerwise token dropping save: tokens and steps to the loss of ordinary training.

    python -m tools.bench.compare_data_efficiency --input books.jsonl.gz speeches.jsonl.gz    train all, print the table
    python -m tools.bench.compare_data_efficiency --input ... --write         put it into docs/data_efficiency.md too
    python -m tools.bench.compare_data_efficiency --tokens 200000 --seeds 1   on the standard library's sources

One model is trained in several ways from several seeds, which are those of weights and order alike: as usual; with the
samples of common words first; with short sequences first; with middle layers that see some of the positions; and with
the first and the last of these together. The rate is constant after a warm-up, so every point of a curve is what a run
of that length gives. What is done is not repeated: a run that was interrupted resumes from its last checkpoint. Without
--input the text is what every Python installation carries.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from megatron3d.config.tool_parser import too_small
from megatron3d.errors import ConfigError
from megatron3d.process.command import run_command
from megatron3d.train.metrics import read_records
from tools.bench.curves import Curve, plot_curves
from tools.bench.tables import Table, write_tables
from tools.bench.training_runs import ROOT, Contender, Run, comparison_parser, finish, run_tool, steps_of, tokenized

PAGE, IMAGES = ROOT / "docs" / "data_efficiency.md", ROOT / "docs" / "images"
VOCAB_SIZE, SEQ_LENGTH, GLOBAL_BATCH, NUM_LAYERS, HIDDEN_SIZE = 1024, 128, 16, 6, 48
INTERVAL = 25  # steps from one evaluation to the next
SPLIT = "97,3,0"
COMMON = (
    f"--num-layers {NUM_LAYERS} --hidden-size {HIDDEN_SIZE} --ffn-hidden-size 128 --num-attention-heads 4 --lr 3e-3 "
    "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
    f"--hidden-dropout 0 --attention-dropout 0 --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1 --split {SPLIT} "
    "--lr-decay-style constant --lr-decay-iters 1000000 --lr-warmup-iters 20 --log-interval 20 --num-workers 0 "
    f"--device cpu --seq-length {SEQ_LENGTH} --vocab-size {VOCAB_SIZE} --micro-batch-size {GLOBAL_BATCH} "
    f"--global-batch-size {GLOBAL_BATCH}"
)
COLUMNS = (
    "training",
    "tokens",
    "operations",
    "held-out loss (lowest to highest)",
    "steps to the last loss of `usual`, seed by seed",
    "tokens to it, mean",
    "operations to it",
)


def contenders(num_steps: int, index: Path) -> tuple[Contender, ...]:
    """The ways to train for `num_steps`, with the metrics in `index`; schedules end at 40 % and 70 % of them."""
    early, late = max(1, round(0.4 * num_steps)), max(1, round(0.7 * num_steps))
    rarity = (
        f"--curriculum-metric rarity --curriculum-index {index} --curriculum-difficulty-type percentile "
        f"--curriculum-min-difficulty 10 --curriculum-pacing fixed_root --curriculum-steps {early}"
    )
    dropping = f"--random-ltd --random-ltd-min {SEQ_LENGTH // 2} --random-ltd-steps {late}"
    return (
        Contender("usual", "as every run", ""),
        Contender(
            "curriculum",
            f"the tenth of the samples with the most common words at first, all from step {early} on (square root)",
            rarity,
        ),
        Contender(
            "short first",
            f"sequences of {SEQ_LENGTH // 4} tokens at first, whole ones from step {early} on (truncation)",
            f"--seq-length-curriculum truncate --seq-length-curriculum-min-difficulty {SEQ_LENGTH // 4} "
            f"--seq-length-curriculum-steps {early}",
        ),
        Contender(
            "random-LTD",
            f"{NUM_LAYERS - 2} of {NUM_LAYERS} layers see half of the positions at first, all from step {late} on",
            dropping,
        ),
        Contender("both", "`curriculum` and `random-LTD`", f"{rarity} {dropping}"),
    )


@dataclass(frozen=True)
class Outcome:
    """What the runs of a contender came to, seed by seed.

    Attributes:
        name: of the contender.
        steps: of the evaluations.
        losses: held-out, of each seed at each of these.
        tokens: that a run had seen by then.
        flops: operations of the model by then.
    """

    name: str
    steps: Sequence[int]
    losses: Sequence[Sequence[float]]
    tokens: Sequence[float]
    flops: Sequence[float]

    @property
    def last(self) -> list[float]:
        """The last loss of each seed."""
        return [losses[-1] for losses in self.losses]

    def steps_to(self, loss: float, seed: int) -> float | None:
        """The step at which a seed's loss is `loss` for the first time, by straight lines; None if it stays above."""
        points = list(zip(self.steps, self.losses[seed], strict=True))
        if points[0][1] <= loss:
            return float(points[0][0])
        for (step, before), (next_step, after) in pairwise(points):
            if after <= loss:
                return step + (next_step - step) * (before - loss) / (before - after)
        return None

    def at(self, counts: Sequence[float], step: float) -> float:
        """`counts`, which are those of `steps`, at any step in between; 0 at step 0."""
        points = [(0, 0.0), *zip(self.steps, counts, strict=True)]
        for (before, low), (after, high) in pairwise(points):
            if step <= after:
                return low + (high - low) * (step - before) / (after - before)
        return points[-1][1]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = comparison_parser(__doc__ or "", ROOT / "out" / "data_efficiency", "docs/data_efficiency.md")
    p.add_argument("--at-once", type=int, default=1, metavar="N", help="runs side by side (default 1)")
    return p


def main(arguments: Sequence[str]) -> None:
    """Train what is not trained yet, print, and write the page where asked.

    Raises:
        ConfigError: a number is not above 0.
        DataError: the corpus cannot be read, or a run ended before its last step.
    """
    args = parser().parse_args(arguments)
    num_steps = steps_of(args, GLOBAL_BATCH * SEQ_LENGTH, INTERVAL)
    if problems := too_small([("--at-once", args.at_once, 1)]):
        raise ConfigError("\n".join(problems))
    data, index = tokenized(args.input, args.output / "data", VOCAB_SIZE), args.output / "index"
    analyze(data, index)
    ways = contenders(num_steps, index)
    # Schedules are part of a run, so one of another length begins anew.
    place = args.output / f"{num_steps}-steps"
    runs = [
        Run(way, seed, num_steps, place / f"{way.name.replace(' ', '-')}-{seed}", COMMON, INTERVAL)
        for seed in range(1, args.seeds + 1)
        for way in ways
    ]
    with ThreadPoolExecutor(args.at_once) as threads:
        for _ in threads.map(lambda run: finish(run, data), runs):
            pass
    outcomes = [outcome_of([run for run in runs if run.contender is way]) for way in ways]
    table = table_of(ways, outcomes)
    print(table)
    if args.write:
        plot_curves(list(map(curve_of, outcomes)), IMAGES / "data_efficiency_curves.png")
        write_tables(PAGE, [table])


def analyze(data: Path, index: Path) -> None:
    """Measure the rarity of every sample's words, unless that is done."""
    files = ("--vocab-file", data.parent / "vocab.json", "--merge-file", data.parent / "merges.txt")
    sizes = ("--seq-length", SEQ_LENGTH, "--split", SPLIT)
    run_tool(
        "analyze_data.py",
        *("--data-path", data, "--output", index, "--metrics", "rarity", *sizes),
        *("--tokenizer-type", "GPT2BPETokenizer", *files),
    )


def outcome_of(runs: Sequence[Run]) -> Outcome:
    """The outcome of a contender's runs, from their metrics files."""
    steps = [step for step, _ in runs[0].losses()]
    tokens, flops = dict[int, float](), dict[int, float]()
    total_tokens = total_flops = 0.0
    for record in read_records(runs[0].metrics):
        if "loss" not in record or record["step"] > steps[-1]:
            continue
        new = record["consumed_tokens"] - total_tokens
        total_tokens += new
        total_flops += new * record["tflops_per_device"] * 1e12 / record["tokens_per_second"]
        tokens[record["step"]], flops[record["step"]] = total_tokens, total_flops
    return Outcome(
        runs[0].contender.name,
        steps,
        [[loss for _, loss in run.losses()] for run in runs],
        [tokens[step] for step in steps],
        [flops[step] for step in steps],
    )


def curve_of(outcome: Outcome) -> Curve:
    """As the picture takes it."""
    tokens = list(map(round, outcome.tokens))
    return Curve(outcome.name, tokens, outcome.losses, outcome.flops[-1] / tokens[-1], outcome.flops)


def table_of(ways: Sequence[Contender], outcomes: Sequence[Outcome]) -> Table:
    """What each way to train took and reached; operations are shares of those of a usual run."""
    usual = outcomes[0]
    described = ", ".join(f"`{way.name}` {way.description}" for way in ways)
    caption = (
        f"{described}; {NUM_LAYERS} layers, hidden {HIDDEN_SIZE}, sequence {SEQ_LENGTH}, vocabulary {VOCAB_SIZE:,}, "
        f"{usual.steps[-1]:,} steps, fp32, one process; {len(usual.losses)} seeds."
    )
    table = Table("data-efficiency", caption, COLUMNS)
    table.rows.extend(tuple(_row(outcome, usual)) for outcome in outcomes)
    for outcome in outcomes[1:]:
        differences = ", ".join(f"{a - b:+.3f}" for a, b in zip(outcome.last, usual.last, strict=True))
        table.notes.append(f"last loss of `{outcome.name}` less that of `usual`, seed by seed: {differences}")
    return table


def _row(outcome: Outcome, usual: Outcome) -> Iterator[str]:
    yield outcome.name
    yield f"{outcome.tokens[-1]:,.0f}"
    yield f"{outcome.flops[-1] / usual.flops[-1]:.2f}"
    last = outcome.last
    yield f"{statistics.mean(last):.3f} ({min(last):.3f} to {max(last):.3f})"
    reached = [outcome.steps_to(loss, seed) for seed, loss in enumerate(usual.last)]
    yield ", ".join("not reached" if step is None else f"{step:.0f}" for step in reached)
    found = [step for step in reached if step is not None]
    if len(found) < len(reached):
        yield from ("not by all", "not by all")
        return
    yield f"{statistics.mean(outcome.at(outcome.tokens, step) for step in found):,.0f}"
    yield f"{statistics.mean(outcome.at(outcome.flops, step) for step in found) / usual.flops[-1]:.2f}"


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
