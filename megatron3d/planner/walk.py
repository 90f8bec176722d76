"""Walk: how much memory one step of a stage takes and leaves, from its tape: the clerk of autograd's book-keeping.

Forward: a tensor lives until its last reader has run, or, if it is saved, until the backward of the node that saved
it. Backward: nodes run in the reverse of their order; each allocates the gradients of its inputs, then lets go of the
gradients of its outputs and of what it saved; gradients that meet add up in place where nobody else holds the first.
A recomputed group forgets what it saves, and its backward begins with its forward, up to the last tensor it lacks.

Source: torch's engine (`torch/csrc/autograd`), whose order on one thread is that of the sequence numbers of nodes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from megatron3d.planner.layers import StageTape
from megatron3d.planner.sharing import Sharing
from megatron3d.planner.tape import Node, runs


@dataclass(frozen=True)
class Moment:
    """What is allocated at one moment besides the state, in bytes.

    Attributes:
        activations: tensors of forwards, kept for their backwards or in use.
        work: gradients of activations, and temporaries of operations.
        sharing: gathered weights and whole-unit gradients under ZeRO.
        messages: tensors that arrive from or leave for other stages.
    """

    activations: int = 0
    work: int = 0
    sharing: int = 0
    messages: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.activations + self.work + self.sharing + self.messages

    def __add__(self, other: Moment) -> Moment:
        return Moment(
            self.activations + other.activations,
            self.work + other.work,
            self.sharing + other.sharing,
            self.messages + other.messages,
        )


@dataclass(frozen=True)
class StepMemory:
    """One step: its highest moment and what it leaves, both beside what was there before it."""

    peak: Moment
    left: Moment


@dataclass
class StageWalk:
    """One stage's forward, then its backward or the two halves of it, each at most once and in this order."""

    stage: StageTape
    sharing: Sharing
    _bytes: dict[int, int] = field(default_factory=dict)
    _holds: Counter[int] = field(default_factory=Counter)
    _grads: dict[int, int] = field(default_factory=dict)
    _of_work: set[int] = field(default_factory=set)
    _aside: list[tuple[Node, tuple[int, ...]]] = field(default_factory=list)
    _activations: int = 0
    _work: int = 0
    _peak: Moment = field(default_factory=Moment)
    _next: int = 0

    def __post_init__(self) -> None:
        tape = self.stage.tape
        self._bytes = dict(enumerate(tape.sizes))
        self._next = len(tape.sizes)
        for memory in tape.outside:  # held and counted by whoever allocated it
            self._bytes[memory], self._holds[memory] = 0, 1

    def forward(self) -> StepMemory:
        """The forward, whose output somebody holds until the backward."""
        before = self._start()
        readers = _readers(self.stage.tape.nodes)
        readers[self.stage.y.memory] += 1
        for group, nodes in runs(self.stage.tape.nodes):
            if group is not None:
                self._hold(_from_before(nodes))
            self._run(nodes, readers, keeps=group is None)
        return self._end(before)

    def backward(self, *, splits: bool, is_last: bool = True) -> StepMemory:
        """The backward, with the gradient of the output allocated by others; `splits` puts weight gradients aside, and
        `is_last` says that no more gradients of weights will come in this training step."""
        before = self._start()
        contributions = Counter[str]()
        for node in self.stage.tape.nodes:
            contributions[node.unit] += 0 if splits else node.contributions
        self.sharing.begin_backward(contributions, is_last=is_last)
        # Whoever handed the gradient of the output in holds it too, so nothing is added to it in place.
        root = self._new_gradient(0)
        self._hold([root])
        self._grads = {self.stage.y.number: root}
        for group, nodes in reversed(runs(self.stage.tape.nodes)):
            again = nodes if group is None else self._again(nodes)
            self._backward(again, splits=splits)
            if group is not None:
                self._drop(_from_before(nodes))
        for gradient in self._grads.values():
            self._drop([gradient])
        self._drop([self.stage.y.memory])
        self.sharing.end_backward()
        return self._end(before)

    def weight_gradients(self, *, is_last: bool = True) -> StepMemory:
        """The half of a split backward that was put aside."""
        before = self._start()
        contributions = Counter[str]()
        for node, _ in self._aside:
            contributions[node.unit] += node.contributions
        self.sharing.begin_backward(contributions, is_last=is_last)
        for node, _ in self._aside:
            self.sharing.arrive(node.unit)
            self._note(node.weights_temporary if node.keeps_for_weights else 0)
            self.sharing.contribute(node.unit, node.contributions)
            self._note(node.weights_gradient if node.keeps_for_weights else 0)
        for _, held in self._aside:
            self._drop(held)
        self._aside = []
        self.sharing.end_backward()
        return self._end(before)

    # --- Nodes ---------------------------------------------------------------------------------------------------

    def _run(self, nodes: Sequence[Node], readers: Counter[int], *, keeps: bool) -> None:
        """Nodes of a forward; `readers` counts those to come of each memory."""
        for node, following in zip(nodes, [*nodes[1:], None], strict=True):
            self.sharing.enter(node.place)
            self._note(0)
            made = {*node.saves, *(value.memory for value in node.outputs)}
            self._hold(made)
            self._note(node.forward_temporary)
            self._hold(node.saves if keeps else ())
            for memory in {value.memory for value in node.outputs if not _is_view(node, value.memory)}:
                self._holds[memory] += readers[memory]
            self._drop(made)
            self._drop((*(value.memory for value in node.inputs), *node.reads))
            if following is None or following.place != node.place:
                self.sharing.leave(node.place)

    def _again(self, nodes: Sequence[Node]) -> list[Node]:
        """Run a group's forward once more, with memory of its own, and return the nodes that refer to it."""
        last = max((i for i, node in enumerate(nodes) if node.saves), default=-1)
        lacking, outside = list(nodes[: last + 1]), set(_from_before(nodes))
        fresh: dict[int, int] = {}

        def own(memory: int) -> int:
            if memory in outside or memory in self.stage.tape.outside:
                return memory
            if memory not in fresh:
                fresh[memory], self._next = self._next, self._next + 1
                self._bytes[fresh[memory]] = self._bytes[memory]
            return fresh[memory]

        again = [_with_memories(node, own) for node in nodes]
        self._hold(outside)
        readers = _readers(again[: len(lacking)])
        for memory in outside:
            self._holds[memory] += readers[memory]
        if lacking:
            self._enter_backward(nodes[-1].place)
            self._run(again[: len(lacking)], readers, keeps=True)
        self._drop(outside)
        return again

    def _backward(self, nodes: Sequence[Node], *, splits: bool) -> None:
        before = ""
        for node in reversed(nodes):
            if node.place != before:
                self._leave_backward(before)
                self._enter_backward(node.place)
                before = node.place
            self._backward_of(node, splits=splits)
        self._leave_backward(before)

    def _enter_backward(self, place: str) -> None:
        if place:
            self.sharing.enter_backward(place)
            self._note(0)

    def _leave_backward(self, place: str) -> None:
        if place:
            self.sharing.leave_backward(place)

    def _backward_of(self, node: Node, *, splits: bool) -> None:
        received = [self._grads.pop(value.number) for value in node.outputs]
        new = [self._gradient_for(node, size, received) for size in node.gradients]
        if splits and node.unit:
            self._put_aside(node, received)
        elif node.unit:
            self.sharing.arrive(node.unit)
        aside = splits and bool(node.keeps_for_weights)
        self._note(node.backward_temporary + (0 if aside else node.weights_temporary))
        if node.unit and not splits:
            self.sharing.contribute(node.unit, node.contributions)
            self._note(node.weights_gradient)
        self._drop(received)
        self._drop(node.saves)
        for value, gradient in zip(node.inputs, new, strict=True):
            self._grads[value.number] = self._sum(value.number, gradient)

    def _gradient_for(self, node: Node, size: int, received: Sequence[int]) -> int:
        if node.in_place is not None:
            self._hold([node.in_place])
            return node.in_place
        if size == 0:
            self._hold([received[0]])
            return received[0]
        return self._new_gradient(size)

    def _new_gradient(self, size: int) -> int:
        number, self._next = self._next, self._next + 1
        self._bytes[number] = size
        self._of_work.add(number)
        self._hold([number])
        return number

    def _sum(self, number: int, gradient: int) -> int:
        """Add a gradient to the one that is there, in place if nobody else holds that."""
        before = self._grads.get(number)
        if before is None:
            return gradient
        if self._holds[before] == 1:
            self._note(0)
            self._drop([gradient])
            return before
        total = self._new_gradient(self._bytes[gradient])
        self._note(0)
        self._drop([before, gradient])
        return total

    def _put_aside(self, node: Node, received: Sequence[int]) -> None:
        waits = self.sharing.waits_for_weights
        holds_gradient = node.keeps_for_weights or (waits and node.reads_gradient)
        held = (*node.keeps_for_weights, *received) if holds_gradient else ()
        if waits and not holds_gradient:
            held = (self._new_gradient(node.weights_temporary),)
        else:
            self._hold(held)
        self._aside.append((node, held))

    # --- Book-keeping --------------------------------------------------------------------------------------------

    def _hold(self, memories: Iterable[int]) -> None:
        for memory in memories:
            if self._holds[memory] == 0:
                self._count(memory, self._bytes[memory])
            self._holds[memory] += 1

    def _drop(self, memories: Iterable[int]) -> None:
        for memory in memories:
            self._holds[memory] -= 1
            if self._holds[memory] == 0:
                self._count(memory, -self._bytes[memory])

    def _count(self, memory: int, size: int) -> None:
        if memory in self._of_work:
            self._work += size
        else:
            self._activations += size

    def _note(self, temporary: int) -> None:
        """Look whether now, with a temporary, is the highest moment."""
        now = Moment(self._activations, self._work + temporary, self.sharing.take_highest())
        if now.total > self._peak.total:
            self._peak = now

    def _start(self) -> Moment:
        now = Moment(self._activations, self._work, self.sharing.held_bytes)
        self._peak = now
        return now

    def _end(self, before: Moment) -> StepMemory:
        self._note(0)
        less = Moment(-before.activations, -before.work, -before.sharing)
        after = Moment(self._activations, self._work, self.sharing.held_bytes)
        return StepMemory(self._peak + less, after + less)


