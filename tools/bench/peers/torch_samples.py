"""Samples as a plain training script takes them: slices of a memory-mapped file, with no documents and no epochs."""

from __future__ import annotations

import numpy as np
import torch

from tools.bench.peers.trainee import Trainee, sample_numbers
from tools.bench.peers.work import SAMPLES_PER_STEP, Work


def build(work: Work) -> Trainee:
    """A step reads SAMPLES_PER_STEP samples."""
    tokens = np.memmap(f"{work.corpus}.bin", dtype=np.uint16, mode="r")
    numbers = sample_numbers(work)

    def step() -> float:
        for _ in range(SAMPLES_PER_STEP):
            first = next(numbers) * work.seq_length
            torch.from_numpy(tokens[first : first + work.seq_length + 1].astype(np.int64))
        return 0.0

    return Trainee(step, num_parameters=0)
