"""What a run has read of which corpus, and how a resumed run continues when the blend has changed.

A checkpoint stores every corpus that the run has trained on, by content, and the segments of its blend (`blend.py`). A
corpus has a number, its place in that list, for as long as the run lives: the number seeds the order of its samples,
and its samples are counted on over all segments. So corpora may be renamed, named in another order, weighted
differently, left out and taken up again, and none of their samples is repeated or lost.

A resume with other weights begins a segment at the sample that is next; with equal ones everything stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

from megatron3d.data.blend import BlendOrder, BlendSegment, integer_weights
from megatron3d.data.content import CorpusContent
from megatron3d.errors import MisfitError


@dataclass(frozen=True)
class KnownCorpus:
    """A corpus that a run has read: where it lay last, and its digest, None in runs of versions without digests."""

    prefix: str
    digest: str | None


@dataclass(frozen=True)
class BlendHistory:
    """The corpora of a run by number, and the segments of its blend with a weight for each of them."""

    corpora: tuple[KnownCorpus, ...]
    segments: tuple[BlendSegment, ...]

    @classmethod
    def begun(cls, corpora: Sequence[CorpusContent], weights: Sequence[int]) -> BlendHistory:
        """That of a run from its first sample on."""
        known = tuple(KnownCorpus(one.prefix, one.digest) for one in corpora)
        return cls(known, (BlendSegment(0, tuple(weights)),))

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> BlendHistory:
        """What `to_json` gave. Raises: ValueError if it is damaged."""
        try:
            corpora = tuple(KnownCorpus(**one) for one in stored["corpora"])
            segments = tuple(BlendSegment(one["first_sample"], tuple(one["weights"])) for one in stored["segments"])
            numbers = [number for one in segments for number in (one.first_sample, *one.weights)]
            if any(type(number) is not int or number < 0 for number in numbers):
                raise ValueError(f"segments {segments}")
            if any(len(one.weights) != len(corpora) for one in segments):
                raise ValueError(f"{len(corpora)} corpora and segments {segments}")
            BlendOrder(segments)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the blend of the training data is damaged ({error})") from error
        return cls(corpora, segments)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)

    def with_segment(self, first_sample: int, weights: Mapping[int, int], more: Sequence[KnownCorpus]) -> BlendHistory:
        """The same with the corpora `more`, and other weights by number from a sample on."""
        corpora = (*self.corpora, *more)
        padding = (0,) * len(more)
        kept = [replace(one, weights=one.weights + padding) for one in self.segments if one.first_sample < first_sample]
        now = BlendSegment(first_sample, tuple(weights.get(number, 0) for number in range(len(corpora))))
        return BlendHistory(corpora, (*kept, now))


@dataclass(frozen=True)
class ContinuedBlend:
    """The blend of a resumed run: `numbers` has that of each corpus in the order of this run's options."""

    history: BlendHistory
    numbers: tuple[int, ...]
    lines: tuple[str, ...] = ()

    @property
    def is_as_begun(self) -> bool:
        """Whether it is what a run with these options reads from its first sample on."""
        places = tuple(range(len(self.numbers)))
        return self.numbers == places and len(self.history.segments) == 1 and len(self.history.corpora) == len(places)


def continued_blend(
    before: BlendHistory, corpora: Sequence[CorpusContent], weights: Sequence[int], consumed_samples: int
) -> ContinuedBlend:
    """The blend of a run with these corpora and integer weights that continues `before` at a number of samples.

    Where weights differ from those of the last segment, another one begins there, and `lines` say what changes.
    """
    numbers = numbers_of(before.corpora, corpora)
    now = dict(zip(numbers, weights, strict=True))
    last = before.segments[-1].weights
    if now == {number: weight for number, weight in enumerate(last) if weight}:
        places = dict(zip(numbers, corpora, strict=True))
        known = [
            KnownCorpus(places[number].prefix, places[number].digest) if number in places else one
            for number, one in enumerate(before.corpora)
        ]
        return ContinuedBlend(replace(before, corpora=tuple(known)), numbers)
    first_new = len(before.corpora)
    known = [KnownCorpus(one.prefix, one.digest) for one in corpora]
    more = [one for number, one in sorted(zip(numbers, known, strict=True), key=_number) if number >= first_new]
    history = before.with_segment(consumed_samples, now, more)
    lines = _change_lines(before, history, dict(zip(numbers, known, strict=True)), consumed_samples)
    return ContinuedBlend(history, numbers, tuple(lines))


