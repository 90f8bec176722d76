"""Parameter and operation counts against Hugging Face's models, closed formulas of the papers, and torch's counter."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.config.check import resolve
from megatron3d.config.cli import parse_args
from megatron3d.config.derive import resolve_model
from megatron3d.config.presets import PRESETS
from megatron3d.config.sections.model import GivenModel, ModelConfig
from megatron3d.data.batch import GPTBatch, SequenceBatch
from megatron3d.errors import ConfigError
from megatron3d.models.bert_classifier import build_bert_classifier_stage
from megatron3d.models.counts import num_parameters
from megatron3d.models.flops import classifier_flops, flops_per_step, flops_per_token, peak_tflops, pretraining_flops
from megatron3d.models.gpt import build_gpt_stage
from megatron3d.train.setup import build_parts
from megatron3d.train.step import Rates, train_step

_GIVEN = GivenModel(
    num_layers=3, hidden_size=64, num_attention_heads=4, seq_length=16, max_position_embeddings=32, vocab_size=101
)
GPT = resolve_model(_GIVEN)
LLAMA = dataclasses.replace(
    GPT,
    activation="swiglu",
    num_query_groups=2,
    ffn_hidden_size=96,
    normalization="RMSNorm",
    add_bias_linear=False,
    position_embedding_type="rope",
    untie_embeddings_and_output_weights=True,
)

BERT = resolve_model(dataclasses.replace(_GIVEN, architecture="bert", norm_position="post"))


def unique_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def hugging_face_gpt2(model: ModelConfig) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=model.vocab_size,
        n_positions=model.max_position_embeddings,
        n_embd=model.hidden_size,
        n_layer=model.num_layers,
        n_head=model.num_attention_heads,
    )
    with torch.device("meta"):
        return transformers.GPT2LMHeadModel(config)


def hugging_face_llama(model: ModelConfig, **more: bool) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups,
        head_dim=model.kv_channels or model.hidden_size // model.num_attention_heads,
        tie_word_embeddings=not model.untie_embeddings_and_output_weights,
        **more,
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("model", [GPT, PRESETS["gpt2-124m"].model_config(), PRESETS["gpt2-1.5b"].model_config()])
def test_gpt2_has_hugging_faces_number_of_parameters(model: ModelConfig) -> None:
    assert num_parameters(model) == unique_parameters(hugging_face_gpt2(model))


@pytest.mark.parametrize(
    "model",
    [
        LLAMA,
        dataclasses.replace(LLAMA, untie_embeddings_and_output_weights=False),
        dataclasses.replace(LLAMA, kv_channels=24),
        PRESETS["llama3-8b"].model_config(),
    ],
)
def test_llama_has_hugging_faces_number_of_parameters(model: ModelConfig) -> None:
    assert num_parameters(model) == unique_parameters(hugging_face_llama(model))


def test_biases_of_a_gated_model_are_hugging_faces() -> None:
    model = dataclasses.replace(LLAMA, add_bias_linear=True)
    assert num_parameters(model) == unique_parameters(hugging_face_llama(model, attention_bias=True, mlp_bias=True))


def test_qwens_query_key_value_bias_alone_is_counted() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with torch.device("meta"):
        expected = unique_parameters(transformers.Qwen2ForCausalLM(config))
    assert num_parameters(dataclasses.replace(LLAMA, add_qkv_bias=True)) == expected


def test_qwens_norms_of_queries_and_keys_are_counted() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    with torch.device("meta"):
        expected = unique_parameters(transformers.Qwen3ForCausalLM(config))
    assert num_parameters(dataclasses.replace(LLAMA, qk_layernorm=True)) == expected


def hugging_face_bert(model: ModelConfig, kind: str, **more: bool) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=model.vocab_size,
        max_position_embeddings=model.max_position_embeddings,
        hidden_size=model.hidden_size,
        intermediate_size=4 * model.hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        attn_implementation="eager",
    )
    with torch.device("meta"):
        return getattr(transformers, kind)(config, **more)


@pytest.mark.parametrize("model", [BERT, PRESETS["bert-base"].model_config(), PRESETS["bert-large"].model_config()])
def test_bert_has_hugging_faces_number_of_parameters(model: ModelConfig) -> None:
    assert num_parameters(model) == unique_parameters(hugging_face_bert(model, "BertForPreTraining"))
    masked_only = dataclasses.replace(model, bert_binary_head=False, num_token_types=2)
    assert num_parameters(masked_only) == unique_parameters(hugging_face_bert(model, "BertForMaskedLM"))


def test_operations_of_bert_are_those_of_the_encoder_and_of_an_output_layer_for_15_percent() -> None:
    counter = pytest.importorskip("torch.utils.flop_counter")
    model = dataclasses.replace(BERT, seq_length=32)
    encoder = hugging_face_bert(model, "BertModel", add_pooling_layer=False)
    ids = torch.zeros(2, 32, dtype=torch.long, device="meta")
    with counter.FlopCounterMode(display=False) as counted:
        encoder(ids).last_hidden_state.sum().backward()
    output = 6 * 0.15 * 2 * 32 * 64 * (64 + 101)
    assert counted.get_total_flops() + output == pytest.approx(flops_per_step(model, 2 * 32), rel=1e-3)


@given(
    layers=st.integers(1, 6),
    heads=st.integers(1, 64),
    head_size=st.integers(1, 128),
    length=st.integers(1, 4096),
    vocab=st.integers(1, 100000),
)
def test_operations_are_the_papers_equation_without_recomputation(
    layers: int, heads: int, head_size: int, length: int, vocab: int
) -> None:
    h = heads * head_size
    sizes = {"num_layers": layers, "hidden_size": h, "num_attention_heads": heads}
    model = resolve_model(GivenModel(**sizes, seq_length=length, vocab_size=vocab))
    # SC21 equation 3 is 96 B s l h^2 (1 + s/6h + V/16lh) with four passes; three passes, of which recomputation
    # never repeats the output layer, are 72 B s l h^2 (1 + s/6h + V/12lh).
    expected = 72 * layers * h * h * (1 + length / (6 * h) + vocab / (12 * layers * h))
    assert flops_per_token(model) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("model", [GPT, LLAMA])
def test_operations_are_those_torch_counts_in_hugging_faces_model(model: ModelConfig) -> None:
    counter = pytest.importorskip("torch.utils.flop_counter")
    model = dataclasses.replace(model, seq_length=32)
    reference = hugging_face_gpt2(model) if model is not LLAMA and not model.is_gated else hugging_face_llama(model)
    reference.config._attn_implementation = "eager"
    ids = torch.zeros(2, 32, dtype=torch.long, device="meta")
    with counter.FlopCounterMode(display=False) as counted:
        reference(ids).logits.sum().backward()
    # The reference also multiplies its rotary positions by the frequencies, far under a thousandth here.
    assert counted.get_total_flops() == pytest.approx(flops_per_step(model, 2 * 32), rel=1e-3)


# Our and Hugging Face's names of what is frozen, in a GPT-2, whose table is tied, and in a Llama.
FROZEN = {
    "begun": (GPT, ("embedding.*", "layers.0.*"), r"wte|wpe|\.h\.0\."),
    "mixed": (GPT, ("*.attention.*", "*.mlp.up.weight", "embedding.*"), r"\.attn\.|c_fc\.weight|wte|wpe"),
    "all but biases": (GPT, ("*.weight",), r"weight"),
    "all but an MLP": (
        LLAMA,
        ("embedding.*", "layers.[01].*", "layers.2.attention*", "head.*"),
        r"embed|layers\.[01]\.|self_attn|input_layernorm|model\.norm|lm_head",
    ),
    "all but the output": (LLAMA, ("embedding.*", "layers.*", "head.norm.*"), r"^model"),
}


@pytest.mark.parametrize("name", FROZEN)
def test_what_is_frozen_costs_what_torch_counts_in_hugging_faces_model(name: str) -> None:
    counter = pytest.importorskip("torch.utils.flop_counter")
    model, frozen, theirs = FROZEN[name]
    model = dataclasses.replace(model, seq_length=32)
    reference = hugging_face_llama(model) if model.is_gated else hugging_face_gpt2(model)
    reference.config._attn_implementation = "eager"
    for key, parameter in reference.named_parameters():
        parameter.requires_grad_(re.search(theirs, key) is None)
    assert len({parameter.requires_grad for parameter in reference.parameters()}) == 2
    ids = torch.zeros(2, 32, dtype=torch.long, device="meta")
    with counter.FlopCounterMode(display=False) as counted:
        reference(ids).logits.sum().backward()
    assert counted.get_total_flops() == pytest.approx(flops_per_step(model, 2 * 32, frozen), rel=1e-3)
    assert flops_per_step(model, 2 * 32, frozen) < 0.95 * flops_per_step(model, 2 * 32)


# Dropout takes attention apart into products that the counter knows on the CPU; one process pads no table.
COUNTED = (
    "--num-layers 3 --hidden-size 32 --ffn-hidden-size 96 --num-attention-heads 4 --seq-length 16 --vocab-size 101 "
    "--attention-dropout 0.1 "
    "--make-vocab-size-divisible-by 1 --micro-batch-size 2 --global-batch-size 4 --train-iters 1 --lr 1e-3 --mock-data "
    "--device cpu"
)


def flops_in_place(buffer: Sequence[int], left: Sequence[int], right: Sequence[int], **other: object) -> int:
    """The operations of `buffer.addmm_(left, right)`, by their shapes: the product of a weight's gradient."""
    return 2 * left[0] * left[1] * right[1]


