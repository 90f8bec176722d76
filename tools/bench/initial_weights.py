"""Time of drawing the initial weights of a model on one thread, whole and for one rank of a layout:

    python -m tools.bench.initial_weights                                   # Llama 3 8B
    python -m tools.bench.initial_weights --preset llama3-70b --tensor-model-parallel-size 8 --zero-ranks 16

Draws every parameter that the rank holds, one after another into the same memory, so that a model need not fit. With
`--zero-ranks N` the rank draws one of N equal parts of each parameter, as at stage 3 of ZeRO.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from math import prod

import torch

from megatron3d.config.presets import PRESETS
from megatron3d.models.counts import declared_specs
from megatron3d.params.init import fill_initial
from megatron3d.params.spec import ParamSpec

SEED = 1234


def main() -> None:
    """Draw, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama3-8b", choices=sorted(PRESETS), metavar="NAME")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--zero-ranks", type=int, default=1)
    args = parser.parse_args()
    specs = declared_specs(PRESETS[args.preset].model_config())
    torch.set_num_threads(1)
    tp, ranks = args.tensor_model_parallel_size, args.zero_ranks
    numbers, took_s = draw(specs, tp=tp, ranks=ranks)
    print(
        f"{args.preset}, {sum(spec.numel for spec in specs) / 1e9:.2f}B parameters, a rank of TP{tp}, part of {ranks}: "
        f"{numbers / 1e9:.3f}B numbers in {took_s:.2f} s of one thread, {took_s / numbers * 1e9:.2f} ns each"
    )


def draw(specs: Sequence[ParamSpec], *, tp: int, ranks: int) -> tuple[int, float]:
    """Draw the first part of every parameter on rank 0; how many numbers that were, and seconds of the processor."""
    lengths = [-(-prod(spec.local_shape(tp)) // ranks) for spec in specs]
    memory = torch.zeros(max(lengths))
    began_s = time.process_time()
    for spec, length in zip(specs, lengths, strict=True):
        fill_initial(memory[:length], spec, seed=SEED, tp=tp, tp_rank=0)
    return sum(lengths), time.process_time() - began_s


if __name__ == "__main__":
    main()
