"""Tape: what the operations of a stage allocate and keep, as plain numbers, in the order of its forward.

A `Node` is one entry of autograd's graph: the memory its forward allocates, what it saves for its backward, and what
its backward allocates. Tensors are `Value`s; views share memory, so a value is a number and the memory it lies in.
Nothing here knows of layers (`layers.py`) or of time (`walk.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Value:
    """A tensor that takes a gradient: its number, and the number of the memory it lies in."""

    number: int
    memory: int


@dataclass(frozen=True)
class Node:
    """One operation. All sizes are bytes.

    Attributes:
        name: for people.
        inputs: the tensors it reads and gives gradients to.
        outputs: the tensors it makes.
        saves: memories kept until its backward.
        gradients: what the gradient of each input takes; 0 hands the gradient of the output on.
        in_place: the memory that the gradient of the only input is written into, instead of new memory.
        forward_temporary: taken and given back within the forward.
        backward_temporary: the same within the backward.
        weights_temporary: the same while the gradients of weights are added up, in the backward or put aside.
        weights_gradient: the part of it that is still there when the gradients have been added up.
        keeps_for_weights: memories that work for the gradients of weights holds, with the gradient of the output,
            where a schedule puts it aside.
        reads_gradient: whether work for the gradients of weights that waits for its buffer holds the gradient of the
            output meanwhile, rather than a gradient of `weights_temporary` bytes.
        unit: the flat unit whose weights get gradients here; empty if none does.
        contributions: how many gradients the unit gets.
        reads: memories besides the inputs' that have to live until here.
        place: the place (layer) of the stage whose weights must be there.
        group: number of the recomputed group it belongs to; None keeps what it saves.
    """

    name: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    saves: tuple[int, ...] = ()
    gradients: tuple[int, ...] = ()
    in_place: int | None = None
    forward_temporary: int = 0
    backward_temporary: int = 0
    weights_temporary: int = 0
    weights_gradient: int = 0
    keeps_for_weights: tuple[int, ...] = ()
    reads_gradient: bool = False
    unit: str = ""
    contributions: int = 0
    reads: tuple[int, ...] = ()
    place: str = ""
    group: int | None = None


@dataclass
class Tape:
    """Nodes in order, and the size of every memory by number."""

    nodes: list[Node] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    outside: set[int] = field(default_factory=set)
    _num_values: int = 0
    _place: str = ""
    _group: int | None = None
    _num_groups: int = 0

    def memory(self, size_bytes: int) -> int:
        """A new memory, allocated by the first node that writes or saves it."""
        self.sizes.append(size_bytes)
        return len(self.sizes) - 1

    def value(self, size_bytes: int) -> Value:
        """A new tensor in memory of its own."""
        return self.view(self.memory(size_bytes))

    def view(self, memory: int) -> Value:
        """A new tensor in memory that exists."""
        self._num_values += 1
        return Value(self._num_values - 1, memory)

    def from_outside(self, size_bytes: int) -> Value:
        """A tensor that somebody else allocates and frees, such as the message that a stage receives."""
        value = self.value(size_bytes)
        self.outside.add(value.memory)
        return value

    def add(self, node: Node) -> Value:
        """Append a node and return its first output."""
        self.nodes.append(replace(node, place=self._place, group=self._group))
        return node.outputs[0]

    def elementwise(self, name: str, x: Value, size_bytes: int, **more: Any) -> Value:
        """Append an operation with one input and one output of the same size, whose gradient has that size too."""
        return self.add(Node(name, (x,), (self.value(size_bytes),), gradients=(size_bytes,), **more))

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """Nodes of one place of the stage."""
        self._place, before = place, self._place
        yield
        self._place = before

    @contextmanager
    def recomputed(self, wanted: bool = True) -> Iterator[None]:
        """Nodes that forget what they save and run again in the backward, as one group; nothing if not `wanted`."""
        if not wanted:
            yield
            return
        self._group, self._num_groups = self._num_groups, self._num_groups + 1
        yield
        self._group = None


def runs(nodes: Sequence[Node]) -> list[tuple[int | None, list[Node]]]:
    """The nodes cut where the group changes, each run with its group."""
    cut: list[tuple[int | None, list[Node]]] = []
    for node in nodes:
        if not cut or cut[-1][0] != node.group:
            cut.append((node.group, []))
        cut[-1][1].append(node)
    return cut
