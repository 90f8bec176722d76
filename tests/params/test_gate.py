"""WeightGate: weights are gathered before each use and released after it, forwards, backwards and recomputed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron3d.params.gate import WeightGate


class Book:
    """A gatherer that writes down what it is asked."""

    def __init__(self, *, releases: bool = True) -> None:
        self.releases = releases
        self.entries: list[str] = []

    def gather_weights(self, place: str, *, backward: bool) -> None:
        self.entries.append(f"{'b' if backward else 'f'}+{place}")

    def release_weights(self, place: str, *, backward: bool) -> None:
        self.entries.append(f"{'b' if backward else 'f'}-{place}")

    def blocks_of(self, table: nn.Parameter) -> None:
        self.entries.append(f"?{tuple(table.shape)}")


def bound(*, releases: bool = True) -> tuple[WeightGate, Book]:
    gate, book = WeightGate(), Book(releases=releases)
    gate.bind(book)
    return gate, book


def two_places(gate: WeightGate, x: Tensor) -> Tensor:
    for place in ("one", "two"):
        x = gate.close(place, gate.open(place, x).sin())
    return x


def test_an_unbound_gate_passes_the_very_tensor() -> None:
    gate, x = WeightGate(), torch.ones(2)
    assert gate.open("one", x) is x and gate.close("one", x) is x and gate.open("one") is None


def test_places_open_and_close_in_order_and_backwards_the_other_way_round() -> None:
    gate, book = bound()
    x = torch.tensor([0.5, 1.0], requires_grad=True)
    y = two_places(gate, x)
    assert book.entries == ["f+one", "f-one", "f+two", "f-two"]
    book.entries.clear()
    y.sum().backward()
    assert book.entries == ["b+two", "b-two", "b+one", "b-one"]
    expected = torch.tensor([0.5, 1.0], requires_grad=True)
    expected.sin().sin().sum().backward()
    assert torch.equal(x.grad, expected.grad)


def test_a_recomputed_place_opens_inside_its_own_backward() -> None:
    gate, book = bound()
    x = torch.tensor([0.5], requires_grad=True)
    y = checkpoint(two_places, gate, x, use_reentrant=False)
    book.entries.clear()
    y.sum().backward()
    # The second place is asked for, then both run again; recomputation stops when it has what it needs, so that the
    # second place may stay open until its backward is over.
    assert book.entries[:4] == ["b+two", "f+one", "f-one", "f+two"]
    assert book.entries[-3:] == ["b-two", "b+one", "b-one"]


def test_without_gradients_the_forward_opens_and_closes_all_the_same() -> None:
    gate, book = bound()
    with torch.no_grad():
        two_places(gate, torch.ones(1))
    assert book.entries == ["f+one", "f-one", "f+two", "f-two"]


def test_a_place_without_an_input_is_asked_for_again_in_the_backward_and_left_to_the_lender() -> None:
    gate, book = bound()
    weight = torch.ones(2, requires_grad=True)
    assert gate.open("table") is None
    gate.close("table", weight * 2.0).sum().backward()
    assert book.entries == ["f+table", "f-table", "b+table"]


def test_a_lender_that_keeps_the_weights_is_only_asked_before_a_forward() -> None:
    gate, book = bound(releases=False)
    x = torch.ones(1, requires_grad=True)
    opened = gate.open("one", x)
    assert opened is x and gate.close("one", x) is x
    assert book.entries == ["f+one"]
