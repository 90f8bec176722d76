"""Published models by name: `--preset NAME` gives their shapes as defaults, which files and flags override.

Each row holds the options that differ from a plain GPT or BERT, the parameter count its authors print, and where.
Counts are as precise as they are printed: "13.0B" means 12.95 to 13.05 billion, "350M" means 345 to 355 million.

Sources: GPT-2: Radford et al. 2019 and the released weights. GPT-3: Brown et al. 2020 (arXiv:2005.14165), table 2.1;
its 1.3B row prints 24 heads of 128 for a width of 2048, which does not give 1.3B parameters, so we take 16 heads of
128; its 13B row prints a width of 5140 with 40 heads of 128, kept as printed. Turing-NLG: Microsoft 2020. MT-NLG:
Smith et al. 2022 (arXiv:2201.11990), section 3.1. megatron-*: Narayanan et al. 2021 (arXiv:2104.04473), table 1.
Llama 2: Touvron et al. 2023 (arXiv:2307.09288); Llama 3 and 3.1: Grattafiori et al. 2024 (arXiv:2407.21783), table 3,
at the sequence length of their first training phase. Mistral: Jiang et al. 2023 (arXiv:2310.06825), table 1, with the
vocabulary and without the window of the released weights 0.3; Mixtral: Jiang et al. 2024 (arXiv:2401.04088), table 1;
Qwen2.5: Yang et al. 2024 (arXiv:2412.15115) and the released weights; Qwen3: Yang et al. 2025 (arXiv:2505.09388),
tables 1 and 2; OLMoE: Muennighoff et al. 2024 (arXiv:2409.02060), table 1; deepspeed-moe: Rajbhandari et al. 2022
(arXiv:2201.05596), table 2. BERT: Devlin et al. 2018 (arXiv:1810.04805), section 3, with the
norm's epsilon and vocabulary of the released weights; megatron-bert-*: Shoeybi et al. 2019 (arXiv:1909.08053), table 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from megatron3d.config.derive import resolve_model
from megatron3d.config.sections.model import GivenModel, ModelConfig


@dataclass(frozen=True)
class Preset:
    """One published model: the options of the model that it sets and its printed number of parameters."""

    name: str
    model: Mapping[str, Any]
    published_parameters: str
    source: str

    def model_config(self) -> ModelConfig:
        """The model with all other options at their defaults."""
        return resolve_model(GivenModel(**self.model))


@dataclass(frozen=True)
class _GPTFamily:
    """What the GPTs of one source share."""

    source: str
    vocab_size: int
    seq_length: int

    def preset(self, name: str, published: str, *, layers: int, hidden: int, heads: int, **more: Any) -> Preset:
        """One size of this family: learned positions, LayerNorm, GELU, biases, tied embeddings."""
        model = {
            "num_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "seq_length": self.seq_length,
            "max_position_embeddings": self.seq_length,
            "vocab_size": self.vocab_size,
            **more,
        }
        return Preset(name, MappingProxyType(model), published, self.source)


@dataclass(frozen=True)
class _LlamaFamily:
    """What the Llamas of one generation share."""

    source: str
    vocab_size: int
    seq_length: int
    rotary_base: float

    def preset(
        self, name: str, published: str, *, layers: int, hidden: int, heads: int, groups: int, ffn: int, **more: Any
    ) -> Preset:
        """One size of this generation: rotary positions, RMSNorm, SwiGLU, no biases, no dropout, untied embeddings."""
        model = {
            "num_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "group_query_attention": groups != heads,
            "num_query_groups": groups,
            "ffn_hidden_size": ffn,
            "seq_length": self.seq_length,
            "vocab_size": self.vocab_size,
            "position_embedding_type": "rope",
            "rotary_base": self.rotary_base,
            "normalization": "RMSNorm",
            "norm_epsilon": 1e-5,
            "activation": "swiglu",
            "add_bias_linear": False,
            "untie_embeddings_and_output_weights": True,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            **more,
        }
        return Preset(name, MappingProxyType(model), published, self.source)


@dataclass(frozen=True)
class _BertFamily:
    """What the BERTs of one source share."""

    source: str
    norm_position: str
    norm_epsilon: float
    vocab_size: int = 30522
    seq_length: int = 512

    def preset(self, name: str, published: str, *, layers: int, hidden: int, heads: int) -> Preset:
        """One size of this family: learned positions, two token types, LayerNorm, exact GELU, tied embeddings."""
        model = {
            "architecture": "bert",
            "num_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "seq_length": self.seq_length,
            "max_position_embeddings": self.seq_length,
            "vocab_size": self.vocab_size,
            "norm_position": self.norm_position,
            "norm_epsilon": self.norm_epsilon,
            "activation": "gelu",
            "num_token_types": 2,
        }
        return Preset(name, MappingProxyType(model), published, self.source)


_GPT2 = _GPTFamily("Radford et al. 2019, with the counts of the released weights", 50257, 1024)
_GPT3 = _GPTFamily("Brown et al. 2020, table 2.1", 50257, 2048)
_TURING = _GPTFamily("Microsoft Turing-NLG 2020", 50257, 1024)
_MT_NLG = _GPTFamily("Smith et al. 2022, section 3.1", 50257, 2048)
_SC21 = _GPTFamily("Narayanan et al. 2021, table 1", 51200, 2048)
_LLAMA2 = _LlamaFamily("Touvron et al. 2023, with the counts of the released weights", 32000, 4096, 10000.0)
_LLAMA3 = _LlamaFamily("Grattafiori et al. 2024, with the counts of the released weights", 128256, 8192, 500000.0)
_MISTRAL = _LlamaFamily("Jiang et al. 2023, with the counts of the released weights 0.3", 32768, 32768, 1e6)
_QWEN25 = _LlamaFamily("Yang et al. 2024, with the counts of the released weights", 152064, 32768, 1e6)
_MIXTRAL = _LlamaFamily("Jiang et al. 2024, with the counts of the released weights", 32000, 32768, 1e6)
_QWEN3 = _LlamaFamily("Yang et al. 2025, with the counts of the released weights", 151936, 32768, 1e6)
_OLMOE = _LlamaFamily("Muennighoff et al. 2024, with the counts of the released weights", 50304, 4096, 10000.0)
_DEEPSPEED_MOE = _GPTFamily("Rajbhandari et al. 2022, table 2", 50257, 2048)
_BERT = _BertFamily("Devlin et al. 2018, section 3", "post", 1e-12)
_MEGATRON_BERT = _BertFamily("Shoeybi et al. 2019, table 4", "pre", 1e-5)

_ROWS: tuple[Preset, ...] = (
    _GPT2.preset("gpt2-124m", "124M", layers=12, hidden=768, heads=12),
    _GPT2.preset("gpt2-355m", "355M", layers=24, hidden=1024, heads=16),
    _GPT2.preset("gpt2-774m", "774M", layers=36, hidden=1280, heads=20),
    _GPT2.preset("gpt2-1.5b", "1.558B", layers=48, hidden=1600, heads=25),
    _GPT3.preset("gpt3-125m", "125M", layers=12, hidden=768, heads=12),
    _GPT3.preset("gpt3-350m", "350M", layers=24, hidden=1024, heads=16),
    _GPT3.preset("gpt3-760m", "760M", layers=24, hidden=1536, heads=16),
    _GPT3.preset("gpt3-1.3b", "1.3B", layers=24, hidden=2048, heads=16),
    _GPT3.preset("gpt3-2.7b", "2.7B", layers=32, hidden=2560, heads=32),
    _GPT3.preset("gpt3-6.7b", "6.7B", layers=32, hidden=4096, heads=32),
    _GPT3.preset("gpt3-13b", "13.0B", layers=40, hidden=5140, heads=40, kv_channels=128),
    _GPT3.preset("gpt3-175b", "175.0B", layers=96, hidden=12288, heads=96),
    _TURING.preset("turing-nlg-17b", "17.2B", layers=78, hidden=4256, heads=28),
    _MT_NLG.preset("mt-nlg-530b", "530B", layers=105, hidden=20480, heads=128),
    _SC21.preset("megatron-1.7b", "1.7B", layers=24, hidden=2304, heads=24),
    _SC21.preset("megatron-3.6b", "3.6B", layers=30, hidden=3072, heads=32),
    _SC21.preset("megatron-7.5b", "7.5B", layers=36, hidden=4096, heads=32),
    _SC21.preset("megatron-18b", "18.4B", layers=40, hidden=6144, heads=48),
    _SC21.preset("megatron-39b", "39.1B", layers=48, hidden=8192, heads=64),
    _SC21.preset("megatron-76b", "76.1B", layers=60, hidden=10240, heads=80),
    _SC21.preset("megatron-145b", "145.6B", layers=80, hidden=12288, heads=96),
    _SC21.preset("megatron-310b", "310.1B", layers=96, hidden=16384, heads=128),
    _SC21.preset("megatron-530b", "529.6B", layers=105, hidden=20480, heads=128),
    _SC21.preset("megatron-1t", "1008.0B", layers=128, hidden=25600, heads=160),
    _LLAMA2.preset("llama2-7b", "6.738B", layers=32, hidden=4096, heads=32, groups=32, ffn=11008),
    _LLAMA2.preset("llama2-13b", "13.016B", layers=40, hidden=5120, heads=40, groups=40, ffn=13824),
    _LLAMA2.preset("llama2-70b", "68.977B", layers=80, hidden=8192, heads=64, groups=8, ffn=28672),
    _LLAMA3.preset("llama3-8b", "8.030B", layers=32, hidden=4096, heads=32, groups=8, ffn=14336),
    _LLAMA3.preset("llama3-70b", "70.554B", layers=80, hidden=8192, heads=64, groups=8, ffn=28672),
    _LLAMA3.preset("llama3-405b", "405.853B", layers=126, hidden=16384, heads=128, groups=8, ffn=53248),
    _LLAMA3.preset(
        "llama3.1-8b",
        "8.030B",
        layers=32,
        hidden=4096,
        heads=32,
        groups=8,
        ffn=14336,
        rotary_scaling="llama3",
        rotary_scaling_factor=8.0,
        max_position_embeddings=131072,
    ),
    _MISTRAL.preset("mistral-7b", "7.248B", layers=32, hidden=4096, heads=32, groups=8, ffn=14336),
    _QWEN25.preset(
        "qwen2.5-7b",
        "7.616B",
        layers=28,
        hidden=3584,
        heads=28,
        groups=4,
        ffn=18944,
        add_qkv_bias=True,
        norm_epsilon=1e-6,
    ),
    _QWEN3.preset(
        "qwen3-8b",
        "8.191B",
        layers=36,
        hidden=4096,
        heads=32,
        groups=8,
        ffn=12288,
        kv_channels=128,
        qk_layernorm=True,
        norm_epsilon=1e-6,
    ),
    _MIXTRAL.preset("mixtral-8x7b", "46.703B", layers=32, hidden=4096, heads=32, groups=8, ffn=14336, num_experts=8),
    _QWEN3.preset(
        "qwen3-30b-a3b",
        "30.532B",
        layers=48,
        hidden=2048,
        heads=32,
        groups=4,
        ffn=6144,
        kv_channels=128,
        qk_layernorm=True,
        norm_epsilon=1e-6,
        num_experts=128,
        moe_router_topk=8,
        moe_ffn_hidden_size=768,
    ),
    _OLMOE.preset(
        "olmoe-1b-7b",
        "6.919B",
        layers=16,
        hidden=2048,
        heads=16,
        groups=16,
        ffn=1024,
        qk_layernorm=True,
        qk_layernorm_across_heads=True,
        num_experts=64,
        moe_router_topk=8,
        moe_router_pre_softmax=True,
    ),
    _DEEPSPEED_MOE.preset(
        "deepspeed-moe-1.3b-128",
        "52B",
        layers=24,
        hidden=2048,
        heads=16,
        num_experts=128,
        moe_layer_freq="[0,1]*12",
        moe_router_topk=1,
        moe_router_pre_softmax=True,
    ),
    _DEEPSPEED_MOE.preset(
        "deepspeed-pr-moe-1.3b-64-128",
        "31B",
        layers=24,
        hidden=2048,
        heads=16,
        num_experts_by_layer=("64",) * 10 + ("128",) * 2,
        mlp_type="residual",
        moe_layer_freq="1::2",
        moe_router_topk=1,
        moe_router_pre_softmax=True,
    ),
    _BERT.preset("bert-base", "110M", layers=12, hidden=768, heads=12),
    _BERT.preset("bert-large", "340M", layers=24, hidden=1024, heads=16),
    _MEGATRON_BERT.preset("megatron-bert-336m", "336M", layers=24, hidden=1024, heads=16),
    _MEGATRON_BERT.preset("megatron-bert-1.3b", "1.3B", layers=24, hidden=2048, heads=32),
    _MEGATRON_BERT.preset("megatron-bert-3.9b", "3.9B", layers=48, hidden=2560, heads=40),
)

PRESETS: Mapping[str, Preset] = MappingProxyType({row.name: row for row in _ROWS})
