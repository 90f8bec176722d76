"""What must hold between --fim-data and the rest of a run; that the tokenizer has the tokens, `data/fim.py` finds.

Each rule yields sentences, as in `rules/run.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron3d.config.options import BY_NAME
from megatron3d.config.sections.data import DataConfig
from megatron3d.config.sections.model import GivenModel


def fim_rule(data: DataConfig, model: GivenModel) -> Iterator[str]:
    """There are texts of a GPT to permute, and fragments have a rate."""
    split, rate = data.fim_split_sample, data.fim_fragment_rate
    if split is None and rate is not None:
        yield f"--fim-fragment-rate {rate:g} is about fragments, which --fim-split-sample makes; give both or none."
    if not data.fim_data:
        return
    if model.traits.samples == "sentences":
        yield "--fim-data permutes texts for a GPT, but this model learns from masked sentences; leave it out."
    if data.mock_data:
        yield "--fim-data cuts texts, but --mock-data has none; give --data-path, or leave it out."
    if data.tokenizer_type is None:
        yield "--fim-data cuts texts, so it needs the tokenizer of the data; give --tokenizer-type with its files."
    if split is not None and rate is None:
        flag = BY_NAME["fim_fragment_rate"].spelling
        yield f"--fim-split-sample {split} makes fragments, but {flag} is missing; give it, such as {flag} 0.5."
