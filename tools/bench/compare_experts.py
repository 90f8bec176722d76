"""Mixtures of experts against dense models: what is gained at equal compute, from one command that resumes.

    python -m tools.bench.compare_experts --input books.jsonl.gz wikipedia.jsonl.gz    train all, print the table
    python -m tools.bench.compare_experts --input ... --write                          put it into docs/moe.md too
    python -m tools.bench.compare_experts --tokens 150000 --seeds 1                    on the standard library's sources

Three models see the same tokens in the same order: a dense one, the same with experts of which a token passes as many
operations, and a dense one of several times the compute. Each is trained from several seeds, which are those of
weights and order alike. Rates are constant after a warm-up, so every point of a curve is what a run of that length
gives, and with more --tokens the same runs are continued. The held-out loss is that of the tokens, without those of
balance. What is done is not repeated: a run that was interrupted resumes from its last checkpoint. Without --input the
text is what every Python installation carries.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence

from megatron3d.config.check import resolve
from megatron3d.config.cli import parse_args
from megatron3d.config.sections.model import ModelConfig
from megatron3d.models.counts import num_active_parameters, num_parameters
from megatron3d.models.flops import flops_per_token
from megatron3d.process.command import run_command
from megatron3d.train.loss_plot import plot_losses
from tools.bench.curves import Curve, plot_curves
from tools.bench.tables import Table, write_tables
from tools.bench.training_runs import ROOT, Contender, Run, comparison_parser, finish, steps_of, tokenized

PAGE, IMAGES = ROOT / "docs" / "moe.md", ROOT / "docs" / "images"
VOCAB_SIZE, SEQ_LENGTH, GLOBAL_BATCH = 1024, 128, 16
INTERVAL = 60  # steps from one evaluation to the next
COMMON = (
    "--num-attention-heads 4 --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
    "--hidden-dropout 0 --attention-dropout 0 --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1 --split 97,3,0 "
    "--lr-decay-style constant --lr-decay-iters 1000000 --lr-warmup-iters 20 --log-interval 50 --num-workers 0 "
    f"--device cpu --seq-length {SEQ_LENGTH} --vocab-size {VOCAB_SIZE} --micro-batch-size {GLOBAL_BATCH} "
    f"--global-batch-size {GLOBAL_BATCH}"
)
COLUMNS = (
    "model",
    "parameters",
    "active",
    "MFLOPs a token",
    "held-out loss (lowest to highest)",
    "compute to the last loss of `dense`",
    "compute to the last loss of `experts`",
)


_SMALL = "--num-layers 4 --hidden-size 64 --ffn-hidden-size 176 --lr 4e-3"
DENSE, EXPERTS, LARGE = CONTENDERS = (
    Contender("dense", "4 layers, hidden 64", _SMALL),
    Contender(
        "experts",
        "the same with 16 experts of half the width in each layer, of which a token passes 2",
        f"{_SMALL} --num-experts 16 --moe-router-topk 2 --moe-ffn-hidden-size 88",
    ),
    Contender(
        "dense-large", "4 layers, hidden 160", "--num-layers 4 --hidden-size 160 --ffn-hidden-size 432 --lr 2e-3"
    ),
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    return comparison_parser(__doc__ or "", ROOT / "out" / "experts", "docs/moe.md")


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
    table = table_of(runs)
    print(table)
    if args.write:
        plot_curves([curve_of(runs, contender) for contender in CONTENDERS], IMAGES / "experts_curves.png")
        plot_losses(next(run for run in runs if run.contender is EXPERTS).metrics, IMAGES / "experts_load.png")
        write_tables(PAGE, [table])


# --- Results ----------------------------------------------------------------------------------------------------------


def curve_of(runs: Sequence[Run], contender: Contender) -> Curve:
    """The held-out losses of a contender over tokens, of each seed."""
    own = [run.losses() for run in runs if run.contender is contender]
    tokens = [step * GLOBAL_BATCH * SEQ_LENGTH for step, _ in own[0]]
    losses = [[loss for _, loss in one] for one in own]
    return Curve(contender.name, tokens, losses, flops_per_token(model_of(contender)))


def model_of(contender: Contender) -> ModelConfig:
    """The resolved model."""
    words = f"{COMMON} {contender.options} --mock-data --train-iters 1".split()
    return resolve(parse_args(words, program="experts", description=""), 1).model


def table_of(runs: Sequence[Run]) -> Table:
    """What each contender is and reaches."""
    curves = {contender.name: curve_of(runs, contender) for contender in CONTENDERS}
    seeds = len(curves[DENSE.name].losses)
    described = ", ".join(f"`{one.name}` {one.description}" for one in CONTENDERS)
    caption = (
        f"{described}; sequence {SEQ_LENGTH}, vocabulary {VOCAB_SIZE:,}, {curves[DENSE.name].tokens[-1]:,} tokens, "
        f"fp32, one process; means of {seeds} seeds."
    )
    table = Table("experts", caption, COLUMNS)
    for contender in CONTENDERS:
        table.rows.append(_row(contender, curves))
    for name in (EXPERTS.name, LARGE.name):
        pairs = zip(curves[name].losses, curves[DENSE.name].losses, strict=True)
        differences = ", ".join(f"{losses[-1] - others[-1]:+.3f}" for losses, others in pairs)
        table.notes.append(f"`{name}` less `{DENSE.name}`, seed by seed: {differences}")
    return table


def _row(contender: Contender, curves: Mapping[str, Curve]) -> tuple[str, ...]:
    model, curve = model_of(contender), curves[contender.name]
    last = [losses[-1] for losses in curve.losses]
    return (
        contender.name,
        f"{num_parameters(model) / 1e6:.2f} M",
        f"{num_active_parameters(model) / 1e6:.2f} M",
        f"{curve.flops_per_token / 1e6:.2f}",
        f"{statistics.mean(last):.3f} ({min(last):.3f} to {max(last):.3f})",
        *_compute_to_last_losses(curve, (curves[DENSE.name], curves[EXPERTS.name])),
    )


def _compute_to_last_losses(curve: Curve, others: Sequence[Curve]) -> Iterator[str]:
    """The operations until a curve's mean loss is the last of each other, over all those that the other took."""
    for other in others:
        tokens = curve.tokens_to(other.mean[-1])
        share = None if tokens is None else tokens * curve.flops_per_token / other.flops
        yield "not reached" if share is None else f"{share:.2f}"


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
