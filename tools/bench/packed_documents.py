"""Time of a training step on packed documents: attention in squares against attention by a mask of all scores.

    python -m tools.bench.packed_documents --layers 6 --hidden 384 --heads 6 --seq 4096 --documents 8 --rounds 5

One GPT in one process takes the same step in turns, so that a machine whose speed drifts is fair to both: as
--reset-attention-mask does it, and with a mask [B, S, S] of the same documents, whose lengths are random.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from megatron3d.comm.device import pick_device, synchronize
from megatron3d.data.batch import GPTBatch
from megatron3d.train.step import Rates, train_step
from tools.bench.one_gpt import add_clock, gpt_of, size_parser
from tools.bench.rounds import speed_ratio, take_turns


@dataclass(frozen=True)
class MaskedBatch(GPTBatch):
    """Samples of documents that attend by a mask of all scores."""

    def documents(self) -> None:
        """None that attention knows of."""
        return None

    def model_inputs(self) -> dict[str, Any]:
        """Also the mask."""
        assert self.document_ids_BS is not None, "packed samples have documents"
        mask_BST = (self.document_ids_BS.unsqueeze(2) == self.document_ids_BS.unsqueeze(1)).tril()
        return super().model_inputs() | {"attention_mask_BST": mask_BST}


def main() -> None:
    """Measure and print."""
    args = _arguments()
    torch.manual_seed(0)
    tokens_BS = torch.randint(args.vocab, (args.batch, args.seq + 1))
    row = (tokens_BS[:, :-1].contiguous(), tokens_BS[:, 1:].contiguous(), torch.ones(args.batch, args.seq))
    documents_BS = torch.stack([_documents(args.seq, args.documents) for _ in range(args.batch)])
    parts = gpt_of(args, pick_device(args.device, local_rank=0, local_world_size=1), vocab_size=args.vocab)
    batches = {
        "squares": GPTBatch(*row, document_ids_BS=documents_BS),
        "mask": MaskedBatch(*row, document_ids_BS=documents_BS),
    }

    clock = time.process_time if args.processor_time else time.perf_counter
    losses: dict[str, float] = {}

    def turn(name: str) -> float:
        began_s = clock()
        losses[name] = train_step(parts, batches[name], Rates(0.0, 0.0), step=0).loss
        synchronize(parts.model.device)
        return clock() - began_s

    for name in batches:  # warm up
        turn(name)
    seconds, _ = take_turns({"squares": lambda: turn("squares"), "mask": lambda: turn("mask")}, args.rounds)
    for name, loss in losses.items():
        print(f"{name:8s} {statistics.median(seconds[name]) * 1e3:9.1f} ms/step, loss {loss:.7f}")
    print(
        f"squares are {speed_ratio(seconds['squares'], seconds['mask'])} times as fast, median and range of the rounds"
    )


def _arguments() -> argparse.Namespace:
    sizes = {
        "layers": 6,
        "hidden": 384,
        "heads": 6,
        "seq": 4096,
        "batch": 1,
        "vocab": 8192,
        "documents": 8,
        "rounds": 5,
    }
    parser = size_parser(__doc__, sizes)
    add_clock(parser)
    return parser.parse_args()


def _documents(length: int, count: int) -> torch.Tensor:
    """The number of the document of each position, int64 [S], with random boundaries."""
    starts = torch.randperm(length - 1)[: count - 1] + 1
    return torch.zeros(length, dtype=torch.int64).index_fill_(0, starts, 1).cumsum(0)


if __name__ == "__main__":
    main()
