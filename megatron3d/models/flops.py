"""How much a model computes: nothing is allocated.

A matrix product of one token with a matrix of P weights is 2P operations (multiply and add), and each costs the same
again twice in the backward pass, for the gradients of input and weight. The matrices of a layer are those that it
declares. So one token of a sequence of S costs, where every parameter trains,

    3 x 2 x (matrices of all layers + VH)  +  3 x L x 4NDS

where V is the vocabulary, H the hidden size and VH the output layer (the embedding is a look-up and costs nothing), and
4NDS, with N query heads of size D, the two products of queries with keys and probabilities with values. As is
customary, the full S x S square is counted although causal attention needs half of it, norms and activations are left
out, and recomputed activations are not counted again: these are the operations of the model, not of the machine. With
L layers of 12 H^2 weights and ND = H this is 72 L H^2 (1 + S/6H + V/12LH) per token.
A BERT's output layer, with its H x H transform, sees only the tokens that are masked: 15 % of all, and is counted so.

Of the experts of a layer a token passes K of E: their matrices count K / E, and beside them the scores of all experts.

A frozen matrix has no product for its own gradient, and one before which nothing trains none for its input's either;
the backward of attention's products ends where none of queries, keys and values depend on what trains. Which matrix
comes first follows from the order of the declarations, which is that of the forward. A classifier has no output layer;
its last layer, from its one query on, and its head compute one position (docs/decisions/0011).

Source: Narayanan et al. 2021 (arXiv:2104.04473), equation 3, which has 96 for 72 because it counts recomputation;
Chowdhery et al. 2022 (arXiv:2204.02311), appendix B; Devlin et al. 2018 (arXiv:1810.04805), section 3.1, for 15 %.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from megatron3d.config.sections.model import ModelConfig
from megatron3d.models.counts import active_share, classifier_specs, declared_specs, is_router
from megatron3d.params.spec import ParamSpec

_MASKED_SHARE = 0.15

# Dense peak TFLOP/s of one device by words of its name, most specific first: (words, 16-bit, fp32, bf16 exists).
# fp32 is without TF32, which torch does not use unless it is asked to. Source: NVIDIA's data sheets; where they print
# figures with sparsity, half of them.
_PEAKS: tuple[tuple[frozenset[str], float, float, bool], ...] = (
    (frozenset({"B200"}), 2250.0, 75.0, True),
    (frozenset({"H200", "NVL"}), 835.5, 60.0, True),
    (frozenset({"H200"}), 989.4, 66.9, True),
    (frozenset({"H100", "PCIE"}), 756.0, 51.2, True),
    (frozenset({"H100", "NVL"}), 835.5, 60.0, True),
    (frozenset({"H100"}), 989.4, 66.9, True),
    (frozenset({"A100"}), 312.0, 19.5, True),
    (frozenset({"L40S"}), 362.05, 91.6, True),
    (frozenset({"L4"}), 121.0, 30.3, True),
    (frozenset({"A10"}), 125.0, 31.2, True),
    (frozenset({"V100", "PCIE"}), 112.0, 14.0, False),
    (frozenset({"V100"}), 125.0, 15.7, False),
)


@dataclass(frozen=True)
class SampleFlops:
    """Operations of forward and backward on one sample: for each of its tokens, for each pair of them, and once."""

    each_token: float = 0.0
    each_pair: float = 0.0
    once: float = 0.0

    def of(self, lengths: Iterable[int]) -> float:
        """Those of samples of these lengths, in tokens."""
        return sum(self.each_token * length + self.each_pair * length**2 + self.once for length in lengths)


def pretraining_flops(model: ModelConfig, frozen: tuple[str, ...] = ()) -> SampleFlops:
    """Those of pretraining, where parameters whose names a pattern of `frozen` matches do not train."""
    specs = declared_specs(model, frozen)
    # What a BERT's head has beside its output layer is counted with it.
    products = [one for one in _products(model, specs) if one.place != "head" or model.traits.samples == "tokens"]
    output = 2.0 * _output_weights(model) * _output_passes(specs)
    return SampleFlops(
        sum(one.total for one in products if not one.is_of_pairs) + output,
        sum(one.total for one in products if one.is_of_pairs),
    )


def layer_flops(model: ModelConfig, frozen: tuple[str, ...] = ()) -> dict[int, SampleFlops]:
    """The part of each layer in `pretraining_flops`."""
    found: dict[int, SampleFlops] = {}
    for one in _products(model, declared_specs(model, frozen)):
        place, _, number = one.place.partition(".")
        if place == "layers":
            before = found.get(int(number), SampleFlops())
            of_pairs = one.total if one.is_of_pairs else 0.0
            found[int(number)] = SampleFlops(before.each_token + one.total - of_pairs, before.each_pair + of_pairs)
    return found


def classifier_flops(model: ModelConfig, num_outputs: int, frozen: tuple[str, ...] = ()) -> SampleFlops:
    """Those of a classifier, whose head sees one position, and whose last layer makes no other but for its keys and
    values."""
    products, last = (
        list(_products(model, classifier_specs(model, num_outputs, frozen))),
        f"layers.{model.num_layers - 1}",
    )
    before = [one for one in products if one.place not in (last, "head")]
    # All tokens pass the first matrix of the last layer, and one query meets the key of each.
    first, *rest = (one for one in products if one.place in (last, "head"))
    each_token = [first, *(one for one in rest if one.is_of_pairs), *(one for one in before if not one.is_of_pairs)]
    return SampleFlops(
        sum(one.total for one in each_token),
        sum(one.total for one in before if one.is_of_pairs),
        sum(one.total for one in rest if not one.is_of_pairs),
    )


def flops_per_token(model: ModelConfig, frozen: tuple[str, ...] = ()) -> float:
    """Floating-point operations of one token's forward and backward pass in a sequence of `seq_length`."""
    return pretraining_flops(model, frozen).of([model.seq_length]) / model.seq_length


