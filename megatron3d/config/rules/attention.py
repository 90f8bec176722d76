"""Which attention backend goes with which other options."""

from __future__ import annotations

from collections.abc import Iterator

from megatron3d.config.sections.data import DataConfig
from megatron3d.config.sections.parallel import ParallelConfig
from megatron3d.config.sections.train import GivenTrain


def attention_backend_rule(train: GivenTrain, data: DataConfig, parallel: ParallelConfig) -> Iterator[str]:
    """Only flash has kernels for parts of a sample; cuDNN needs a GPU."""
    backend = train.attention_backend
    if backend in ("fused", "unfused", "local"):
        if data.reset_attention_mask:
            yield (
                f"--attention-backend {backend} has no attention within documents, which --reset-attention-mask asks "
                "for; use auto or flash."
            )
        if parallel.context_parallel_size > 1:
            yield (
                f"--attention-backend {backend} has no attention over samples that --context-parallel-size "
                f"{parallel.context_parallel_size} cuts; use auto or flash."
            )
    if backend == "fused" and parallel.device == "cpu":
        yield "--attention-backend fused is cuDNN's, which is for CUDA devices, and --device is cpu; use auto."
