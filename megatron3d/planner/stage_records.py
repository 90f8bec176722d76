"""What each stage of a run allocates in a forward and a backward, at a cost that does not grow with its depth.

A stage is recorded (`stage_run.py`) with at most three layers of each kind: the first, one that stands for all in the
middle, and the last. The record is cut where the gate of the weights is passed, and the middle is repeated for the
layers that were left out. Layers of a stage are alike but for whether and with which others they are recomputed; where
some parameters are frozen, the whole stage is recorded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from megatron3d.config.run import RunConfig
from megatron3d.config.sections.train import TrainConfig
from megatron3d.models.stage import StagePart
from megatron3d.nn.recompute import plan_recompute
from megatron3d.planner.recording import Event, Kind
from megatron3d.planner.replay import MemoryUse, Steps, Stretch, condensed, left_of
from megatron3d.planner.stage_run import StageRun

MOST_ALIKE = 3  # layers of a kind that are recorded: a first, a middle, a last
_Unit = tuple[int, ...]  # positions of layers that are recomputed as one, or of one layer


@dataclass(frozen=True)
class StageSteps:
    """A record to replay: a forward, its backward (where it is split, the input gradients), the deferred weight
    gradients."""

    forward: Steps
    backward: Steps
    weights: Steps = ()


@dataclass
class StageRecords:
    """The stages of a resolved run on "cpu" or "cuda", each kind recorded when first asked for, whatever the plan."""

    config: RunConfig
    device_type: str
    _known: dict[tuple[object, ...], tuple[Sequence[_Unit], StageSteps]] = field(default_factory=dict)
    _with_frozen: dict[tuple[StagePart, bool], StageSteps] = field(default_factory=dict)

    def of(self, part: StagePart, *, splits: bool = False) -> StageSteps:
        """The record of a stage; `splits` defers weight gradients."""
        if self.config.train.freeze_params:  # by names, so that no two layers need be alike
            if (part, splits) not in self._with_frozen:
                self._with_frozen[part, splits] = _closed(_recorded(self.config, self.device_type, part, splits=splits))
            return self._with_frozen[part, splits]
        units, kinds = _units(self.config.train, len(part.layers))
        shown = _shown(kinds)
        chosen = sorted(set(shown))
        key = (part.is_first, part.is_last, tuple(kinds[i] for i in chosen), splits)
        if key not in self._known:
            self._known[key] = self._record(part, [units[i] for i in chosen], splits=splits)
        recorded, record = self._known[key]
        instances = [
            (recorded[chosen.index(i)], tuple(part.layers[position] for position in unit))
            for i, unit in zip(shown, units, strict=True)
        ]
        return _closed(_repeated(record, instances))

    def _record(self, part: StagePart, units: Sequence[_Unit], *, splits: bool) -> tuple[list[_Unit], StageSteps]:
        """Record a stage of these units alone."""
        train = self.config.train
        if train.recompute_method == "block":
            train = replace(train, recompute_num_layers=min(MOST_ALIKE, train.recompute_num_layers or 1))
        short = StagePart(range(sum(len(unit) for unit in units)), part.is_first, part.is_last)
        found, _ = _units(train, len(short.layers))
        assert [len(unit) for unit in found] == [len(unit) for unit in units], f"{found} are not like {units}"
        return found, _recorded(replace(self.config, train=train), self.device_type, short, splits=splits)


def _recorded(config: RunConfig, device_type: str, part: StagePart, *, splits: bool) -> StageSteps:
    record = StageRun(config, device_type).record(part, splits=splits)
    return StageSteps(*(condensed(events) for events in (record.forward, record.backward, record.weights)))


def _units(train: TrainConfig, num_layers: int) -> tuple[list[_Unit], list[tuple[bool, int]]]:
    """Positions of the layers of a stage by what is repeated, and whether each is recomputed, with its size."""
    units: list[_Unit] = []
    kinds: list[tuple[bool, int]] = []
    for group in plan_recompute(
        num_layers,
        granularity=train.recompute_granularity,
        method=train.recompute_method,
        layers_each=train.recompute_num_layers,
    ):
        for unit in [tuple(group.layers)] if group.recompute else [(i,) for i in group.layers]:
            units.append(unit)
            kinds.append((group.recompute, len(unit)))
    return units, kinds


def _shown(kinds: Sequence[tuple[bool, int]]) -> list[int]:
    """For each unit the one that is recorded in its place: itself at either end of those of its kind, else the second
    of them."""
    shown = []
    for i, kind in enumerate(kinds):
        first = next(j for j in range(i, -1, -1) if j == 0 or kinds[j - 1] != kind)
        last = next(j for j in range(i, len(kinds)) if j + 1 == len(kinds) or kinds[j + 1] != kind)
        shown.append(i if i in (first, last) else first + 1)
    return shown


# --- Repeating -------------------------------------------------------------------------------------------------------

_Instances = Sequence[tuple[_Unit, tuple[int, ...]]]  # recorded unit, and the numbers of the layers it stands for


def _repeated(record: StageSteps, instances: _Instances) -> StageSteps:
    """The record with each unit in the place of every one that it stands for."""
    backwards = [(unit[::-1], layers[::-1]) for unit, layers in reversed(instances)]
    forward = _with_repeats(record.forward, instances, Kind.ENTER)
    backward = _with_repeats(record.backward, backwards, Kind.ENTER_BACKWARD)
    weights = _with_repeats(record.weights, backwards, Kind.DEFERRED)
    return StageSteps(forward, backward, weights)


def _with_repeats(events: Steps, instances: _Instances, cut: Kind) -> Steps:
    """Cut events where the first layer of each unit is come to, and put the cuts together again."""
    if not events or not instances:
        return tuple(events)
    inner = {_place(layer) for unit, _ in instances for layer in unit[1:]}
    starts: dict[str, int] = {}
    for position, event in enumerate(events):
        if isinstance(event, Event) and event.kind is cut and event.name not in inner:
            starts.setdefault(event.name, position)
    ends = dict(pairwise([*starts.values(), len(events)]))
    names = [_place(unit[0]) for unit, _ in instances]
    found = list(events[: starts[names[0]]])
    for name, (unit, layers) in zip(names, instances, strict=True):
        real = {_place(one): _place(layer) for one, layer in zip(unit, layers, strict=True)}
        cut_out = events[starts[name] : ends[starts[name]]]
        found += [_renamed(event, real) for event in cut_out]
    return (*found, *events[ends[starts[names[-1]]] :])


def _renamed(step: Event | Stretch, real: Mapping[str, str]) -> Event | Stretch:
    """The step with the name of the layer that it stands for."""
    if isinstance(step, Stretch) or real.get(step.name, step.name) == step.name:
        return step
    return Event(step.kind, name=real[step.name])


def _closed(record: StageSteps) -> StageSteps:
    """The record with all that is left in the end freed: deferred work holds what it needs until the last is done."""
    if not record.weights:
        return record
    left = left_of((*record.forward, *record.backward, *record.weights))
    freed = Stretch(MemoryUse(), MemoryUse(-left.activations, -left.work))
    return replace(record, weights=(*record.weights, freed))


def _place(layer: int) -> str:
    return f"layers.{layer}"