@pytest.mark.parametrize("frozen", ["", "--freeze-params embedding.* layers.0.*", "--freeze-params *.attention.*"])
@pytest.mark.parametrize("kind", ["gpt", "classifier"])
def test_a_step_of_ours_computes_what_is_counted(kind: str, frozen: str) -> None:
    counter = pytest.importorskip("torch.utils.flop_counter")
    architecture = "gpt" if kind == "gpt" else "bert"
    words = parse_args(f"{COUNTED} {frozen}".split(), program="test", description="", architecture=architecture)
    config = resolve(words, 1)
    model, patterns = config.model, config.train.freeze_params
    builder = build_gpt_stage if kind == "gpt" else partial(build_bert_classifier_stage, num_outputs=3)
    parts = build_parts(config, make_mesh(Layout()), torch.device("cpu"), builder)
    tokens, mask = torch.zeros(4, 16, dtype=torch.int64), torch.ones(4, 16)
    batch = GPTBatch(tokens, tokens, mask)
    expected = pretraining_flops(model, patterns)
    if kind == "classifier":
        batch = SequenceBatch(tokens, tokens, torch.ones(4), labels_B=torch.zeros(4, dtype=torch.int64))
        expected = classifier_flops(model, 3, patterns)
    in_place = {torch.ops.aten.addmm_: flops_in_place}
    with counter.FlopCounterMode(display=False, custom_mapping=in_place) as counted:
        train_step(parts, batch, Rates(1e-3, 0.0), step=0)
    assert counted.get_total_flops() == pytest.approx(expected.of([16] * 4), rel=1e-12)


def test_a_step_costs_its_tokens() -> None:
    assert flops_per_step(GPT, 1000) == 1000 * flops_per_token(GPT)


def test_an_unknown_vocabulary_is_named() -> None:
    with pytest.raises(ConfigError, match="--vocab-size"):
        resolve_model(dataclasses.replace(_GIVEN, vocab_size=None))


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA H200", "fp16", 989.4),
        ("NVIDIA B200", "bf16", 2250.0),
        ("Tesla V100-SXM2-16GB", "fp16", 125.0),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("NVIDIA L4", "bf16", 121.0),
        ("NVIDIA L40S", "bf16", 362.05),
        ("NVIDIA A10", "bf16", 125.0),
        ("NVIDIA A10G", "bf16", None),
        ("cpu", "fp32", None),
    ],
)
def test_peaks_are_of_the_device_named_and_of_no_other(name: str, precision: str, peak: float | None) -> None:
    assert peak_tflops(name, precision) == peak
