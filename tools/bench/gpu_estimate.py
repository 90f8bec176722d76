"""How long a GPU takes for what was counted on a fake one: operations by rate, bytes by bandwidth, a gap per kernel.

    time = products / their rate + attention / its rate + element-wise bytes / bandwidth + 1.5 us a kernel

An estimate for one H100 SXM, no measurement: nothing overlaps, the device never waits for Python, and there is no
communication. The rates are what published benchmarks of cuBLAS, FlashAttention 2 and 3, and streaming kernels reach
on that card, as low, middle and high; those of FP8 are the least certain. MFU is Megatron-LM's: operations of the model
with the full square of scores, recomputation left out, of 989.4 TFLOP/s (the data sheet's dense bf16), for FP8 too.

Source: Shah et al. 2024 (FlashAttention-3), figures 5 and 6; NVIDIA's H100 data sheet.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tools.bench.fake_gpu import ATTENTION, ELEMENTWISE, PRODUCT, FakeKernel

PEAK = 989.4e12
GAP_S = 1.5e-6


@dataclass(frozen=True)
class Machine:
    """Rates in operations and bytes a second: of products by the bytes of a factor's element, of attention forward and
    backward (the causal half counted), and of memory."""

    products: Mapping[int, float]
    attention: Mapping[str, float]
    bandwidth: float


def machines(hidden_size: int) -> dict[str, Machine]:
    """Low, middle and high; products of a wide model run faster. Attention with dropout or a dense mask is that of
    FlashAttention 2, 0.72 of the other's rate."""
    wide = hidden_size > 2048
    rates = {
        "low": (600 if wide else 540, 950 if wide else 800, 330, 270, 2.3),
        "mid": (670 if wide else 600, 1150 if wide else 950, 450, 380, 2.6),
        "high": (730 if wide else 660, 1300 if wide else 1100, 560, 470, 2.9),
    }
    return {
        name: Machine(
            {1: fp8 * 1e12, 2: half * 1e12, 4: 50e12},
            {"forward": forward * 1e12, "backward": backward * 1e12},
            memory * 1e12,
        )
        for name, (half, fp8, forward, backward, memory) in rates.items()
    }


Key = tuple[str, str, int]


@dataclass(frozen=True)
class Tally:
    """Kernels, bytes and operations, summed by the name of the kernel, its sort, and the bytes of a factor's element;
    differences of tallies are tallies."""

    kernels: dict[Key, float]
    num_bytes: dict[Key, float]
    operations: dict[Key, float]
    in_place: dict[Key, float]

    @staticmethod
    def of(kernels: Iterable[FakeKernel]) -> Tally:
        """The sums over a step."""
        found = Tally(defaultdict(int), defaultdict(int), defaultdict(float), defaultdict(int))
        for one in kernels:
            key = one.name, one.sort, 0 if one.dtype is None else one.dtype.itemsize
            found.kernels[key] += one.launches
            found.num_bytes[key] += one.num_bytes
            found.operations[key] += one.operations
            found.in_place[key] += one.in_place_bytes
        return found

    def __sub__(self, other: Tally) -> Tally:
        return self + other.times(-1)

    def __add__(self, other: Tally) -> Tally:
        kernels, num_bytes = _sum(self.kernels, other.kernels), _sum(self.num_bytes, other.num_bytes)
        operations, in_place = _sum(self.operations, other.operations), _sum(self.in_place, other.in_place)
        return Tally(kernels, num_bytes, operations, in_place)

    def times(self, factor: int) -> Tally:
        """As much as so many of these."""
        kernels, num_bytes = _times(self.kernels, factor), _times(self.num_bytes, factor)
        return Tally(kernels, num_bytes, _times(self.operations, factor), _times(self.in_place, factor))

    @property
    def launched(self) -> int:
        """Kernels of all sorts."""
        return round(sum(self.kernels.values()))

    @property
    def elementwise_bytes(self) -> int:
        """Bytes of what is neither a product nor attention."""
        return round(sum(value for (_, sort, _), value in self.num_bytes.items() if sort == ELEMENTWISE))

    def operations_of(self, sort: str) -> float:
        """Operations of products, or of attention."""
        return sum(value for (_, of_key, _), value in self.operations.items() if of_key == sort)

    def seconds(self, machine: Machine) -> dict[str, float]:
        """The time of each part: products, attention, element-wise, gaps between kernels."""
        products = sum(v / machine.products[size] for (_, sort, size), v in self.operations.items() if sort == PRODUCT)
        attention = 0.0
        for (name, sort, _), value in self.operations.items():
            if sort == ATTENTION:
                slower = 0.72 if "with" in name else 1.0
                attention += value / machine.attention[name.split()[-1]] / slower
        elementwise = self.elementwise_bytes / machine.bandwidth
        return {
            "products": products,
            "attention": attention,
            "element-wise": elementwise,
            "gaps": GAP_S * self.launched,
        }


def _sum(first: Mapping[Key, float], second: Mapping[Key, float]) -> dict[Key, float]:
    return {key: first.get(key, 0) + second.get(key, 0) for key in {*first, *second}}


def _times(values: Mapping[Key, float], factor: int) -> dict[Key, float]:
    return {key: factor * value for key, value in values.items()}


@dataclass(frozen=True)
class StepParts:
    """A step as a sum: what each layer takes for each micro-batch, what a micro-batch takes beside, what a layer takes
    once a step (its part of the step's end), and what is left."""

    layer: Tally
    micro_batch: Tally
    layer_end: Tally
    end: Tally

    @staticmethod
    def of(steps: Mapping[tuple[int, int], Tally]) -> StepParts:
        """From steps with 1 and 2 layers, of 1 and 2 micro-batches, by (layers, micro-batches)."""
        layer = steps[2, 2] - steps[1, 2] - steps[2, 1] + steps[1, 1]
        micro_batch = steps[1, 2] - steps[1, 1] - layer
        layer_end = steps[2, 1] - steps[1, 1] - layer
        return StepParts(layer, micro_batch, layer_end, steps[1, 1] - layer - micro_batch - layer_end)

    def step(self, layers: int, micro_batches: int) -> Tally:
        """That of a step of any size."""
        of_layers = self.layer.times(layers * micro_batches) + self.layer_end.times(layers)
        return of_layers + self.micro_batch.times(micro_batches) + self.end
