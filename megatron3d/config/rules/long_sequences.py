"""What must hold between the options that make room for long sequences on one device."""

from __future__ import annotations

from collections.abc import Iterator

from megatron3d.config.sections.model import GivenModel
from megatron3d.config.sections.train import GivenTrain


def mlp_chunks_rule(model: GivenModel, train: GivenTrain) -> Iterator[str]:
    """Chunks are of dense MLPs, whose second run communicates again."""
    chunks = train.mlp_chunks_for_training
    if chunks == 1:
        return
    if model.has_experts:
        yield (
            f"--mlp-chunks-for-training {chunks} cuts the sequence of dense MLPs, and --num-experts sends tokens to "
            "experts instead, whose capacity and balance are of whole sequences; leave it out, or use "
            "--recompute-granularity full."
        )
    if train.recompute_reuse_communication:
        yield (
            f"--mlp-chunks-for-training {chunks} runs each MLP once more in the backward, which communicates, and "
            "--recompute-reuse-communication asks for none; drop one of them."
        )