def numbers_of(known: Sequence[KnownCorpus], corpora: Sequence[CorpusContent]) -> tuple[int, ...]:
    """The number of each corpus among those that a run has read; new ones get the numbers after them, in order.

    A corpus is known by its content, of equal ones by its prefix, and else the first of them comes first. Where no
    digest was stored, the prefix decides.
    """
    found: dict[int, int] = {}
    for is_same in (_is_same_file, _is_same_content):
        for place, one in enumerate(corpora):
            matches = (n for n, other in enumerate(known) if n not in found.values() and is_same(other, one))
            if place not in found and (number := next(matches, None)) is not None:
                found[place] = number
    new = [place for place in range(len(corpora)) if place not in found]
    found |= {place: len(known) + count for count, place in enumerate(new)}
    return tuple(found[place] for place in range(len(corpora)))


def implied_history(
    saved: Sequence[CorpusContent], corpora: Sequence[CorpusContent], num_tokens: Sequence[int]
) -> BlendHistory:
    """The history of a run of a version that stored none: its corpora with their shares, as one segment.

    Shares by size are those of this run's corpora, of which `num_tokens` are known.

    Raises: MisfitError if the size of a corpus decided and it is not among this run's.
    """
    known = [KnownCorpus(one.prefix, one.digest) for one in saved]
    sizes = dict(zip(numbers_of(known, corpora), num_tokens, strict=True))
    weights: list[Fraction | int] = []
    for number, one in enumerate(saved):
        if one.share == "by size" and number not in sizes:
            raise MisfitError(
                f"the checkpoint is of a version that did not store the weights of its blend, and {one.prefix}, whose "
                "size decided its share, is not among the corpora of this run; name it among them for one more "
                "checkpoint, which stores them"
            )
        weights.append({"all": 1, "by size": sizes.get(number, 0)}.get(one.share) or Fraction(one.share))
    return BlendHistory(tuple(known), (BlendSegment(0, integer_weights(weights)),))


def _is_same_file(known: KnownCorpus, corpus: CorpusContent) -> bool:
    return known.prefix == corpus.prefix and (known.digest is None or known.digest == corpus.digest)


def _is_same_content(known: KnownCorpus, corpus: CorpusContent) -> bool:
    return known.digest is not None and known.digest == corpus.digest


def _number(pair: tuple[int, KnownCorpus]) -> int:
    return pair[0]


def _change_lines(
    before: BlendHistory, history: BlendHistory, now: Mapping[int, KnownCorpus], consumed_samples: int
) -> list[str]:
    """What a segment changes: each corpus that is read before or after it, with its shares and samples served."""
    old, new = before.segments[-1].weights, history.segments[-1].weights
    served = BlendOrder(before.segments).served(consumed_samples)
    lines = [
        f"the blend of the training data changes after {consumed_samples} samples; each corpus continues after those "
        "that it has served:"
    ]
    for number, one in enumerate(history.corpora):
        is_new = number >= len(before.corpora)
        share_before = 0.0 if is_new else old[number] / sum(old)
        share_now = new[number] / sum(new)
        if share_before or share_now:
            count = 0 if is_new else served[number]
            prefix = now.get(number, one).prefix
            lines.append(f"  {prefix}: {share_before:.4%} before, {share_now:.4%} now, {count} samples served")
    return lines
