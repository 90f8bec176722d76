"""What each stage of a run allocates in a forward and a backward, at a cost that does not grow with its depth.

A stage is recorded (`stage_run.py`) with at most three layers of each kind: the first, one that stands for all in the
middle, and the last. The record is cut where the gate of the weights is passed, and the middle is repeated for the
layers that were left out. Layers of a stage are alike but for whether and with which others they are recomputed, which
of their parameters are frozen, how many experts they have, and whether they drop tokens. Where all before it is frozen,
a layer with something that trains is the first of its kind, so that the layers into which a gradient goes are never
mistaken for others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from types import MappingProxyType

from megatron3d.config.random_ltd import dropping_layers
from megatron3d.config.run import RunConfig
from megatron3d.config.sections.model import ModelConfig
from megatron3d.config.sections.train import TrainConfig
from megatron3d.models.stage import StagePart
from megatron3d.models.zoo import architecture_of
from megatron3d.nn.recompute import plan_recompute
from megatron3d.planner.recording import Event, Kind
from megatron3d.planner.replay import Interval, MemoryUse, Steps, condensed, left_of
from megatron3d.planner.stage_run import StageRun
from megatron3d.tensor.context import unsharded_context
from megatron3d.zero.cut_tables import Blocks

MOST_ALIKE = 3  # layers of a kind that are recorded: a first, a middle, a last
_Unit = tuple[int, ...]  # positions of layers that are recomputed as one, or of one layer


@dataclass(frozen=True)
class _Kind:
    """How a unit differs from others: whether it is recomputed, and of each layer the names of what is frozen, how many
    experts it has, whether it drops tokens, and how it attends over context-parallel ranks."""

    recompute: bool
    frozen: tuple[frozenset[str], ...]
    experts: tuple[int, ...]
    drops: tuple[bool, ...]
    exchanges: tuple[str, ...]


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

    def of(
        self, part: StagePart, *, splits: bool = False, blocks: Mapping[str, Blocks] = MappingProxyType({})
    ) -> StageSteps:
        """The record of a stage; `splits` defers weight gradients, and `blocks` are those of its units that are tables
        which come in blocks."""
        frozen, frozen_ends = self._frozen_of(part)
        units = _units(self.config.train, len(part.layers))
        experts = [self.config.model.experts_of(layer) for layer in part.layers]
        drops = self._drops_in(part.layers)
        exchanges = [self.config.parallel.context_kind_of(layer) for layer in part.layers]
        kinds = [
            _Kind(
                recompute,
                tuple(frozen[i] for i in unit),
                tuple(experts[i] for i in unit),
                tuple(drops[i] for i in unit),
                tuple(exchanges[i] for i in unit),
            )
            for unit, recompute in units.items()
        ]
        shown = _shown(kinds)
        chosen = sorted(set(shown))
        key = (part.is_first, part.is_last, frozen_ends, tuple(kinds[i] for i in chosen), splits, *blocks.items())
        if key not in self._known:
            how = partial(StageRun, device_type=self.device_type, blocks=blocks)
            self._known[key] = self._record(part, [kinds[i] for i in chosen], frozen_ends, how, splits=splits)
        recorded, record = self._known[key]
        instances = [
            (recorded[chosen.index(i)], tuple(part.layers[position] for position in unit))
            for i, unit in zip(shown, units, strict=True)
        ]
        return _closed(_repeated(record, instances))

    def _drops_in(self, layers: Sequence[int]) -> list[bool]:
        """Whether each of the layers drops tokens."""
        train = self.config.train
        chosen = dropping_layers(train.random_ltd_layers, self.config.model.num_layers) if train.random_ltd else ()
        return [layer in chosen for layer in layers]

    def _frozen_of(self, part: StagePart) -> tuple[list[frozenset[str]], frozenset[str]]:
        """What is frozen of a stage: of each layer the names in it, and the full names outside of layers."""
        if not self.config.train.freeze_params:
            return [frozenset()] * len(part.layers), frozenset()
        build = architecture_of(self.config.model).build_stage
        stage = build(self.config.model, self.config.train, part, unsharded_context())
        frozen: dict[str, set[str]] = {}
        for name, declared in stage.parameters_by_name().items():
            if not declared.spec.trains:
                frozen.setdefault(_place_of(name), set()).add(name)
        in_layers = [
            frozenset(name.removeprefix(f"{place}.") for name in frozen.pop(place, ()))
            for place in map(_place, part.layers)
        ]
        return in_layers, frozenset().union(*frozen.values())

    def _record(
        self,
        part: StagePart,
        kinds: Sequence[_Kind],
        frozen_ends: frozenset[str],
        run_of: Callable[[RunConfig], StageRun],
        *,
        splits: bool,
    ) -> tuple[list[_Unit], StageSteps]:
        """Record a stage of units of these kinds alone."""
        train, layers = self.config.train, [names for kind in kinds for names in kind.frozen]
        if train.recompute_method == "block":
            train = replace(train, recompute_num_layers=max(1, sum(kind.recompute for kind in kinds)))
        if train.freeze_params:
            of_layers = [f"{_place(i)}.{name}" for i, names in enumerate(layers) for name in names]
            train = replace(train, freeze_params=(*of_layers, *frozen_ends))
        if train.random_ltd:
            drops = [dropped for kind in kinds for dropped in kind.drops]
            of_layers = [str(i) for i, dropped in enumerate(drops) if dropped]
            train = replace(train, random_ltd=any(drops), random_ltd_layers=tuple(of_layers))
        short = StagePart(range(len(layers)), part.is_first, part.is_last)
        found = _units(train, len(layers))
        assert [len(unit) for unit in found] == [len(kind.frozen) for kind in kinds], f"{found} are not like {kinds}"
        exchanges = tuple(exchange for kind in kinds for exchange in kind.exchanges)
        parallel = replace(self.config.parallel, cp_comm_type=exchanges)
        config = replace(self.config, model=self._with_experts_in(kinds), parallel=parallel, train=train)
        return [*found], _recorded(run_of(config), short, splits=splits)

    def _with_experts_in(self, kinds: Sequence[_Kind]) -> ModelConfig:
        """The model with experts in those of its first layers that stand for layers with experts."""
        model = self.config.model
        if not model.has_experts:
            return model
        experts = [count for kind in kinds for count in kind.experts]
        has_experts = [int(count > 0) for count in experts]
        counts = tuple(str(count) for count in experts if count) if model.num_experts_by_layer else ()
        rest = model.num_layers - len(has_experts)
        return replace(model, moe_layer_freq=f"{has_experts}+[0]*{rest}", num_experts_by_layer=counts)


def _recorded(run: StageRun, part: StagePart, *, splits: bool) -> StageSteps:
    record = run.record(part, splits=splits)
    return StageSteps(*(condensed(events) for events in (record.forward, record.backward, record.weights)))


def _units(train: TrainConfig, num_layers: int) -> dict[_Unit, bool]:
    """Positions of the layers of a stage by what is repeated, and whether each is recomputed."""
    units = {}
    for group in plan_recompute(
        num_layers,
        granularity=train.recompute_granularity,
        method=train.recompute_method,
        layers_each=train.recompute_num_layers,
    ):
        for unit in [tuple(group.layers)] if group.recompute else [(i,) for i in group.layers]:
            units[unit] = group.recompute
    return units


def _shown(kinds: Sequence[_Kind]) -> list[int]:
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
    """Cut events where a layer of each unit is first come to, and put the cuts together again."""
    unit_of = {_place(layer): unit for unit, _ in instances for layer in unit}
    starts: dict[_Unit | str, int] = {}
    for position, event in enumerate(events):
        if isinstance(event, Event) and event.kind is cut:
            starts.setdefault(unit_of.get(_place_of(event.name), event.name), position)
    seen = [(unit, layers) for unit, layers in instances if unit in starts]  # where all is frozen, some are not
    if not seen:
        return tuple(events)
    ends = dict(pairwise([*starts.values(), len(events)]))
    found = list(events[: starts[seen[0][0]]])
    for unit, layers in seen:
        real = {_place(one): _place(layer) for one, layer in zip(unit, layers, strict=True)}
        found += [_renamed(event, real) for event in events[starts[unit] : ends[starts[unit]]]]
    return (*found, *events[ends[starts[seen[-1][0]]] :])


def _renamed(step: Event | Interval, real: Mapping[str, str]) -> Event | Interval:
    """The step with the name of the layer, or of a unit of the layer, that it stands for."""
    if isinstance(step, Interval):
        return step
    place = _place_of(step.name)
    if real.get(place, place) == place:
        return step
    return Event(step.kind, name=real[place] + step.name.removeprefix(place))


def _closed(record: StageSteps) -> StageSteps:
    """The record with all that is left at the end freed: deferred work holds what it needs until the last is done."""
    if not record.weights:
        return record
    left = left_of((*record.forward, *record.backward, *record.weights))
    freed = Interval(MemoryUse(), MemoryUse(-left.activations, -left.work))
    return replace(record, weights=(*record.weights, freed))


def _place(layer: int) -> str:
    return f"layers.{layer}"


def _place_of(name: str) -> str:
    """The layer that a unit or a parameter belongs to, or, where it belongs to none, the first word of its name."""
    words = name.split(".")
    return ".".join(words[:2]) if words[0] == "layers" else words[0]
