"""FlatLayout: where each parameter of a unit lies in the unit's flat buffers. Pure arithmetic.

Parameters that are treated alike lie side by side, so that every treatment is one contiguous segment: those that
decay before those that do not, within each hidden matrices before the rest, and sharded ones before replicated ones.
Each segment starts at a multiple of `ALIGNMENT` elements, so that segments stay aligned for vector instructions, and
the whole is padded to a multiple of the ranks that sum its gradients, so that every rank's slice is equally long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import lcm, prod

from megatron3d.params.spec import ParamKind, ParamSpec, TpGradient

ALIGNMENT = 32  # elements: 64 bytes of bf16, 128 of fp32
_ORDER: dict[TpGradient, int] = {"sharded": 0, "equal": 1, "partial": 2}


@dataclass(frozen=True)
class Span:
    """A range [start, stop) of elements of a flat buffer."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """Number of elements."""
        return self.stop - self.start

    def intersect(self, other: Span) -> Span:
        """The common part; empty (length 0) where there is none."""
        start = max(self.start, other.start)
        return Span(start, max(start, min(self.stop, other.stop)))

    def shifted(self, by: int) -> Span:
        """The same range `by` elements further on."""
        return Span(self.start + by, self.stop + by)

    @property
    def slice(self) -> slice:
        """The range as an index."""
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class Slot:
    """Where one parameter's local shard lies."""

    spec: ParamSpec
    shape: tuple[int, ...]
    span: Span


@dataclass(frozen=True)
class Segment:
    """A contiguous range of slots that are treated alike."""

    decays: bool
    is_hidden_matrix: bool
    tp_gradient: TpGradient
    tied_copy: bool
    span: Span


@dataclass(frozen=True)
class FlatLayout:
    """The slots and segments of one unit, its padded length, and the kind of its parameters."""

    slots: tuple[Slot, ...]
    segments: tuple[Segment, ...]
    length: int
    kind: ParamKind

    @property
    def trains(self) -> bool:
        """Whether the parameters train; those of one unit all do or are all frozen."""
        return self.slots[0].spec.trains

    @property
    def table_width(self) -> int | None:
        """The length of a row where the unit is one table whose rows are cut over the tensor axis; None elsewhere."""
        slot = self.slots[0]
        is_table = len(self.slots) == 1 and slot.spec.is_table and slot.spec.tp_dim == 0 and len(slot.shape) == 2
        return slot.shape[1] if is_table else None

    def slice_of(self, rank: int, num_ranks: int) -> Span:
        """The equal part of the buffer that belongs to one of `num_ranks` ranks."""
        share = self.length // num_ranks
        return Span(rank * share, (rank + 1) * share)

    def optimizer_spans(self, within: Span) -> list[tuple[bool, Span]]:
        """The parts of `within` that an optimizer treats alike, each with whether its parameters decay: hidden
        matrices, tables and others lie in different ones. Empty parts are left out."""
        spans = []
        for (decays, _), alike in groupby(self.segments, key=lambda one: (one.decays, one.is_hidden_matrix)):
            here = [segment.span for segment in alike]
            common = Span(here[0].start, here[-1].stop).intersect(within)
            if common.length:
                spans.append((decays, common))
        return spans


def _treatment(spec: ParamSpec) -> tuple[bool, bool, int, bool]:
    return (not spec.decays, not spec.is_hidden_matrix, _ORDER[spec.tp_gradient], spec.tied_copy)


def kind_of(specs: Sequence[ParamSpec]) -> ParamKind:
    """The kind of a unit's parameters.

    Raises:
        ValueError: they are of several kinds, so that no one set of ranks could sum their gradients.
    """
    first = specs[0]
    for spec in specs:
        if spec.kind != first.kind:
            raise ValueError(
                f"{first.name} ({first.kind}) and {spec.name} ({spec.kind}) are summed by different ranks and cannot "
                "lie in one unit"
            )
    return first.kind


def flat_layout(specs: Sequence[ParamSpec], *, tp: int, num_ranks: int, whole_rows: bool = False) -> FlatLayout:
    """Lay out the local shards of a unit's parameters.

    Args:
        specs: the unit's parameters, of one kind; their order is kept within a segment.
        tp: ranks that shard each of them.
        num_ranks: ranks that sum their gradients; the length of the buffer becomes a multiple of this.
        whole_rows: whether the slice of each of these ranks is to have whole rows, of a unit that is one table.

    Raises:
        ValueError: the parameters are of several kinds.
    """
    kind = kind_of(specs)
    slots: list[Slot] = []
    segments: list[Segment] = []
    position = 0
    for _, alike in groupby(sorted(specs, key=_treatment), key=_treatment):
        start = position = -(-position // ALIGNMENT) * ALIGNMENT
        for spec in alike:
            shape = spec.local_shape(tp)
            slots.append(Slot(spec, shape, Span(position, position + prod(shape))))
            position += prod(shape)
        spec = slots[-1].spec
        span = Span(start, position)
        segments.append(Segment(spec.decays, spec.is_hidden_matrix, spec.tp_gradient, spec.tied_copy, span))
    layout = FlatLayout(tuple(slots), tuple(segments), position, kind)
    unit = lcm(ALIGNMENT, layout.table_width or 1) if whole_rows else ALIGNMENT
    return replace(layout, length=-(-position // (num_ranks * unit)) * num_ranks * unit)
