"""Time of a training step with blocks that torch.compile makes (`--compile`) against blocks as they are written.

    python -m tools.bench.compiled --layers 4 --hidden 512 --heads 8 --seq 512 --batch 4 --rounds 7
    python -m tools.bench.compiled --llama --bf16

One GPT of each kind in one process takes the same step in turns. The first step of the compiled one, which compiles, is
printed and not counted.
"""

from __future__ import annotations

import statistics
import time

import torch

from megatron3d.comm.device import pick_device, synchronize
from megatron3d.data.batch import GPTBatch
from megatron3d.train.step import Rates, train_step
from tools.bench.one_gpt import add_clock, gpt_of, size_parser
from tools.bench.rounds import speed_ratio, take_turns

LLAMA = ("--position-embedding-type", "rope", "--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear")
DROPOUT = 0.1


def main() -> None:
    """Measure and print."""
    sizes = {"layers": 4, "hidden": 512, "heads": 8, "seq": 512, "batch": 4, "vocab": 8192, "rounds": 7}
    parser = size_parser(__doc__, sizes)
    parser.add_argument("--llama", action="store_true", help="rotary positions, RMSNorm, SwiGLU and no biases")
    parser.add_argument("--dropout", action="store_true", help=f"drop {DROPOUT:g} of hidden elements")
    add_clock(parser)
    args = parser.parse_args()
    torch.manual_seed(0)
    tokens_BS = torch.randint(args.vocab, (args.batch, args.seq + 1))
    batch = GPTBatch(tokens_BS[:, :-1].contiguous(), tokens_BS[:, 1:].contiguous(), torch.ones(args.batch, args.seq))
    device = pick_device(args.device, local_rank=0, local_world_size=1)
    options = [*(LLAMA if args.llama else ()), *(("--hidden-dropout", str(DROPOUT)) if args.dropout else ())]
    parts = {
        "as written": gpt_of(args, device, *options, vocab_size=args.vocab),
        "compiled": gpt_of(args, device, *options, "--compile", vocab_size=args.vocab),
    }
    clock = time.process_time if args.processor_time else time.perf_counter

    def turn(name: str) -> float:
        began_s = clock()
        train_step(parts[name], batch, Rates(0.0, 0.0), step=0)
        synchronize(device)
        return clock() - began_s

    first_s = {name: turn(name) for name in parts}
    compiled = parts["compiled"].compiled
    assert compiled is not None, "--compile compiles"
    print(f"first step {first_s['compiled']:.1f} s: {'; '.join(compiled.news(1))}")
    seconds, _ = take_turns({name: lambda name=name: turn(name) for name in parts}, args.rounds)
    for name, times in seconds.items():
        print(f"{name:10s} {statistics.median(times) * 1e3:9.1f} ms/step")
    ratio = speed_ratio(seconds["compiled"], seconds["as written"])
    print(f"compiled is {ratio} times as fast, median and range of the rounds")


if __name__ == "__main__":
    main()
