"""What must hold between the options that choose how the kernels of layers are made."""

from __future__ import annotations

from collections.abc import Iterator

from megatron3d.config.sections.lengths import LENGTH_PREFIX, LengthConfig
from megatron3d.config.sections.train import GivenTrain


def compile_rule(train: GivenTrain, lengths: LengthConfig) -> Iterator[str]:
    """Graphs are of one shape each, and are made of the definitions of kernels."""
    if not train.compile:
        return
    if lengths.seq_length_curriculum is not None:
        yield (
            f"--compile compiles blocks for one length of samples, and {LENGTH_PREFIX} {lengths.seq_length_curriculum} "
            "has many; leave out one of the two."
        )
    if train.random_ltd:
        yield (
            "--compile compiles blocks for one length of samples, and with --random-ltd layers see more positions from "
            "step to step; leave out one of the two."
        )
    if train.kernels == "triton":
        yield (
            "--compile makes kernels from their definitions in torch, and --kernels triton asks for those that are "
            "there already; leave out one of the two."
        )
