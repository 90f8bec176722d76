"""How much a model computes: nothing is allocated.

A matrix product of one token with a matrix of P weights is 2P operations (multiply and add), and each costs the same
again twice in the backward pass, for the gradients of input and weight. The matrices of a layer are those that it
declares. So one token of a sequence of S costs

    3 x 2 x (matrices of all layers + VH)  +  3 x L x 4NDS

where V is the vocabulary, H the hidden size and VH the output layer (the embedding is a look-up and costs nothing), and
4NDS, with N query heads of size D, the two products of queries with keys and probabilities with values. As is
customary, the full S x S square is counted although causal attention needs half of it, norms and activations are left
out, and recomputed activations are not counted again: these are the operations of the model, not of the machine. With
L layers of 12 H^2 weights and ND = H this is 72 L H^2 (1 + S/6H + V/12LH) per token.
A BERT's output layer, with its H x H transform, sees only the tokens that are masked: 15 % of all, and is counted so.

Source: Narayanan et al. 2021 (arXiv:2104.04473), equation 3, which has 96 for 72 because it counts recomputation;
Chowdhery et al. 2022 (arXiv:2204.02311), appendix B; Devlin et al. 2018 (arXiv:1810.04805), section 3.1, for 15 %.
"""

from __future__ import annotations

import re

from megatron3d.config.sections.model import ModelConfig
from megatron3d.models.counts import declared_specs

_FORWARD_AND_BACKWARD = 3
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


def flops_per_token(model: ModelConfig) -> float:
    """Floating-point operations of one token's forward and backward pass in a sequence of `seq_length`."""
    layers, output = forward_flops_by_layer(model)
    return _FORWARD_AND_BACKWARD * (sum(layers) + output)


def forward_flops_by_layer(model: ModelConfig) -> tuple[tuple[float, ...], float]:
    """Operations of one token's forward through each layer, and through the output layer; the embedding costs none."""
    layers = [4.0 * model.num_attention_heads * model.kv_channels * model.seq_length] * model.num_layers
    for spec in declared_specs(model):
        place, _, rest = spec.name.partition(".")
        if place == "layers" and spec.is_hidden_matrix:
            layers[int(rest.partition(".")[0])] += 2.0 * spec.numel
    return tuple(layers), 2.0 * _output_weights(model)


def flops_per_step(model: ModelConfig, tokens: int) -> float:
    """Floating-point operations of an optimizer step over `tokens` tokens, forward and backward."""
    return flops_per_token(model) * tokens


def peak_tflops(device_name: str, precision: str) -> float | None:
    """Dense peak of one device in TFLOP/s, or None if the device or its speed at this precision is not known.

    `device_name` is what the driver calls it, such as "NVIDIA H100 80GB HBM3"; `precision` is fp32, bf16 or fp16.
    """
    words = frozenset(re.split(r"[^A-Z0-9]+", device_name.upper()))
    for needed, half, single, has_bf16 in _PEAKS:
        if needed <= words:
            return {"fp32": single, "fp16": half, "bf16": half if has_bf16 else None}.get(precision)
    return None


def _output_weights(model: ModelConfig) -> float:
    """Matrix weights of the output layer, by the share of tokens that it sees."""
    if model.traits.samples == "sentences":
        return _MASKED_SHARE * (model.hidden_size + model.vocab_size) * model.hidden_size
    return model.vocab_size * model.hidden_size
