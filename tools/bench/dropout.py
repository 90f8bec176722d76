"""Times dropout by place against torch's, in one run on one CPU thread: `python tools/bench/dropout.py`.

Hidden dropout of [S, B, H] and the attention core with dropout of its probabilities, each with its backward, beside
`torch.nn.functional.dropout` and `scaled_dot_product_attention`. Prints a Markdown table of the fastest round of each,
the one least disturbed by whatever else the machine does.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron3d_kernels.registry import Registry
from torch import Tensor

from megatron3d.nn.attention_core import Masking, ProbabilityDropout, attend
from megatron3d.nn.dropout import DropoutStream, drop_hidden

PROBABILITY = 0.1
HIDDEN = ((16, 2, 32), (420, 1, 384), (256, 4, 768), (512, 8, 1024))  # S, B, H
CORES = ((2, 4, 192, 24), (4, 8, 256, 64), (1, 8, 1024, 64))  # B, N, S, D
STREAM = DropoutStream(seed=5, first_sample=0)
Pair = tuple[Callable[[], object], Callable[[], object]]


def main() -> None:
    """Parse the options, time each pair in turn, print the table."""
    parser = argparse.ArgumentParser(
        description="Times dropout by place against torch's, in one run on one CPU thread."
    )
    parser.add_argument("--repeat", type=int, default=15, help="rounds; the fastest is printed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| what | torch, ms | by place, ms | ratio |\n|---|---:|---:|---:|")
    for shape in HIDDEN:
        _print(f"hidden {list(shape)}", _hidden(shape), options.repeat)
    for shape in CORES:
        _print(f"attention {list(shape)}", _core(shape), options.repeat)


def _hidden(shape: tuple[int, int, int]) -> Pair:
    x = torch.randn(shape, requires_grad=True)
    positions, kernels = torch.arange(shape[0]), Registry()
    given = {"site": "layers.0.mlp", "positions_S": positions, "kernels": kernels}
    return (
        lambda: _both_ways(F.dropout(x, PROBABILITY)),
        lambda: _both_ways(drop_hidden(x, PROBABILITY, STREAM, **given)),
    )


def _core(shape: tuple[int, int, int, int]) -> Pair:
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    dropout = ProbabilityDropout(PROBABILITY, STREAM, "layers.0.attention.core", first_head=0, shard=0)
    return (
        lambda: _both_ways(F.scaled_dot_product_attention(q, k, v, dropout_p=PROBABILITY, is_causal=True)),
        lambda: _both_ways(attend(q, k, v, Masking(None, True), dropout)),
    )


def _both_ways(y: Tensor) -> None:
    y.backward(torch.ones_like(y))


def _print(what: str, pair: Pair, rounds: int) -> None:
    fastest = [float("inf")] * 2
    for _ in range(rounds):  # In turn, so that a busy machine is busy for both.
        for number, way in enumerate(pair):
            start = time.perf_counter()
            way()
            fastest[number] = min(fastest[number], time.perf_counter() - start)
    theirs, ours = fastest
    print(f"| {what} | {1e3 * theirs:.3g} | {1e3 * ours:.3g} | {ours / theirs:.2f} |", flush=True)


if __name__ == "__main__":
    main()
