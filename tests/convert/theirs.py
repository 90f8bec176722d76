"""Small models of transformers with weights that let mistakes show, saved as `save_pretrained` saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

VOCAB, HIDDEN, HEADS, LAYERS, POSITIONS, FFN, CLASSES = 67, 32, 4, 4, 24, 56, 3

_BERT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": FFN,
    "max_position_embeddings": POSITIONS,
    "type_vocab_size": 2,
}
_LABELS = {"id2label": {0: "bad", 1: "fair", 2: "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_positions": POSITIONS,
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_inner": FFN,
    "bos_token_id": 5,
    "eos_token_id": 5,
}
_LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": POSITIONS,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN: dict[str, Any] = {
    **_LLAMA,
    "moe_intermediate_size": 24,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "mlp_only_layers": [1],
    "tie_word_embeddings": False,
}
_OLMOE: dict[str, Any] = {
    **_LLAMA,
    "head_dim": HIDDEN // HEADS,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "tie_word_embeddings": False,
}
_LENGTH = {"original_max_position_embeddings": 8}  # under a third of the positions that the tests use
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_LENGTH}
_YARN = {"rope_type": "yarn", "factor": 3.0, "attention_factor": 1.2, "beta_fast": 4.0, "truncate": False, **_LENGTH}
_YARN_OF_MSCALES = {"rope_type": "yarn", "factor": 3.0, "mscale": 0.5, "mscale_all_dim": 2.0, **_LENGTH}


def _scaled(**parameters: Any) -> dict[str, Any]:
    """A Llama's values with scaled rotary frequencies."""
    return _LLAMA | {"rope_parameters": {"rope_theta": 500.0, **parameters}}


_LINEAR = _scaled(rope_type="linear", factor=4.0)
# Name -> transformers' class of the model, that of its config, and the config's values.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert-pretraining": ("BertForPreTraining", "BertConfig", _BERT),
    "bert-masked": ("BertForMaskedLM", "BertConfig", _BERT | {"hidden_act": "gelu_new"}),
    "bert-untied": ("BertForPreTraining", "BertConfig", _BERT | {"tie_word_embeddings": False}),
    "bert-bare": ("BertModel", "BertConfig", _BERT),
    "bert-classifier": ("BertForSequenceClassification", "BertConfig", _BERT | _LABELS),
    "megatron-bert": ("MegatronBertForPreTraining", "MegatronBertConfig", _BERT),
    "megatron-bert-classifier": ("MegatronBertForSequenceClassification", "MegatronBertConfig", _BERT | _LABELS),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA | {"tie_word_embeddings": False}),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", _LLAMA | {"tie_word_embeddings": True}),
    "llama-3.1": ("LlamaForCausalLM", "LlamaConfig", _scaled(**_LLAMA3) | {"tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", "MistralConfig", _scaled(**_YARN) | {"sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _LINEAR | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _scaled(**_YARN_OF_MSCALES)),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", _LLAMA | {"num_local_experts": 4}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", _QWEN),
    "qwen3-moe-normed": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", _QWEN | {"norm_topk_prob": True}),
    "qwen2-moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", _QWEN | {"shared_expert_intermediate_size": 20}),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", _OLMOE),
}


def build(name: str, **changes: Any) -> nn.Module:
    """The model, with changes of its config, in evaluation mode; every parameter is moved, so that no bias is 0 and no
    norm weight 1."""
    model_class, config_class, values = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**(values | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        if name == "bert-untied":
            # With a decoder of its own transformers keeps this second bias, but computes nothing with it.
            model.cls.predictions.bias.copy_(model.cls.predictions.decoder.bias)
    return model.eval()


def saved(model: nn.Module, directory: Path) -> Path:
    """Write the model as transformers does."""
    model.save_pretrained(directory)
    return directory
