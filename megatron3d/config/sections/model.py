"""The shape of a transformer: what it computes, independent of how it is cut; as it is given, and resolved."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron3d.config.activations import ACTIVATIONS, GATED_ACTIVATIONS
from megatron3d.config.architectures import ARCHITECTURES, ModelTraits, traits_of
from megatron3d.config.experts import balance_losses, expert_layers, experts_by_layer
from megatron3d.config.fields import off_switch, option, switch
from megatron3d.config.sections.experts import GivenExperts
from megatron3d.config.sections.rotary import GivenRotary


@dataclass(frozen=True)
class GivenTransformer:
    """The options of the layers, those of rotary positions and of experts aside."""

    architecture: str = option(
        "gpt",
        "--architecture",
        "What is trained; every training script knows its own. Or module:name of an Architecture of your own.",
        choices=tuple(ARCHITECTURES),
        takes_code=True,
    )
    num_layers: int | None = option(None, "--num-layers", "Transformer layers.", also=("--encoder-num-layers",))
    hidden_size: int | None = option(None, "--hidden-size", "Width of the residual stream, H.")
    num_attention_heads: int | None = option(None, "--num-attention-heads", "Query heads, N.")
    seq_length: int | None = option(
        None, "--seq-length", "Tokens of one training sample, S.", unit="tokens", also=("--encoder-seq-length",)
    )
    max_position_embeddings: int | None = option(
        None, "--max-position-embeddings", "Longest sequence the positions cover; default --seq-length.", unit="tokens"
    )
    ffn_hidden_size: int | None = option(
        None,
        "--ffn-hidden-size",
        "Width inside the MLP, F; default 4H, or int(8H/3/64)*64 with a gated activation such as --swiglu.",
        also=("--intermediate-size",),
    )
    kv_channels: int | None = option(None, "--kv-channels", "Size of one head, D; default H/N.")
    group_query_attention: bool = switch(
        "--group-query-attention", "Share each key and value head among several query heads."
    )
    num_query_groups: int | None = option(
        None,
        "--num-query-groups",
        "Key and value heads; default N, or 1 (multi-query attention) with --group-query-attention.",
    )
    vocab_size: int | None = option(
        None, "--vocab-size", "Token ids in use, before padding; default the tokenizer's.", unit="tokens"
    )
    make_vocab_size_divisible_by: int = option(
        128, "--make-vocab-size-divisible-by", "The padded vocabulary is a multiple of this times TP."
    )
    position_embedding_type: str = option(
        "learned_absolute",
        "--position-embedding-type",
        "Where positions enter; yarn is rope with --rotary-scaling yarn.",
        choices=("learned_absolute", "rope", "yarn", "none"),
    )
    normalization: str = option(
        "LayerNorm", "--normalization", "The norm of every block.", choices=("LayerNorm", "RMSNorm")
    )
    norm_epsilon: float = option(
        1e-5, "--norm-epsilon", "Added to the variance inside a norm.", also=("--layernorm-epsilon",)
    )
    apply_layernorm_1p: bool = switch(
        "--apply-layernorm-1p", "Store the weights of norms less 1, so that they start at 0 and are small."
    )
    norm_position: str = option(
        "pre",
        "--norm-position",
        "Norms before each half of a block, and one at the end (pre), or after each residual sum (post); BERT only.",
        choices=("pre", "post"),
    )
    activation: str | None = option(
        None, "--activation", "MLP activation; default gelu_tanh, and gelu in a BERT.", choices=ACTIVATIONS
    )
    swiglu: bool = switch("--swiglu", "The same as --activation swiglu.")
    squared_relu: bool = switch("--squared-relu", "The same as --activation squared_relu.")
    openai_gelu: bool = switch("--openai-gelu", "The same as --activation gelu_tanh.")
    add_bias_linear: bool = off_switch("--disable-bias-linear", "No bias in the linear layers.")
    add_qkv_bias: bool = switch(
        "--add-qkv-bias", "A bias in the query, key and value projection even with --disable-bias-linear."
    )
    qk_layernorm: bool = switch("--qk-layernorm", "Normalise each head's queries and keys.")
    qk_layernorm_across_heads: bool = switch(
        "--qk-layernorm-across-heads", "With --qk-layernorm: normalise those of all heads together, as OLMoE does."
    )
    untie_embeddings_and_output_weights: bool = switch(
        "--untie-embeddings-and-output-weights", "Give the output layer weights of its own."
    )
    hidden_dropout: float = option(0.1, "--hidden-dropout", "Dropout on the embedding and on each block's two outputs.")
    attention_dropout: float = option(0.1, "--attention-dropout", "Dropout on the attention probabilities.")
    init_method_std: float = option(0.02, "--init-method-std", "Standard deviation of the initial weights.")
    apply_residual_connection_post_layernorm: bool = switch(
        "--apply-residual-connection-post-layernorm", "Take the residual from after the norm."
    )
    bert_binary_head: bool = off_switch("--bert-no-binary-head", "No second sentence and no sentence head.")
    num_token_types: int | None = option(
        None,
        "--num-token-types",
        "Rows of BERT's table of segments, 0 for none; default 2 with the sentence head and 0 without.",
    )

    @property
    def traits(self) -> ModelTraits:
        """What is known of the architecture besides its layers."""
        return traits_of(self.architecture)

    @property
    def is_causal(self) -> bool:
        """Whether a token attends to those before it alone, where no mask says otherwise."""
        return self.traits.is_causal

    @property
    def has_binary_head(self) -> bool:
        """Whether the model also scores a pair of sentences."""
        return "bert_binary_head" in self.traits.own_options and self.bert_binary_head


@dataclass(frozen=True)
class GivenModel(GivenExperts, GivenRotary, GivenTransformer):
    """The model as it is given. A field that is None is not given: it follows from the others, or the run lacks it."""


@dataclass(frozen=True)
class ModelConfig(GivenModel):
    """The model, resolved: every size is known, and the layers read this one."""

    num_layers: int = field(kw_only=True)
    hidden_size: int = field(kw_only=True)
    num_attention_heads: int = field(kw_only=True)
    seq_length: int = field(kw_only=True)
    max_position_embeddings: int = field(kw_only=True)
    ffn_hidden_size: int = field(kw_only=True)
    kv_channels: int = field(kw_only=True)
    num_query_groups: int = field(kw_only=True)
    vocab_size: int = field(kw_only=True)
    activation: str = field(kw_only=True)
    num_token_types: int = field(kw_only=True)

    @property
    def is_gated(self) -> bool:
        """Whether the MLP multiplies a gate into its up projection, which then has two fused parts."""
        return self.activation in GATED_ACTIVATIONS

    def experts_of(self, layer: int) -> int:
        """How many experts a layer has; 0 where it has one MLP that all tokens pass."""
        if not self.has_experts:
            return 0
        has_experts = expert_layers(self.moe_layer_freq, self.num_layers)
        if self.num_experts_by_layer:
            return experts_by_layer(self.num_experts_by_layer, has_experts)[layer]
        return (self.num_experts or 0) if has_experts[layer] else 0

    @property
    def expert_ffn_hidden_size(self) -> int:
        """Width inside each expert."""
        return self.moe_ffn_hidden_size or self.ffn_hidden_size

    @property
    def num_expert_layers(self) -> int:
        """Layers with experts."""
        return sum(self.experts_of(layer) > 0 for layer in range(self.num_layers))

    @property
    def balance_losses(self) -> tuple[tuple[str, float], ...]:
        """The losses that balance the load of experts, with the weight of each."""
        return balance_losses(self.moe_router_load_balancing_type, self.moe_aux_loss_coeff)
