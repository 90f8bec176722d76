"""GradSink: where weight gradients go, and WeightGradQueue: when they are computed.

Linear layers own their backward and hand their weight-gradient work to the sink, which computes it at once, or defers
it while a schedule runs an input-gradient step, to be run by the matching weight-gradient step. A lookup in a
table hands over the rows of its gradient, so that no gradient of the table's size is made for them. Parameters whose
gradient comes from autograd (norms, positions) reach the same buffers through a hook.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from megatron3d_kernels.registry import Registry
from torch import Tensor, nn

from megatron3d.params.row_blocks import BlockedGradient

_DEFAULT_KERNELS = Registry()


@dataclass
class GradPlace:
    """The buffer of one parameter's gradient; while it `is_empty`, the next contribution overwrites what lies there,
    which spares writing zeros first and reading them."""

    buffer: Tensor
    is_empty: bool = False

    def add(self, grad: Tensor) -> None:
        """Add a contribution of the buffer's shape."""
        if self.takes_first():
            self.buffer.copy_(grad)
        else:
            self.buffer.add_(grad)

    def takes_first(self) -> bool:
        """Whether the contribution that is made now is to overwrite; the following ones are to be added."""
        was_empty, self.is_empty = self.is_empty, False
        return was_empty


@dataclass
class _Destination:
    """How to get the place of one parameter's gradient, what to call after each contribution, and whether those that
    autograd brings in an input-gradient step are deferred to the weight-gradient step; `blocks` in place of the buffer
    where it comes block by block."""

    place_of: Callable[[], GradPlace]
    on_arrival: Callable[[], None]
    is_deferred: bool
    blocks: BlockedGradient | None = None