def forward_flops_by_layer(model: ModelConfig) -> tuple[tuple[float, ...], float]:
    """Operations of one token's forward through each layer, and through the output layer; the embedding costs none."""
    layers = [0.0] * model.num_layers
    for one in _products(model, declared_specs(model)):
        place, _, number = one.place.partition(".")
        if place == "layers":
            layers[int(number)] += one.operations * (model.seq_length if one.is_of_pairs else 1)
    return tuple(layers), 2.0 * _output_weights(model)


def flops_per_step(model: ModelConfig, tokens: int, frozen: tuple[str, ...] = ()) -> float:
    """Floating-point operations of an optimizer step over `tokens` tokens, forward and backward."""
    return flops_per_token(model, frozen) * tokens


@dataclass(frozen=True)
class _Product:
    """A product in a place, `layers.7` or an end: its operations in the forward, of a token or of a pair of tokens,
    and how often a step takes as many: in the forward, and for each gradient that is made."""

    place: str
    operations: float
    passes: int
    is_of_pairs: bool = False

    @property
    def total(self) -> float:
        """The operations of all passes."""
        return self.operations * self.passes


def _products(model: ModelConfig, specs: Sequence[ParamSpec]) -> Iterator[_Product]:
    """The products of all matrices but tables, and of attention, in the order of the forward."""
    of_pair = 4.0 * model.num_attention_heads * model.kv_channels
    depends = False  # whether what comes in depends on a parameter that trains
    for place, declared in groupby(specs, _place_of):
        attends = place.startswith("layers.")
        num_matrices = 0
        for spec in declared:
            if spec.is_hidden_matrix or is_router(spec):
                if attends and num_matrices == 1:  # the first matrix makes queries, keys and values
                    yield _Product(place, of_pair, 1 + 2 * depends, is_of_pairs=True)
                yield _Product(place, 2.0 * spec.numel * active_share(model, spec), 1 + depends + spec.trains)
                num_matrices += 1
            depends = depends or spec.trains
        if attends and num_matrices < 2:
            yield _Product(place, of_pair, 1 + 2 * depends, is_of_pairs=True)


def _place_of(spec: ParamSpec) -> str:
    words = spec.name.split(".")
    return f"layers.{words[1]}" if words[0] == "layers" else words[0]


def peak_tflops(device_name: str, precision: str) -> float | None:
    """Dense peak of one device in TFLOP/s, or None if the device or its speed at this precision is not known.

    `device_name` is what the driver calls it, such as "NVIDIA H100 80GB HBM3"; `precision` is fp32, bf16 or fp16.
    """
    words = frozenset(re.split(r"[^A-Z0-9]+", device_name.upper()))
    for needed, half, single, has_bf16 in _PEAKS:
        if needed <= words:
            return {"fp32": single, "fp16": half, "bf16": half if has_bf16 else None}.get(precision)
    return None


def _output_passes(specs: Sequence[ParamSpec]) -> int:
    """How often a step takes the operations of the output layer, whose table is the word embedding's where it is
    tied."""
    tables = {spec.name: spec.trains for spec in specs if spec.is_table}
    table = tables.get("head.output.weight", tables.get("embedding.word.weight", True))
    depends = any(spec.trains for spec in specs if not spec.name.startswith("head.output"))
    return 1 + depends + table


def _output_weights(model: ModelConfig) -> float:
    """Matrix weights of the output layer, by the share of tokens that it sees."""
    if model.traits.samples == "sentences":
        return _MASKED_SHARE * (model.hidden_size + model.vocab_size) * model.hidden_size
    return model.vocab_size * model.hidden_size
