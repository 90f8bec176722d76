"""What one optimizer step moves over the data-parallel ranks at each stage of ZeRO, by closed formula.

With P bytes of weights and G bytes of gradients on a rank, and m micro-batches:

    stage 0    all-reduce of G: as much as a reduce-scatter and an all-gather of G
    stage 1    reduce-scatter of G, all-gather of P
    stage 2    m reduce-scatters of G, all-gather of P
    stage 3    m reduce-scatters of G, 2 m all-gathers of P

So with one micro-batch stages 1 and 2 cost what plain data parallelism costs and stage 3 half as much again; with
gradient accumulation, which a pipeline lives on, stages 2 and 3 cost m times their share.

Source: Rajbhandari et al. 2020 (ZeRO), section 7.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron3d.zero.gatherer import Places
from megatron3d.zero.policy import Policy


@dataclass(frozen=True)
class StepVolume:
    """Collectives over the ranks that shard state, in one step of one rank: how often the whole of its gradients
    is reduced and its weights are gathered, and the bytes of the whole tensors."""

    reductions: int
    gathers: int
    reduced_bytes: int
    gathered_bytes: int


def step_volume(policy: Policy, *, num_microbatches: int, weight_bytes: int, gradient_bytes: int) -> StepVolume:
    """The volume of a step; for stage 3 of a model each of whose weights is read in the forward and in the backward.

    Args:
        policy: the stage.
        num_microbatches: of this rank.
        weight_bytes: of the whole (gathered) weights that this rank computes with.
        gradient_bytes: of their gradients in the dtype of the reduction.
    """
    reductions = num_microbatches if policy.shard_grads else 1
    gathers = 2 * num_microbatches if policy.shard_params else int(policy.shard_optimizer)
    return StepVolume(reductions, gathers, reductions * gradient_bytes, gathers * weight_bytes)


def gathered_elements(places: Places, lengths: Mapping[str, int]) -> int:
    """Elements that stage 3 gathers for one micro-batch: what every place reads in its forward and in its backward.

    A table that is only looked up is not read in the backward; a tied one is read at both of its places. Layers that
    are recomputed in groups of several are gathered once more, which is not counted here.

    Args:
        places: of this rank's stages.
        lengths: elements of each unit.
    """
    known = [place for stage in places.values() for place in stage.values()]
    return sum(lengths[name] for place in known for name in (*place.forward, *place.backward))


def pipeline_cost(policy: Policy, volume: StepVolume, *, num_stages: int, dp: int) -> str | None:
    """What sharding gradients or weights costs under a pipeline, in a sentence; None where it costs nothing more."""
    if num_stages == 1 or dp == 1 or not policy.shard_grads:
        return None
    reduced = f"{volume.reductions} reductions of all gradients a step ({_gigabytes(volume.reduced_bytes)}), not 1"
    if not policy.shard_params:
        return f"sharded gradients under a pipeline cost {reduced}; --zero-stage 1 does without"
    gathered = f"{volume.gathers} gathers of all weights ({_gigabytes(volume.gathered_bytes)}), not 1"
    return f"sharded weights under a pipeline cost {reduced} and {gathered}; --zero-stage 1 does without"


def _gigabytes(num_bytes: int) -> str:
    """Decimal gigabytes with three digits."""
    return f"{num_bytes / 1e9:.3g} GB"