def _readers(nodes: Sequence[Node]) -> Counter[int]:
    """How often the nodes read each memory."""
    inputs = (value.memory for node in nodes for value in node.inputs)
    return Counter(inputs) + Counter(memory for node in nodes for memory in node.reads)


def _from_before(nodes: Sequence[Node]) -> list[int]:
    """Memories that a group reads and does not make, each once: its inputs, and tables that several nodes save."""
    made = {value.memory for node in nodes for value in node.outputs if not _is_view(node, value.memory)}
    saved = Counter(memory for node in nodes for memory in node.saves)
    tables = {memory for memory, times in saved.items() if times > 1}
    return sorted((set(_readers(nodes)) | tables) - made)


def _is_view(node: Node, memory: int) -> bool:
    return any(value.memory == memory for value in node.inputs)


def _with_memories(node: Node, own: Callable[[int], int]) -> Node:
    """The node with every memory replaced by what `own` says."""
    return replace(
        node,
        inputs=tuple(replace(value, memory=own(value.memory)) for value in node.inputs),
        outputs=tuple(replace(value, memory=own(value.memory)) for value in node.outputs),
        saves=tuple(own(memory) for memory in node.saves),
        reads=tuple(own(memory) for memory in node.reads),
        keeps_for_weights=tuple(own(memory) for memory in node.keeps_for_weights),
        in_place=None if node.in_place is None else own(node.in_place),
    )
