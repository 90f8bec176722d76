"""Causal attention on CPU: the backward over blocks against torch's fused kernel, by dtype and sequence length.

    python tools/bench/attention.py --rounds 7

Both take turns, forward and backward of [B, N, S, 64] with B x N x S = 12,288 positions, on the threads that
OMP_NUM_THREADS says. The table in `megatron3d_kernels/causal_blocks.py` (LONGEST) is made from the last column.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from megatron3d_kernels.causal_blocks import causal_blocks

POSITIONS, HEADS, SIZE = 12288, 6, 64
Core = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("dtype      sequence   fused ms  blocks ms   fused / blocks")
    fused = partial(F.scaled_dot_product_attention, is_causal=True)
    for dtype in (torch.bfloat16, torch.float32):
        for length in (64, 128, 256, 512, 1024, 2048):
            samples = max(1, POSITIONS // (HEADS * length))
            shape = (length, samples, HEADS, SIZE)
            q_k_v = [torch.randn(shape, dtype=dtype).permute(1, 2, 0, 3).requires_grad_() for _ in range(3)]
            rounds = [(_seconds(fused, q_k_v), _seconds(causal_blocks, q_k_v)) for _ in range(args.rounds + 1)][1:]
            theirs, ours = (statistics.median(column) * 1e3 for column in zip(*rounds))
            ratio = statistics.median(a / b for a, b in rounds)
            print(f"{str(dtype).removeprefix('torch.'):9s} {length:9d} {theirs:10.1f} {ours:10.1f} {ratio:16.2f}")


def _seconds(core: Core, q_k_v: list[torch.Tensor]) -> float:
    """Of one forward and backward."""
    began_s = time.perf_counter()
    y = core(*q_k_v)
    torch.autograd.grad(y, q_k_v, torch.ones_like(y))
    return time.perf_counter() - began_s


if __name__ == "__main__":
    main()
