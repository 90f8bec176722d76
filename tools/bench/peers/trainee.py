"""What a peer's module builds: something that can be asked for steps, on the same random tokens as all others.

Where samples are compared, a step reads SAMPLES_PER_STEP of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from tools.bench.peers.work import LEARNING_RATE, SAMPLES_PER_STEP, WEIGHT_DECAY, Work


@dataclass(frozen=True)
class Trainee:
    """A model with its optimizer.

    Attributes:
        step: makes one training step and returns the loss before it.
        num_parameters: of this process.
        sent_bytes: what this process sent in its last step, by axis and collective; None where the peer does not count.
    """

    step: Callable[[], float]
    num_parameters: int
    sent_bytes: Callable[[], dict[str, float]] | None = None


def tokens_and_labels(work: Work) -> tuple[torch.Tensor, torch.Tensor]:
    """The step's sequences of all ranks: token ids [N, S] and the ids that follow them [N, S]."""
    generator = torch.Generator().manual_seed(1)
    ids_NS = torch.randint(work.vocab_size, (work.num_sequences, work.seq_length + 1), generator=generator)
    return ids_NS[:, :-1].contiguous(), ids_NS[:, 1:].contiguous()


def own_sequences(work: Work) -> tuple[torch.Tensor, torch.Tensor]:
    """What this rank reads of them [B, S]: its part of data parallelism, else all."""
    begin = dist.get_rank() * work.micro_batch if work.is_data_parallel and dist.is_initialized() else 0
    end = begin + work.micro_batch if work.is_data_parallel else work.num_sequences
    tokens_NS, labels_NS = tokens_and_labels(work)
    return tokens_NS[begin:end], labels_NS[begin:end]


def num_samples(work: Work) -> int:
    """Samples of one epoch of the work's corpus, of 16-bit tokens; the last one is left out, it may be short."""
    return Path(f"{work.corpus}.bin").stat().st_size // 2 // work.seq_length - 1


def sample_numbers(work: Work) -> Iterator[int]:
    """Which samples are read, at random and without end."""
    random = np.random.default_rng(1)
    while True:
        yield from random.integers(num_samples(work), size=SAMPLES_PER_STEP).tolist()


def cross_entropy(logits_BSV: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
    """The mean loss."""
    return nn.functional.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten())


def autocast(work: Work) -> AbstractContextManager[object]:
    """torch's mixed precision on a CPU, off in fp32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=work.dtype == "bf16")


def fused_adamw(model: nn.Module) -> torch.optim.AdamW:
    """The optimizer of every peer that brings none of its own."""
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)


def module_trainee(model: nn.Module, logits_of: Callable[[torch.Tensor], torch.Tensor], work: Work) -> Trainee:
    """A plain module: autocast, cross-entropy of its logits [B, S, V], backward, fused AdamW."""
    tokens_BS, labels_BS = tokens_and_labels(work)
    optimizer = fused_adamw(model)

    def step() -> float:
        with autocast(work):
            loss = cross_entropy(logits_of(tokens_BS), labels_BS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return Trainee(step, sum(p.numel() for p in model.parameters()))
