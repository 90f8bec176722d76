"""Which dropout stream a micro-batch gets: that of its samples, whoever reads them and with how many others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron3d.comm.mesh import Axis
from megatron3d.comm.meter import Meter
from megatron3d.config.sections.model import ModelConfig
from megatron3d.data.batch import GroupedSamples, Samples
from megatron3d.models.stage import MicroBatch
from megatron3d.train.dropout import dropout_note, first_samples, with_dropout
from tests.nn.dense import model_config


@dataclass(frozen=True)
class Numbered(Samples):
    """Samples whose one token is their number in the global batch."""

    def model_inputs(self) -> dict[str, Tensor | None]:
        return {"tokens_BS": self.tokens_BS}


def rank_of(rank: int, size: int) -> Axis:
    return Axis("batch", size, rank, tuple(range(size)), None, Meter())


@given(ranks=st.integers(1, 4), micro=st.integers(1, 3), micros=st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_micro_batches_of_all_ranks_and_groups_get_the_numbers_of_their_samples(
    ranks: int, micro: int, micros: list[int]
) -> None:
    sizes = [count * micro for count in micros]  # samples of a rank in each group
    groups, before = [], 0
    for size in sizes:
        groups.append(torch.arange(before, before + size * ranks).view(ranks, size, 1))
        before += size * ranks
    for rank in range(ranks):
        batch = GroupedSamples(tuple(Numbered(group[rank]) for group in groups))
        found = first_samples(batch, micro, rank_of(rank, ranks))
        assert found == [int(part.tokens_BS[0]) for part in batch.split(micro)]
    alone = Numbered(groups[0][0])
    assert first_samples(alone, micro, rank_of(0, ranks)) == [int(one.tokens_BS[0]) for one in alone.split(micro)]


def test_micro_batches_get_streams_only_where_something_is_dropped() -> None:
    micros = [MicroBatch(torch.zeros(2, 4, dtype=torch.int64)) for _ in range(2)]
    for rates in ({"hidden_dropout": 0.1}, {"attention_dropout": 0.1}):
        given = with_dropout(micros, model_config(**rates), seed=7, first_samples=[4, 6])
        assert [(one.dropout.seed, one.dropout.first_sample) for one in given] == [(7, 4), (7, 6)]
    assert with_dropout(micros, model_config(), seed=7, first_samples=[4, 6]) == micros


def test_the_start_says_where_masks_depend_on_the_layout() -> None:
    def note(device_type: str, **rates: float) -> str | None:
        model: ModelConfig = model_config(**rates)
        return dropout_note(model, device_type)

    assert note("cpu", attention_dropout=0.1) is None and note("cuda", hidden_dropout=0.1) is None
    found = note("cuda", attention_dropout=0.1)
    assert found is not None and found.startswith("--attention-dropout 0.1: the fused attention kernels on cuda draw")
