"""Products of many layers, each with rows of its own: looped, batched and grouped, by the rows of a layer.

    python tools/bench/grouped.py --hidden 384 --ffn 768 --rows 4096 --rounds 7

The same rows are divided among more and more layers. GFLOP/s of the three products of an MLP's two layers (forward,
input gradient, weight gradient) together, in the best round, by processor time on a CPU; the ways take turns. What is
fastest is what `FASTEST` in `megatron3d_kernels/grouped_products.py` has.
"""

from __future__ import annotations

import argparse
import time

import torch
from megatron3d_kernels.grouped_products import LOOPED, WAYS, has_grouped
from megatron3d_kernels.registry import Registry

from megatron3d.comm.device import synchronize

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 384), ("ffn", 768), ("rows", 4096), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    ways = [way for way in WAYS if has_grouped() or way != "grouped"]
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads, GFLOP/s")
    print(f"{'dtype':6s}{'layers':>7s}{'rows':>6s}" + "".join(f"{way:>10s}" for way in ways) + "   fastest")
    for name in args.dtype:
        layers = 4
        while layers <= args.rows:
            rates = rates_of(ways, layers, args, DTYPES[name])
            best = max(rates, key=lambda way: rates[way])
            figures = "".join(f"{rates[way]:10.1f}" for way in ways)
            print(f"{name:6s}{layers:7d}{args.rows // layers:6d}{figures}   {best} ({rates[best] / rates[LOOPED]:.2f})")
            layers *= 4


def rates_of(ways: list[str], layers: int, args: argparse.Namespace, dtype: torch.dtype) -> dict[str, float]:
    """GFLOP/s of each way in its best round."""
    where = {"dtype": dtype, "device": args.device}
    counts = [args.rows // layers] * layers
    # As in a flat buffer: the matrices of one layer after those of the other.
    flat = torch.randn(2, layers, 2, args.ffn * args.hidden, **where) / args.hidden**0.5
    up, up_grad = ([one.view(args.ffn, args.hidden) for one in half[:, 0]] for half in flat)
    down, down_grad = ([one.view(args.hidden, args.ffn) for one in half[:, 1]] for half in flat)
    x, inner = torch.randn(args.rows, args.hidden, **where), torch.randn(args.rows, args.ffn, **where)
    overwrites, nothing = [True] * layers, [None] * layers
    best = dict.fromkeys(ways, float("inf"))
    kernels = {way: Registry(grouped=way) for way in ways}
    for _ in range(args.rounds + 1):
        for way, one in kernels.items():
            began_s = _now_s(args.device)
            one.grouped_linear(x, up, nothing, counts)
            one.grouped_linear(inner, down, nothing, counts)
            one.grouped_input_gradient(inner, up, counts)
            one.grouped_input_gradient(x, down, counts)
            one.add_grouped_weight_gradients(up_grad, inner, x, counts, overwrites=overwrites)
            one.add_grouped_weight_gradients(down_grad, x, inner, counts, overwrites=overwrites)
            best[way] = min(best[way], _now_s(args.device) - began_s)
    return {way: 12 * args.rows * args.hidden * args.ffn / 1e9 / seconds for way, seconds in best.items()}


def _now_s(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    synchronize(torch.device(device))
    return time.perf_counter()


if __name__ == "__main__":
    main()
