"""Gathering: what is gathered, waited for and freed, in which order, by an account of a pretended model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.params.gate import WeightUse
from megatron3d.zero.gatherer import UnitGatherer
from tests.dist.pool import Pool
from tests.parity.runs import Case, parts_of, trace


class Weights:
    """Stands for the buffer of one unit; `there` are those that have memory."""

    def __init__(self, name: str, there: set[str], log: list[str]) -> None:
        self.name, self.there, self.log = name, there, log
        self.arrived = False

    def start_gather(self) -> None:
        if self.name not in self.there:
            self.there.add(self.name)
            self.log.append(f"+{self.name}")

    def finish_gather(self) -> None:
        assert self.name in self.there, f"{self.name} is waited for and nobody sent for it"
        self.arrived = True

    def free(self) -> None:
        if self.name in self.there:
            self.there.discard(self.name)
            self.arrived = False
            self.log.append(f"-{self.name}")


class Model:
    """A tied model of some layers on one stage."""

    def __init__(self, num_layers: int, prefetch: int) -> None:
        self.layers = [f"l{i}" for i in range(num_layers)]
        places = {"embedding": WeightUse(("word", "rest"), ("rest",))}
        places |= {name: WeightUse((name,), (name,)) for name in self.layers}
        places["head"] = WeightUse(("norm", "word"), ("norm", "word"))
        self.places, self.there, self.log = places, set[str](), list[str]()
        units = ["word", "rest", *self.layers, "norm"]
        self.weights = {name: Weights(name, self.there, self.log) for name in units}
        self.gatherer = UnitGatherer(self.weights, {0: places}, releases=True, prefetch=prefetch)
        self.most = 0

    def use(self, place: str, *, backward: bool, inside: Callable[[], None] = lambda: None) -> None:
        self.gatherer.gather_weights(place, backward=backward)
        self.most = max(self.most, len(self.there))
        inside()
        units = self.places[place].backward if backward else self.places[place].forward
        assert all(self.weights[name].arrived for name in units), f"{place} reads what is not there"
        self.gatherer.release_weights(place, backward=backward)

    def forward(self) -> None:
        for place in self.places:
            self.use(place, backward=False)

    def backward(self, recomputes: bool = False) -> None:
        self.gatherer.begin_backward()
        for place in reversed(self.places):
            if recomputes and place in self.layers:
                # A recomputation opens the place and stops before it closes it.
                def again(place: str = place) -> None:
                    self.gatherer.gather_weights(place, backward=False)

                self.use(place, backward=True, inside=again)
            elif place == "embedding":
                self.gatherer.gather_weights(place, backward=True)  # nothing shows that its backward is over
            else:
                self.use(place, backward=True)
        self.gatherer.end_backward(0)


@given(st.integers(1, 6), st.integers(0, 4), st.booleans())
def test_whatever_is_read_is_there_and_in_the_end_nothing_is(num_layers: int, prefetch: int, recomputes: bool) -> None:
    model = Model(num_layers, prefetch)
    for _ in range(2):
        model.forward()
        assert not model.there
        model.backward(recomputes)
        assert not model.there


@given(st.integers(3, 6), st.integers(0, 2))
def test_no_more_is_there_than_the_place_and_those_prefetched(num_layers: int, prefetch: int) -> None:
    model = Model(num_layers, prefetch)
    model.forward()
    model.backward()
    assert model.most <= 2 * (1 + prefetch)  # embedding and head have two units each


@given(st.integers(1, 6), st.integers(0, 3), st.booleans())
def test_every_unit_is_gathered_once_a_use_however_far_ahead(num_layers: int, prefetch: int, recomputes: bool) -> None:
    """The tied table twice in the forward, by both ends, and once in the backward, which looks nothing up."""
    model = Model(num_layers, prefetch)
    model.forward()
    forward = list(model.log)
    model.backward(recomputes)
    backward = model.log[len(forward) :]
    for name in [*model.layers, "norm", "rest"]:
        assert (forward.count(f"+{name}"), backward.count(f"+{name}")) == (1, 1)
    assert (forward.count("+word"), backward.count("+word")) == (2, 1)


def test_the_next_place_is_on_its_way_before_this_one_is_read_in_both_directions() -> None:
    model = Model(2, prefetch=1)
    model.forward()
    assert model.log == [
        *("+word", "+rest", "+l0", "-word", "-rest", "+l1", "-l0"),
        *("+norm", "+word", "-l1", "-norm", "-word"),
    ]
    model.log.clear()
    model.backward()
    assert model.log == ["+norm", "+word", "+l1", "-norm", "-word", "+l0", "-l1", "+rest", "-l0", "-rest"]


def test_a_group_of_recomputed_layers_keeps_the_one_whose_backward_runs() -> None:
    model = Model(3, prefetch=1)
    model.forward()
    model.log.clear()

    def run_the_group_again() -> None:
        for layer in ("l0", "l1"):
            model.use(layer, backward=False)
        model.gatherer.gather_weights("l2", backward=False)
        assert {"l1", "l2"} <= model.there, "what the backward needs now and next stays"

    model.gatherer.begin_backward()
    model.use("l2", backward=True, inside=run_the_group_again)
    model.use("l1", backward=True)
    model.use("l0", backward=True)
    assert [model.log.count(f"+{name}") for name in ("l2", "l1", "l0")] == [1, 1, 2]


def transient_peak(rank: int, world_size: int, stage: int, prefetch: int) -> tuple[int, dict[str, int]]:
    case = Case("gpt2-deep", Layout(dp=2), f"--zero-stage {stage} --zero-prefetch-units {prefetch}")
    parts = parts_of(case, make_mesh(case.layout))
    trace(parts, num_steps=1)
    lengths = {name: 4 * unit.layout.length for name, unit in parts.engine.units.items()}
    return parts.engine.state_bytes().transient_peak, lengths


@pytest.mark.parametrize("prefetch", [0, 1])
def test_a_model_of_eight_layers_holds_a_few_of_them_at_once(pool: Pool, prefetch: int) -> None:
    """Gradients: the tied table's through the whole backward, two units' on their way, and the one that fills."""
    for peak, lengths in pool.run(2, transient_peak, 2, prefetch):
        ends = lengths["embedding.word"] + lengths["embedding"] + lengths["head"]
        assert peak <= ends + 3 * lengths["layers.0"] < sum(lengths.values()) / 2
    for peak, lengths in pool.run(2, transient_peak, 3, prefetch):
        assert peak <= 2 * ends + (4 + prefetch) * lengths["layers.0"] < 2 * sum(lengths.values()) / 2
