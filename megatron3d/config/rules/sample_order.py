"""What must hold between --sample-order and the rest of a run. Each rule yields sentences, as in `rules/run.py`."""

from __future__ import annotations

from collections.abc import Iterator

from megatron3d.config.sections.data import DataConfig
from megatron3d.config.sections.model import GivenModel

_SEEDS = 2**32  # numpy's RandomState takes no larger ones


def sample_order_rule(data: DataConfig, model: GivenModel) -> Iterator[str]:
    """Megatron-LM's order is one of token rows of files, and its options stand with it."""
    if data.sample_order != "megatron":
        for flag, value in (
            ("--sample-order-samples", data.sample_order_samples),
            ("--sample-order-consumed", data.sample_order_consumed),
        ):
            if value:
                yield f"{flag} {value} is about --sample-order megatron, which is not given; add it, or leave it out."
        return
    if model.traits.samples == "sentences":
        yield (
            "--sample-order megatron is the order of the samples of a GPT, but this model learns from masked "
            "sentences, whose samples are not those of Megatron-LM; leave it out."
        )
    if data.mock_data:
        yield "--sample-order megatron is an order of token files, but --mock-data reads none; leave one of them out."
    if data.seed >= _SEEDS:
        yield f"--seed {data.seed} cannot draw --sample-order megatron; use one below {_SEEDS}, as in Megatron-LM."