class GradSink:
    """Accumulates the gradients of one rank's parameters; unbound parameters accumulate into `.grad`.

    A parameter is bound once to a buffer of its own shape (fp32 or bf16) and a function to call after every
    contribution, by which the owner of the buffer knows when a gradient is complete.
    """

    def __init__(self) -> None:
        self._destinations: dict[nn.Parameter, _Destination] = {}
        self._deferred: list[Callable[[], None]] | None = None
        self._joined: dict[nn.Parameter, Callable[[], None]] | None = None

    def bind(self, parameter: nn.Parameter, buffer: Tensor, on_arrival: Callable[[], None]) -> GradPlace:
        """Send the gradient of `parameter` to `buffer` (same shape), and call `on_arrival` after each contribution.

        Who owns the buffer may declare the place that is returned empty, instead of filling the buffer with zeros.
        """
        place = GradPlace(buffer)
        self._bind(parameter, _Destination(lambda: place, on_arrival, is_deferred=False))
        return place

    def bind_late(
        self, parameter: nn.Parameter, buffer_of: Callable[[], Tensor], on_arrival: Callable[[], None]
    ) -> None:
        """The same with a buffer that is asked for at each contribution, as it may come and go between them.

        Within `defer` the gradients that autograd brings are deferred too, so that an input-gradient step needs no
        buffer; they are those of norms and tables, small beside the activations that are kept as long.
        """
        self._bind(parameter, _Destination(lambda: GradPlace(buffer_of()), on_arrival, is_deferred=True))

    def bind_blocks(self, table: nn.Parameter, blocks: BlockedGradient, on_arrival: Callable[[], None]) -> None:
        """The same, as by `bind_late`, with a buffer for each block of a table in turn."""

        def none_of_its_shape() -> GradPlace:
            raise AssertionError(f"a table of shape {tuple(table.shape)} has no buffer but those of its blocks")

        self._bind(table, _Destination(none_of_its_shape, on_arrival, is_deferred=True, blocks=blocks))

    def _bind(self, parameter: nn.Parameter, destination: _Destination) -> None:
        self._destinations[parameter] = destination
        # Tensors keep their hooks where Python's garbage collector cannot look, so a hook that held the sink would
        # keep every buffer and process group of a finished run alive.
        this = weakref.ref(self)

        def take(parameter: Tensor) -> None:
            sink = this()
            assert sink is not None, f"a gradient of shape {tuple(parameter.shape)} arrived after its sink was gone"
            sink._take_from_autograd(parameter)

        parameter.register_post_accumulate_grad_hook(take)

    def add_linear(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        grad_out: Tensor,
        x: Tensor | None,
        *,
        kernels: Registry = _DEFAULT_KERNELS,
    ) -> None:
        """Add the gradients of a linear layer: weight += grad_out^T x, bias += the sum of grad_out over tokens.

        Of a frozen weight or bias nothing is computed.

        Args:
            weight: [O, I].
            bias: [O] or None.
            grad_out: [..., O], gradient of the output.
            x: [..., I], the layer's (gathered) input; None where the weight is frozen.
            kernels: make the product.
        """
        trained_bias = bias if bias is not None and bias.requires_grad else None
        if x is None and trained_bias is None:
            return

        @torch.no_grad()  # deferred, it runs outside of the backward that asked for it
        def work() -> None:
            grad_TO = grad_out.reshape(-1, grad_out.shape[-1])
            if x is not None:
                self._add_product(weight, grad_TO, x.reshape(-1, x.shape[-1]), kernels)
            if trained_bias is not None:
                self.add(trained_bias, grad_TO.sum(0))

        if self._deferred is None:
            work()
        else:
            self._deferred.append(work)

    def add_made(self, parameter: nn.Parameter, make: Callable[[Tensor, bool], None]) -> None:
        """Add a gradient that is made when weight gradients are: at once, or with those that are deferred.

        Args:
            parameter: any that does not come in blocks.
            make: adds the gradient to a buffer of the parameter's shape, or overwrites it where its second argument
                says so.
        """

        @torch.no_grad()
        def work() -> None:
            destination = self._destinations.get(parameter)
            if destination is None:
                grad = torch.empty_like(parameter)
                make(grad, True)
                self.add(parameter, grad)
                return
            place = destination.place_of()
            make(place.buffer, place.takes_first())
            self._arrived(parameter)

        if self._deferred is None:
            work()
        else:
            self._deferred.append(work)

    def add_grouped_linear(
        self,
        weights: Sequence[nn.Parameter],
        biases: Sequence[nn.Parameter | None],
        grad_out: Tensor,
        x: Tensor | None,
        counts: Sequence[int],
        *,
        kernels: Registry = _DEFAULT_KERNELS,
    ) -> None:
        """Add the gradients of several linear layers of one shape, each of rows of its own; see `add_linear`.

        Args:
            weights: [O, I] each.
            biases: [O] or None each.
            grad_out: [R, O], gradient of the output, the rows of the first layer first.
            x: [R, I], the input; None where all weights are frozen.
            counts: rows of each layer.
            kernels: make the products.
        """
        trained = [(bias, n) for n, bias in enumerate(biases) if bias is not None and bias.requires_grad]

        @torch.no_grad()
        def work() -> None:
            if x is not None:
                self._add_grouped_product(weights, grad_out, x, counts, kernels)
            of_layers = grad_out.split(list(counts)) if trained else ()
            for bias, number in trained:
                self.add(bias, of_layers[number].sum(0))

        if self._deferred is None:
            work()
        else:
            self._deferred.append(work)

    def _add_grouped_product(
        self, weights: Sequence[nn.Parameter], grad_RO: Tensor, x_RI: Tensor, counts: Sequence[int], kernels: Registry
    ) -> None:
        bound = [self._destinations[weight] for weight in weights if weight in self._destinations]
        places = [one.place_of() for one in bound if one.blocks is None]
        if len(places) < len(weights) or any(place.buffer.dtype != grad_RO.dtype for place in places):
            of_layers = zip(weights, grad_RO.split(list(counts)), x_RI.split(list(counts)), strict=True)
            for weight, grad, x in of_layers:
                if weight.requires_grad:
                    self._add_product(weight, grad, x, kernels)
            return
        overwrites = [place.takes_first() for place in places]
        buffers = [place.buffer for place in places]
        kernels.add_grouped_weight_gradients(buffers, grad_RO, x_RI, counts, overwrites=overwrites)
        for weight in weights:
            self._arrived(weight)

    def add_rows(self, table: nn.Parameter, rows: Tensor, grad_rows: Tensor) -> None:
        """Add gradients to rows of a table: table[rows[t]] += grad_rows[t], one after another where rows repeat.

        Args:
            table: [V, H].
            rows: [T], int64.
            grad_rows: [T, H].
        """

        @torch.no_grad()
        def work() -> None:
            destination = self._destinations.get(table)
            if destination is None:
                self.add(table, add_to_rows(torch.zeros_like(table), rows, grad_rows))
                return
            if destination.blocks is not None:
                destination.blocks.add_rows(rows, grad_rows)
            else:
                place = destination.place_of()
                if place.takes_first():
                    place.buffer.zero_()
                add_to_rows(place.buffer, rows, grad_rows)
            self._arrived(table)

        self._now_or_later(table, work)

    def add(self, parameter: nn.Parameter, grad: Tensor) -> None:
        """Add a gradient of the parameter's shape."""
        destination = self._destinations.get(parameter)
        if destination is None:
            parameter.grad = grad if parameter.grad is None else parameter.grad + grad
            return
        destination.place_of().add(grad)
        self._arrived(parameter)

    @contextmanager
    def defer(self) -> Iterator[list[Callable[[], None]]]:
        """Within the context weight-gradient work is deferred; the list it yields holds that work, in order."""
        self._deferred, outer = [], self._deferred
        try:
            yield self._deferred
        finally:
            self._deferred = outer

    @property
    def defers(self) -> bool:
        """Whether weight-gradient work is deferred now."""
        return self._deferred is not None

    def add_later(self, work: Callable[[], None]) -> None:
        """Defer work that adds gradients when it is done, within `defer`."""
        assert self._deferred is not None, "nothing is deferred outside of an input-gradient step"
        self._deferred.append(work)

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Within the context all contributions to a parameter count as one, which has arrived at its end. Where they
        are deferred, so are they together."""
        outer = self._deferred
        assert self._joined is None, "contributions that are joined already"
        self._joined = {}
        try:
            with nullcontext([]) if outer is None else self.defer() as works:
                yield
            arrived = [*self._joined.values()]
        finally:
            self._joined = None
        if outer is not None and works:
            outer.append(partial(self._do_joined, works))
        for on_arrival in arrived:
            on_arrival()

    @torch.no_grad()
    def _do_joined(self, works: Sequence[Callable[[], None]]) -> None:
        with self.joined():
            for work in works:
                work()

    def _arrived(self, parameter: nn.Parameter) -> None:
        """Report a contribution to a bound parameter."""
        on_arrival = self._destinations[parameter].on_arrival
        if self._joined is None:
            on_arrival()
        else:
            self._joined[parameter] = on_arrival

    def _add_product(self, weight: nn.Parameter, grad_TO: Tensor, x_TI: Tensor, kernels: Registry) -> None:
        destination = self._destinations.get(weight)
        if destination is None:
            self.add(weight, kernels.weight_gradient(grad_TO, x_TI))
            return
        if destination.blocks is None:
            place = destination.place_of()
            kernels.add_weight_gradient(place.buffer, grad_TO, x_TI, overwrites=place.takes_first())
        else:
            for block, buffer_NI in destination.blocks.buffers():
                columns_TN = block.columns_of(grad_TO).flatten(-2)
                kernels.add_weight_gradient(buffer_NI, columns_TN, x_TI, overwrites=True)
        self._arrived(weight)

    def _take_from_autograd(self, parameter: torch.Tensor) -> None:
        assert isinstance(parameter, nn.Parameter), f"hook on {type(parameter).__name__}"
        if parameter.grad is not None:
            grad, parameter.grad = parameter.grad, None
            self._now_or_later(parameter, partial(self.add, parameter, grad))

    def _now_or_later(self, parameter: nn.Parameter, work: Callable[[], None]) -> None:
        """Do work that is small: at once, unless the parameter's buffer waits for the weight-gradient step."""
        destination = self._destinations.get(parameter)
        if self._deferred is not None and destination is not None and destination.is_deferred:
            self._deferred.append(work)
        else:
            work()


def add_to_rows(buffer: Tensor, rows: Tensor, grad_rows: Tensor) -> Tensor:
    """buffer[rows] += grad_rows with a fixed order of additions, which `index_add_` has on a CPU alone."""
    grad_rows = grad_rows.to(buffer.dtype)
    if buffer.device.type == "cpu":
        return buffer.index_add_(0, rows, grad_rows)
    return buffer.index_put_((rows,), grad_rows, accumulate=True)
