"""The largest base model that fits as a mixture of experts, with tensor parallelism and without: nothing is allocated.

    python -m tools.bench.base_models                print the table, for 128 GPUs
    python -m tools.bench.base_models --write        put it into docs/moe.md too

A base model is a published dense one, of which every second layer gets experts. Experts alone, each on a rank of its
own, do not make a larger base model fit: every rank holds all dense layers, and whole experts as wide as theirs. With
tensor parallelism both are sharded. Memory is what the ledger predicts (docs/memory.md).

Source: Singh et al. 2023 (arXiv:2303.06318), section 5, for the question.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron3d.config.cli import parse_args
from megatron3d.config.presets import Preset
from megatron3d.config.tool_parser import ToolParser
from megatron3d.errors import ConfigError
from megatron3d.models.counts import num_parameters
from megatron3d.process.command import run_command
from megatron3d.train.estimate import Limits, Setting, family_of, largest, settled
from megatron3d.train.progress import format_count
from tools.bench.tables import Table, write_tables

PAGE = Path(__file__).resolve().parents[2] / "docs" / "moe.md"
ZERO_STAGE = 1
COMMON = (
    "--moe-layer-freq 2 --moe-router-topk 1 --moe-router-pre-softmax --micro-batch-size 1 --fp16 --device cuda "
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--memory-gb", type=float, nargs="+", default=[16.0, 40.0, 80.0], help="of a GPU (default 16 40 80)")
    p.add_argument("--world-size", type=int, default=128, help="GPUs (default 128)")
    p.add_argument("--experts", type=int, default=16, help="of a layer, and ranks that hold them (default 16)")
    p.add_argument("--tensor", type=int, default=8, help="tensor-parallel ranks (default 8)")
    p.add_argument("--family", default="gpt3,megatron", help="how presets' names begin (default gpt3,megatron)")
    p.add_argument("--write", action="store_true", help="replace the table of docs/moe.md")
    return p


def main(arguments: Sequence[str]) -> None:
    """Print the table, and write the page where asked.

    Raises:
        ConfigError: no model of the family goes with a layout.
    """
    args = parser().parse_args(arguments)
    table = table_of(args)
    print(table)
    if args.write:
        write_tables(PAGE, [table])


def table_of(args: argparse.Namespace) -> Table:
    """A row for each size of memory, a column for each way to cut the model."""
    cuts = {
        "no tensor parallelism": "--tensor-model-parallel-size 1",
        f"TP {args.tensor}, experts whole": (
            f"--tensor-model-parallel-size {args.tensor} --expert-tensor-parallel-size 1"
        ),
        f"TP {args.tensor}, experts too": f"--tensor-model-parallel-size {args.tensor}",
    }
    caption = (
        f"{args.world_size} GPUs, {args.experts} experts in every second layer on {args.experts} ranks, one for each "
        f"token; ZeRO stage {ZERO_STAGE}, fp16, Adam, micro-batch 1, all layers recomputed. The base model, and with "
        "its experts:"
    )
    table = Table("base models", caption, ("GiB of a GPU", *cuts))
    family = family_of(args.family, "gpt")
    for memory_gb in args.memory_gb:
        limits = Limits(int(memory_gb * 2**30))
        found = [largest_of(family, f"{COMMON} {words}", args, limits) for words in cuts.values()]
        table.rows.append((f"{memory_gb:g}", *found))
    return table


def largest_of(family: Sequence[Preset], words: str, args: argparse.Namespace, limits: Limits) -> str:
    """The largest base model of a family within the limits: its name, its parameters, and with experts.

    Raises:
        ConfigError: none goes with the layout.
    """
    experts = f"--num-experts {args.experts} --expert-model-parallel-size {args.experts}"
    given = [
        parse_args(f"--preset {preset.name} {words} {experts}".split(), program="base_models", description="")
        for preset in family
    ]
    setting = Setting(ZERO_STAGE)
    position, problems = largest(given, setting, args.world_size, limits)
    if len(problems) == len(given):
        raise ConfigError(problems[-1])
    if position is None:
        return "none"
    preset = family[position]
    sizes = (preset.model_config(), settled(setting.of(given[position]), args.world_size).model)
    dense, whole = (format_count(num_parameters(model)) for model in sizes)
    return f"{preset.name}: {dense}, {whole}"


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
