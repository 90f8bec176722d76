"""Initial values depend on the seed and the full name alone, never on the cut."""

from __future__ import annotations

import pytest
import torch

from megatron3d.params.init import fill_initial, initial_full, initial_shard
from megatron3d.params.spec import Init, ParamSpec
from tests.largest_result import LargestResult

NORMAL = Init("normal", 0.02)
SPECS = [
    ParamSpec("layers.0.attention.qkv.weight", (32, 6), NORMAL, True, tp_dim=0, parts=(16, 8, 8)),
    ParamSpec("layers.0.mlp.down.weight", (6, 8), NORMAL, True, tp_dim=1),
    ParamSpec("embedding.word.weight", (10, 6), NORMAL, True, tp_dim=0, padded_size=16),
    ParamSpec("embedding.position.weight", (5, 6), NORMAL, True),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_cut_holds_the_same_numbers(spec: ParamSpec, tp: int) -> None:
    whole, filled = initial_full(spec, seed=5), torch.full(spec.shape, float("nan"))
    for rank in range(tp):
        shard = initial_shard(spec, seed=5, tp=tp, tp_rank=rank)
        assert shard.shape == spec.local_shape(tp) and shard.dtype == torch.float32
        boxes, covered = spec.boxes(tp, rank, 0, shard.numel())
        parts = shard.flatten()[:covered].split([box.numel for box in boxes]) if boxes else []
        for box, part in zip(boxes, parts):
            filled[box.slices()] = part.view(box.size)
        assert torch.count_nonzero(shard.flatten()[covered:]) == 0, "padding starts as zero"
    assert torch.equal(filled, whole)


@pytest.mark.parametrize("spec", [*SPECS, ParamSpec("norm", (37,), NORMAL, False)], ids=lambda spec: spec.name)
@pytest.mark.parametrize("tp", [1, 2])
def test_every_range_of_a_shard_holds_its_numbers(spec: ParamSpec, tp: int) -> None:
    for rank in range(tp if spec.tp_dim is not None else 1):
        shard = initial_shard(spec, seed=5, tp=tp, tp_rank=rank).flatten()
        for start in range(0, len(shard), 5):
            for stop in (start, start + 1, start + 7, len(shard)):
                out = torch.full((min(stop, len(shard)) - start,), float("nan"))
                fill_initial(out, spec, seed=5, tp=tp, tp_rank=rank, start=start)
                assert torch.equal(out, shard[start:stop]), (rank, start, stop)


def test_values_do_not_depend_on_the_padding_or_on_the_state_of_torch() -> None:
    narrow = ParamSpec("embedding.word.weight", (10, 6), NORMAL, True, tp_dim=0, padded_size=10)
    before = torch.random.get_rng_state()
    assert torch.equal(initial_full(narrow, seed=5), initial_full(SPECS[2], seed=5))
    assert torch.equal(torch.random.get_rng_state(), before), "the global generator was used"
    torch.manual_seed(99)
    assert torch.equal(initial_full(narrow, seed=5), initial_full(SPECS[2], seed=5))


def test_another_seed_or_another_name_gives_other_values() -> None:
    spec = SPECS[3]
    assert not torch.equal(initial_full(spec, seed=5), initial_full(spec, seed=6))
    assert not torch.equal(initial_full(spec, seed=5), initial_full(spec.named("other"), seed=5))


def test_a_shard_is_memory_of_its_own_and_not_a_view_of_the_whole() -> None:
    shard = initial_shard(SPECS[1], seed=5, tp=4, tp_rank=1)
    assert shard.untyped_storage().nbytes() == shard.numel() * 4


@pytest.mark.parametrize("tp_dim", [0, 1])
def test_a_rank_draws_its_shard_and_no_whole_parameter(tp_dim: int) -> None:
    spec = ParamSpec("w", (2048, 2048), NORMAL, True, tp_dim=tp_dim)
    with LargestResult() as largest:
        shard = initial_shard(spec, seed=5, tp=8, tp_rank=3)
    assert largest.elements == shard.numel()


@pytest.mark.parametrize("std", [0.02, 1.0])
def test_normal_values_have_mean_zero_and_the_standard_deviation_asked_for(std: float) -> None:
    values = initial_full(ParamSpec("w", (400, 500), Init("normal", std), True), seed=1).double()
    error = std / 200000**0.5
    assert abs(values.mean()) < 5 * error
    assert abs(values.std() - std) < 5 * error
    within_one = (values.abs() < std).double().mean()
    assert abs(within_one - 0.6827) < 0.006, "the share within one standard deviation of a normal distribution"


def test_zeros_and_ones_are_zeros_and_ones() -> None:
    assert torch.equal(initial_full(ParamSpec("b", (3,), Init("zeros"), False), seed=1), torch.zeros(3))
    assert torch.equal(initial_full(ParamSpec("w", (3,), Init("ones"), False), seed=1), torch.ones(3))
