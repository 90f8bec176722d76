"""Activation recomputation: which layers of a stage forget their activations and run again in the backward.

"full" recomputes whole layers: `uniform` in groups of n (only a group's input is kept), `block` for the first n
layers of the stage, each by itself. "selective" recomputes the attention core alone, inside `SelfAttention`.
Dropout masks are pure functions of their place, so a second forward drops what the first one dropped; and what it adds
to a loss is there already. It communicates again, unless the results of its collectives are kept (`comm/replay.py`).

Source: Chen et al. 2016; Korthikanti et al. 2022, section 4 (selective); Singh et al. 2023, section 4.3, for what is
not communicated again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from megatron3d.nn.inputs import LayerInputs
from megatron3d.tensor.kept_inputs import InputStore, StoredInput

Layer = Callable[[Tensor, LayerInputs], Tensor]
Context = AbstractContextManager[None]
ContextPair = Callable[[], tuple[Context, Context]]  # for a forward and for its recomputation


@dataclass(frozen=True)
class LayerGroup:
    """Consecutive layers of a stage (positions within it) and whether they are recomputed as one."""

    layers: range
    recompute: bool


def plan_recompute(
    num_layers: int, *, granularity: str | None, method: str | None, layers_each: int | None
) -> tuple[LayerGroup, ...]:
    """Group the layers of a stage.

    Args:
        num_layers: layers of the stage.
        granularity: None, "selective" or "full".
        method: with "full": "uniform" or "block".
        layers_each: layers of a group (uniform), or layers that are recomputed (block); default 1.
    """
    if granularity != "full":
        return (LayerGroup(range(num_layers), False),)
    size = layers_each or 1
    if method == "block":
        recomputed = min(size, num_layers)
        singles = [LayerGroup(range(i, i + 1), True) for i in range(recomputed)]
        return (*singles, LayerGroup(range(recomputed, num_layers), False))
    return tuple(LayerGroup(range(i, min(i + size, num_layers)), True) for i in range(0, num_layers, size))


def run_layers(
    layers: Sequence[Layer],
    groups: Sequence[LayerGroup],
    x_SBH: Tensor,
    inputs: LayerInputs,
    *,
    replay: ContextPair | None = None,
    store: InputStore | None = None,
) -> Tensor:
    """Run the layers in order, recomputing the groups that say so when gradients are wanted; `replay` as in
    `recomputed`. `store` keeps what comes into these groups until the backward."""
    chain = None if store is None else _StoredChain(store)

    def run(group: LayerGroup) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            for position in group.layers:
                x = layers[position](x, inputs)
            return x

        return forward

    for group in groups:
        if group.recompute and torch.is_grad_enabled():
            with nullcontext() if chain is None else chain.keeping(x_SBH):
                x_SBH = recomputed(run(group), x_SBH, inputs=inputs, replay=replay)
        else:
            x_SBH = run(group)(x_SBH)
    if store is not None:
        store.settle()
    return x_SBH


class _StoredChain:
    """The inputs of one forward's recomputed groups in a store: each is taken from there when its group is recomputed,
    and the one before it starts to come.

    An input that is no result of this stage's own layers stays where it is: the pipeline holds it anyway.
    """

    def __init__(self, store: InputStore) -> None:
        self._store = store
        self._stored: list[StoredInput] = []

    def keeping(self, x_SBH: Tensor) -> AbstractContextManager[None]:
        """Within the context the input of a recomputed function is put into the store."""
        return nullcontext() if x_SBH.is_leaf else saved_tensors_hooks(self._put, self._take)

    def _put(self, x_SBH: Tensor) -> int | Tensor:
        if x_SBH.numel() == 0:  # torch 2.11 saves a tensor of its own beside the input
            return x_SBH
        self._stored.append(self._store.put(x_SBH))
        return len(self._stored) - 1

    def _take(self, number: int | Tensor) -> Tensor:
        if isinstance(number, Tensor):
            return number
        x_SBH = self._stored[number].take()
        if number > 0:
            self._stored[number - 1].start_fetch()
        return x_SBH


def recomputed(
    function: Callable[..., Tensor], *tensors: Tensor, inputs: LayerInputs, replay: ContextPair | None = None
) -> Tensor:
    """function(*tensors), of which only these tensors are kept: the backward calls it again for everything else.

    Args:
        function: has no other effect than to add to the losses of `inputs`; the second call adds nothing.
        tensors: its arguments.
        inputs: of the layers that it is a part of.
        replay: keeps the results of its collectives too, for the second call; without, that communicates again.
    """

    def contexts() -> tuple[Context, Context]:
        first, second = (nullcontext(), nullcontext()) if replay is None else replay()
        return first, second if inputs.losses is None else _both(inputs.losses.recomputation(), second)

    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


@contextmanager
def _both(outer: Context, inner: Context) -> Iterator[None]:
    with outer, inner:
        yield
