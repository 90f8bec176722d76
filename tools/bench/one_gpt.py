"""A GPT in one process, of the sizes that a benchmark's command line gives."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import torch

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.config.check import resolve
from megatron3d.config.cli import parse_args
from megatron3d.models.gpt import build_gpt_stage
from megatron3d.train.setup import TrainingSetup, build_parts


def size_parser(description: str | None, sizes: Mapping[str, int]) -> argparse.ArgumentParser:
    """A parser with an option for each of these numbers, which have defaults, --device and --bf16."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--bf16", action="store_true", help="bf16 with fp32 master weights")
    return parser


def add_clock(parser: argparse.ArgumentParser) -> None:
    """Let the user choose the clock."""
    parser.add_argument(
        "--processor-time", action="store_true", help="seconds that the process computes, for a CPU that others use too"
    )


def gpt_of(args: argparse.Namespace, device: torch.device, *options: str, vocab_size: int) -> TrainingSetup:
    """The parts of a run with the sizes `layers`, `hidden`, `heads`, `seq` and `batch`, and further options."""
    flags = (
        f"--num-layers {args.layers} --hidden-size {args.hidden} --num-attention-heads {args.heads} "
        f"--seq-length {args.seq} --micro-batch-size {args.batch} --global-batch-size {args.batch} --train-iters 1 "
        f"--lr 1e-4 --mock-data --vocab-size {vocab_size} --hidden-dropout 0 --attention-dropout 0"
    )
    argv = [*flags.split(), *options, *(["--bf16"] if args.bf16 else [])]
    config = resolve(parse_args(argv, program="bench", description=""), 1)
    return build_parts(config, make_mesh(Layout()), device, build_gpt_stage)
