"""ParamSpec: the shards of all ranks are the parameter, and the boxes of any range of a shard say where it belongs."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron3d.params.spec import Init, ParamSpec

NORMAL = Init("normal", 0.02)
DEGREES = (1, 2, 4)


def numbered(spec: ParamSpec) -> torch.Tensor:
    """The full parameter with every element numbered from 1, so that padding (0) stands out."""
    return torch.arange(1, spec.numel + 1).view(spec.shape)


@st.composite
def specs(draw: st.DrawFn) -> ParamSpec:
    """Replicated, cut along any dimension, fused parts along dimension 0, or padded along dimension 0."""
    kind = draw(st.sampled_from(["replicated", "cut", "parts", "padded"]))
    shape = list(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    if kind == "replicated":
        return ParamSpec("p", tuple(shape), NORMAL, decays=True)
    if kind == "cut":
        dim = draw(st.integers(0, len(shape) - 1))
        shape[dim] *= 4
        return ParamSpec("p", tuple(shape), NORMAL, decays=True, tp_dim=dim, tp_gradient="sharded")
    if kind == "parts":
        parts = tuple(4 * n for n in draw(st.lists(st.integers(1, 3), min_size=2, max_size=3)))
        shape[0] = sum(parts)
        return ParamSpec("p", tuple(shape), NORMAL, decays=True, tp_dim=0, parts=parts, tp_gradient="sharded")
    padded = 4 * draw(st.integers(1, 5))
    shape[0] = draw(st.integers(1, padded))
    return ParamSpec("p", tuple(shape), NORMAL, decays=True, tp_dim=0, padded_size=padded, tp_gradient="sharded")


@given(specs(), st.sampled_from(DEGREES))
def test_every_shard_has_the_local_shape(spec: ParamSpec, tp: int) -> None:
    for rank in range(tp):
        assert tuple(spec.take(numbered(spec), tp, rank).shape) == spec.local_shape(tp)


@given(specs(), st.sampled_from(DEGREES))
def test_the_shards_of_all_ranks_hold_every_element_once_and_zeros(spec: ParamSpec, tp: int) -> None:
    shards = [spec.take(numbered(spec), tp, rank).flatten() for rank in range(tp)]
    held = torch.cat(shards[:1] if spec.is_replicated else shards)
    assert held[held > 0].sort().values.tolist() == list(range(1, spec.numel + 1))
    padding = prod(spec.local_shape(tp)) * (1 if spec.is_replicated else tp) - spec.numel
    assert int((held == 0).sum()) == padding


@given(specs(), st.sampled_from(DEGREES), st.data())
def test_boxes_of_any_range_of_a_shard_cut_that_range_out_of_the_full_parameter(
    spec: ParamSpec, tp: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, tp - 1))
    shard, full = spec.take(numbered(spec), tp, rank).flatten(), numbered(spec)
    start, stop = sorted(data.draw(st.tuples(st.integers(0, len(shard)), st.integers(0, len(shard)))))
    boxes, covered = spec.boxes(tp, rank, start, stop)
    cut = torch.cat([torch.empty(0, dtype=torch.int64), *(full[box.slices()].flatten() for box in boxes)])
    assert cut.tolist() == shard[start : start + covered].tolist()
    assert torch.count_nonzero(shard[start + covered : stop]) == 0, "only padding lies in no box"
    assert torch.count_nonzero(cut) == covered, "no padding lies in a box"


def test_query_key_and_value_are_each_cut_by_themselves() -> None:
    spec = ParamSpec("qkv", (8, 1), NORMAL, decays=True, tp_dim=0, parts=(4, 2, 2))
    full = torch.arange(8).view(8, 1)
    assert spec.take(full, 2, 0).flatten().tolist() == [0, 1, 4, 6]
    assert spec.take(full, 2, 1).flatten().tolist() == [2, 3, 5, 7]


def test_padding_rows_lie_at_the_end_and_a_rank_may_hold_nothing_but_padding() -> None:
    spec = ParamSpec("embedding", (5, 2), NORMAL, decays=True, tp_dim=0, padded_size=16)
    full = torch.arange(1, 11).view(5, 2)
    assert [spec.cuts(4, rank) for rank in range(4)] == [[(0, 4)], [(4, 5)], [(5, 5)], [(5, 5)]]
    assert spec.take(full, 4, 1).tolist() == [[9, 10], [0, 0], [0, 0], [0, 0]]
    assert spec.boxes(4, 2, 0, 8) == ((), 0)


def test_a_replicated_parameter_has_no_cuts() -> None:
    spec = ParamSpec("norm", (4,), Init("ones"), decays=False)
    assert spec.is_replicated and spec.local_shape(4) == (4,)
    with pytest.raises(ValueError, match="norm is not cut"):
        spec.cuts(4, 0)


def test_naming_a_spec_changes_the_name_alone() -> None:
    spec = ParamSpec("weight", (4, 2), NORMAL, decays=True, tp_dim=1)
    named = spec.named("layers.0.weight")
    assert named.name == "layers.0.weight" and named.named("weight") == spec
