"""fp32 products of a linear layer on CPU, through torch's own library and through oneDNN, by shape.

    python tools/bench/matmul.py --tokens 2048 --hidden 384 --ffn 1536 --vocabulary 8192 --rounds 5

Both libraries take turns, on the threads that OMP_NUM_THREADS says; GFLOP/s of the best round. The last line is what
`--matmul auto` measures for such a model (`megatron3d/train/matmul.py`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from megatron3d_kernels.products import LIBRARIES
from megatron3d_kernels.registry import Registry

from megatron3d.train.matmul import MOST_FEATURES, MOST_TOKENS, measure


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--ffn", type=int, default=1536)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, GFLOP/s in fp32")
    print(f"{'product':17s} {'input':>6s} {'output':>6s} {'torch':>7s} {'onednn':>7s}   onednn / torch")
    hidden, ffn = args.hidden, args.ffn
    for inputs, outputs in ((hidden, 3 * hidden), (hidden, ffn), (ffn, hidden), (hidden, args.vocabulary)):
        for product in ("linear", "input gradient", "weight gradient"):
            shape = (args.tokens, inputs, outputs)
            actions = {name: _action(product, Registry(library=name), *shape) for name in LIBRARIES}
            best = dict.fromkeys(actions, float("inf"))
            for _ in range(args.rounds + 1):
                for name, action in actions.items():
                    began_s = time.perf_counter()
                    action()
                    best[name] = min(best[name], time.perf_counter() - began_s)
            own, other = (2 * args.tokens * inputs * outputs / 1e9 / best[name] for name in LIBRARIES)
            print(f"{product:17s} {inputs:6d} {outputs:6d} {own:7.0f} {other:7.0f} {other / own:16.2f}")
    rates = measure(min(args.tokens, MOST_TOKENS), min(hidden, MOST_FEATURES), min(ffn, MOST_FEATURES))
    print(f"--matmul auto measures mkl {rates.mkl:.0f}, onednn {rates.onednn:.0f}")


def _action(product: str, kernels: Registry, tokens: int, inputs: int, outputs: int) -> Callable[[], object]:
    """One product on tensors of its own."""
    x, grad, weight = torch.randn(tokens, inputs), torch.randn(tokens, outputs), torch.randn(outputs, inputs)
    if product == "linear":
        return lambda: kernels.linear(x, weight, None)
    if product == "input gradient":
        return lambda: kernels.input_gradient(grad, weight)
    return lambda: kernels.add_weight_gradient(weight, grad, x)


if __name__ == "__main__":
    main()
