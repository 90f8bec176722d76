"""Time of one training step in one process, as a ratio to transformers' GPT-2 with torch's fused AdamW.

    python tools/bench/training_step.py --layers 6 --hidden 384 --heads 6 --seq 256 --batch 4 --rounds 8

Both train the same shape in fp32 on the same random tokens: forward, backward, clipping, AdamW. They take turns, so
that a machine whose speed drifts is fair to both; the figure to quote is the median of the ratios of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from megatron3d.comm.device import pick_device, synchronize
from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.config.check import resolve
from megatron3d.config.cli import parse_args
from megatron3d.data.batch import GPTBatch
from megatron3d.models.gpt import build_gpt_stage
from megatron3d.train.setup import build_parts
from megatron3d.train.step import Rates, train_step

VOCAB_SIZE = 50257
Step = Callable[[], None]


def main() -> None:
    """Measure and print."""
    args = _arguments()
    device = pick_device(args.device, local_rank=0, local_world_size=1)
    torch.manual_seed(0)
    tokens_BS = torch.randint(VOCAB_SIZE, (args.batch, args.seq + 1))
    ours, theirs = _ours(args, tokens_BS, device), _theirs(args, tokens_BS, device)
    ratios, seconds = [], {"megatron3d": [], "transformers": []}
    for number in range(args.rounds + 1):
        mine, other = _timed(ours, device), _timed(theirs, device)
        if number:  # the first round warms up
            ratios.append(mine / other)
            seconds["megatron3d"].append(mine)
            seconds["transformers"].append(other)
    for name, values in seconds.items():
        rate = args.batch * args.seq / statistics.median(values)
        print(f"{name:12s} {statistics.median(values) * 1e3:9.1f} ms/step  {rate:10.0f} tokens/s")
    print(
        f"time of megatron3d / transformers: median {statistics.median(ratios):.3f}, "
        f"{min(ratios):.3f} to {max(ratios):.3f}"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 6), ("hidden", 384), ("heads", 6), ("seq", 256), ("batch", 4), ("rounds", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--bf16", action="store_true", help="bf16 with fp32 master weights; transformers by autocast")
    return parser.parse_args()


def _timed(step: Step, device: torch.device) -> float:
    began_s = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - began_s


def _ours(args: argparse.Namespace, tokens_BS: torch.Tensor, device: torch.device) -> Step:
    flags = (
        f"--num-layers {args.layers} --hidden-size {args.hidden} --num-attention-heads {args.heads} "
        f"--seq-length {args.seq} --micro-batch-size {args.batch} --global-batch-size {args.batch} --train-iters 1 "
        f"--lr 1e-4 --mock-data --vocab-size {VOCAB_SIZE} --hidden-dropout 0 --attention-dropout 0"
    )
    argv = flags.split() + (["--bf16"] if args.bf16 else [])
    config = resolve(parse_args(argv, program="bench", description=""), 1)
    parts = build_parts(config, make_mesh(Layout()), device, build_gpt_stage)
    tokens, labels = tokens_BS[:, :-1].contiguous(), tokens_BS[:, 1:].contiguous()
    batch = GPTBatch(tokens, labels, torch.ones(labels.shape))
    return lambda: train_step(parts, batch, Rates(1e-4, 0.01), step=0) and None


def _theirs(args: argparse.Namespace, tokens_BS: torch.Tensor, device: torch.device) -> Step:
    options: dict[str, Any] = {"attn_implementation": "sdpa"}  # of every model, so not among the parameters of this one
    shape = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=args.seq,
        n_embd=args.hidden,
        n_layer=args.layers,
        n_head=args.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **options,
    )
    with device:
        model = GPT2LMHeadModel(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = tokens_BS[:, :-1].to(device)
    labels = tokens_BS[:, 1:].to(device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            logits = model(input_ids=tokens).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
