"""Time of a training step whose middle layers see part of the positions, as a ratio to one in which they see all.

    python -m tools.bench.random_ltd --layers 12 --hidden 384 --heads 6 --seq 512 --batch 2 --kept 256 --rounds 5

One model in one process: the same step with --random-ltd at its first and at its last number of positions, in turns, so
that a machine whose speed drifts is fair to both. Beside the time stands the share of floating-point operations.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from megatron3d.comm.device import pick_device, synchronize
from megatron3d.data.batch import GPTBatch
from megatron3d.models.flops import layer_flops, pretraining_flops
from megatron3d.train.setup import TrainingSetup
from megatron3d.train.step import Rates, train_step
from tools.bench.one_gpt import add_clock, gpt_of, size_parser
from tools.bench.rounds import speed_ratio, take_turns

_FULL = 1  # number of the step from which on the layers see all positions


def main() -> None:
    """Measure and print."""
    args = _arguments()
    device = pick_device(args.device, local_rank=0, local_world_size=1)
    drops = f"--random-ltd --random-ltd-min {args.kept} --random-ltd-steps {_FULL}"
    parts = gpt_of(args, device, *drops.split(), vocab_size=args.vocab)
    tokens_BS = torch.randint(args.vocab, (args.batch, args.seq + 1), generator=torch.Generator().manual_seed(0))
    batch = GPTBatch(tokens_BS[:, :-1].contiguous(), tokens_BS[:, 1:].contiguous(), torch.ones(args.batch, args.seq))

    clock = time.process_time if args.processor_time else time.perf_counter

    def turn(step: int) -> float:
        began_s = clock()
        train_step(parts, batch, Rates(1e-4, 0.01), step=step)
        synchronize(parts.model.device)
        return clock() - began_s

    for step in (0, _FULL):  # warm up
        turn(step)
    seconds, _ = take_turns({"part": lambda: turn(0), "all": lambda: turn(_FULL)}, args.rounds)
    for name, kept in (("part", args.kept), ("all", args.seq)):
        print(f"{kept:6d} positions {statistics.median(seconds[name]) * 1e3:9.1f} ms/step")
    print(f"time: {speed_ratio(seconds['all'], seconds['part'])} of the whole, median and range of the rounds")
    print(f"floating-point operations: {_share_of_flops(parts):.2f} of the whole")


def _arguments() -> argparse.Namespace:
    sizes = {"layers": 12, "hidden": 384, "heads": 6, "seq": 512, "batch": 2, "vocab": 8192, "kept": 256, "rounds": 5}
    parser = size_parser(__doc__, sizes)
    add_clock(parser)
    return parser.parse_args()


def _share_of_flops(parts: TrainingSetup) -> float:
    model, dropping = parts.config.model, parts.random_ltd
    assert dropping is not None, "the flags ask for it"
    whole, layers, length = pretraining_flops(model).of([model.seq_length]), layer_flops(model), model.seq_length
    kept = dropping.kept_at(0, length)
    saved = sum(layers[layer].of([length]) - layers[layer].of([count]) for layer, count in kept.items())
    return 1 - saved / whole


if __name__ == "__main__":
    main()
