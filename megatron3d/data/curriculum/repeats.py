"""How many different samples a run with a curriculum is expected to see."""

from __future__ import annotations

from itertools import pairwise

from megatron3d.data.blend import Blend
from megatron3d.data.curriculum.stream import AdmittedSets, Curriculum, Plateau


def expected_distinct(curriculum: Curriculum, num_slots: int) -> float | None:
    """The expected number of different samples among the first `num_slots`; None where it has no short formula.

    On a plateau with m slots for n admitted samples a sample is seen with probability min(1, m/n), and plateaus draw
    independently. Behind a warm-up, a sample is seen with the probability that its number in the plain epochs is
    among those that are left. Of several metrics, only sets that grow have a short formula.
    """
    weights = curriculum.plain.weights if isinstance(curriculum.plain, Blend) else (1,)
    total = 0.0
    for sets, corpus, weight in zip(curriculum.admitted, curriculum.corpora, weights):
        share = weight / sum(weights)
        found = _of_corpus(curriculum, sets, corpus.num_fixed, (share, num_slots))
        if found is None:
            return None
        total += found
    return total


def _of_corpus(curriculum: Curriculum, sets: AdmittedSets, size: int, run: tuple[float, int]) -> float | None:
    share, num_slots = run
    end = num_slots if curriculum.warmup_slots is None else min(num_slots, curriculum.warmup_slots)
    drawn = _plateaus_of(curriculum.plateaus, sets, end)
    if drawn is None:
        return None
    plain = _plain_share(share * end, share * num_slots, size)
    bounds = sorted({0, size, *(count for count, _ in drawn)})
    distinct = 0.0
    for below, reach in pairwise(bounds):
        unseen = 1.0 - plain
        for count, slots in drawn:
            if count >= reach:
                unseen *= 1.0 - min(1.0, share * slots / count)
        distinct += (reach - below) * (1.0 - unseen)
    return distinct


def _plateaus_of(plateaus: tuple[Plateau, ...], sets: AdmittedSets, end: int) -> list[tuple[int, int]] | None:
    """(samples admitted, slots) of each plateau before slot `end`; plateaus of one set together."""
    found: dict[tuple[int, ...], int] = {}
    stops = [*(plateau.first_slot for plateau in plateaus[1:]), end]
    for plateau, stop in zip(plateaus, stops):
        if (slots := min(stop, end) - plateau.first_slot) > 0:
            reaches = sets.reaches(plateau.bounds)
            found[reaches] = found.get(reaches, 0) + slots
    nested = sorted(found)
    if any(a > b for narrow, wide in pairwise(nested) for a, b in zip(narrow, wide)):
        return None
    return [(len(sets.samples(reaches)), slots) for reaches, slots in found.items()]


def _plain_share(first: float, stop: float, size: int) -> float:
    """The share of the samples that the plain stream shows from slot `first` to slot `stop` of a corpus."""
    if stop - first >= size:
        return 1.0
    unseen, begin = 1.0, first
    while begin < stop:  # two epochs at most, whose orders do not know of each other
        end = min(stop, (begin // size + 1) * size)
        unseen *= 1.0 - (end - begin) / size
        begin = end
    return 1.0 - unseen
