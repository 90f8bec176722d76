"""The losses of a model: what it declares, and the sink through which any layer of any stage adds to one of them.

A loss is a sum over the global batch, divided by a count that is known before the first forward. The derivative of the
objective with respect to every term of the sum is therefore one known number,

    gradient = loss scale x weight / global count,

wherever and whenever the term is computed. `LossSink.add` passes a tensor of the forward through unchanged; when the
backward comes back through it, the term gets this number as its gradient. Nothing is averaged, and no factor of a
parallel axis or of the number of micro-batches appears. A term is differentiated in the backward of its own stage and
micro-batch, in whatever order the schedule runs them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

OverTp = Literal["equal", "partial"]


@dataclass(frozen=True)
class LossSpec:
    """One loss that a model declares.

    Attributes:
        name: in log lines, metrics and curves, as `NAME_loss` where a model has several.
        summed: description of what is summed.
        counted: what divides the sum: the key of one of the counts of a batch (`data.batch.Samples.counts`).
        weight: factor of the mean in the objective.
        accuracy: the name under which an evaluation reports the share of hits, of the same count; None measures none.
    """

    name: str
    summed: str
    counted: str
    weight: float = 1.0
    accuracy: str | None = None


def loss_problems(specs: Sequence[LossSpec]) -> list[str]:
    """What is wrong with the losses that a model declares, as sentences without a full stop."""
    problems = []
    names = [spec.name for spec in specs]
    reported = ["loss", *(f"{name}_loss" for name in names)]
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.append(f"two losses have the name {name!r}; give each its own")
    for spec in specs:
        for what, name in (("loss", spec.name), ("accuracy", spec.accuracy)):
            if name is not None and not name.replace("-", "_").isidentifier():
                problems.append(f"the {what} {name!r} needs a name of letters, digits and underscores")
        if not isinstance(spec.weight, (int, float)) or not math.isfinite(spec.weight):
            problems.append(f"the weight of the loss {spec.name!r} is {spec.weight!r}, which is no finite number")
        if spec.accuracy in reported:
            problems.append(f"the accuracy {spec.accuracy!r} has the name of a reported loss; give it another")
    accuracies = [spec.accuracy for spec in specs if spec.accuracy is not None]
    for name in sorted({name for name in accuracies if accuracies.count(name) > 1}):
        problems.append(f"two losses report an accuracy named {name!r}; give each its own")
    return problems


class LossSink:
    """The sums of one rank's losses over the micro-batches of one step or evaluation, and the gradients of its terms.

    Attributes:
        counts_hits: whether layers also add how many of their predictions are right.
    """

    def __init__(
        self,
        specs: Sequence[LossSpec],
        *,
        tp_rank: int,
        device: torch.device,
        gradients: Mapping[str, float] | None = None,
        counts_hits: bool = False,
    ) -> None:
        """Nothing is added up yet.

        Args:
            specs: the losses of the model, each of which the sums then have.
            tp_rank: this rank on the tensor-parallel axis.
            device: of the sums.
            gradients: derivative of the objective with respect to the sum of each loss, by name; None where no
                backward follows.
            counts_hits: see above.
        """
        self.counts_hits = counts_hits
        self._tp_rank, self._device = tp_rank, device
        self._gradients = gradients
        self._terms: dict[str, list[Tensor]] = {spec.name: [] for spec in specs}
        self._hits: dict[str, list[Tensor]] = {spec.name: [] for spec in specs}
        self._is_recomputing = False

    def add(self, x: Tensor, name: str, term: Tensor, *, over_tp: OverTp) -> Tensor:
        """Add a term to a loss. Returns `x` unchanged; use it in its place, or the term gets no gradient.

        Args:
            x: a tensor of the forward that flows on to the output of the stage, such as the hidden tensor that the
                term is computed from; any shape and dtype.
            name: of a declared loss.
            term: scalar of at least 32 bits, a sum over the samples of this micro-batch.
            over_tp: "equal" where all tensor-parallel ranks compute the same term, which then counts once; "partial"
                where each has a part of it. On the residual stream it is `LayerContext.residual_gradient`.

        Raises:
            ValueError: the model does not declare this loss, or the term is no such scalar.
        """
        self._check(name, term)
        self._record(self._terms[name], term, over_tp)
        return x if self._gradients is None else _WithGradient.apply(x, term, self._gradients[name])

    def end(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The output of a last layer: a scalar 0 whose backward gives these terms, equal on all tensor-parallel ranks,
        their gradients, and with it starts the backward of the model.

        Raises: ValueError as `add` does.
        """
        output = torch.zeros((), device=self._device)
        for name, term in terms.items():
            output = self.add(output, name, term, over_tp="equal")
        return output

    def add_hits(self, name: str, hits: Tensor, *, over_tp: OverTp) -> None:
        """Add how many predictions of a micro-batch are right: a scalar as in `add`.

        Raises: ValueError as `add` does.
        """
        self._check(name, hits)
        self._record(self._hits[name], hits, over_tp)

    def sums(self) -> Tensor:
        """This rank's share of each loss's sum, fp64 [K] in the order of the model: shares add up over all ranks."""
        return self._added_up(self._terms)

    def hits(self) -> Tensor:
        """This rank's share of the hits of each loss, fp64 [K], as `sums`."""
        return self._added_up(self._hits)

    @contextmanager
    def recomputation(self) -> Iterator[None]:
        """Within the context a forward is run for the second time: its terms are part of the sums already."""
        before, self._is_recomputing = self._is_recomputing, True
        try:
            yield
        finally:
            self._is_recomputing = before

    def _check(self, name: str, term: Tensor) -> None:
        if name not in self._terms:
            raise ValueError(f"the model declares no loss {name!r}; it declares {', '.join(self._terms) or 'none'}")
        if term.dim() or term.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"what is added to the loss {name!r} is {term.dtype} of shape {tuple(term.shape)}; give a sum in fp32"
            )

    def _record(self, terms: list[Tensor], term: Tensor, over_tp: OverTp) -> None:
        if not self._is_recomputing and (over_tp == "partial" or self._tp_rank == 0):
            terms.append(term.detach())

    def _added_up(self, terms: Mapping[str, list[Tensor]]) -> Tensor:
        zero = torch.zeros((), dtype=torch.float64, device=self._device)
        return torch.stack([torch.stack(one).double().sum() if one else zero for one in terms.values()])


class _WithGradient(torch.autograd.Function):
    """The identity in its first argument; the second gets a gradient that is known beforehand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, term: Tensor, gradient: float) -> Tensor:
        ctx.gradient, ctx.dtype = gradient, term.dtype
        return x

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad_x, torch.full((), ctx.gradient, dtype=ctx.dtype, device=grad_x.device), None
