"""All kernels behind one value: `Registry()` by the default rule, `Registry("reference")` or by name as forced.

A model gets one registry at construction and calls its methods; nothing is looked up in a global or the environment.
The same functions exist without a registry in the file of each kernel; how one is picked is in `selection.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from megatron3d_kernels import fp8_cast, fp8_products, grouped_products, products, rectangles
from megatron3d_kernels import packed as packed_documents
from megatron3d_kernels.activation import activation
from megatron3d_kernels.adam import AdamStep, AdamTensors, adam
from megatron3d_kernels.attention import attention
from megatron3d_kernels.attention_backends import LOCAL, UNFUSED, AttentionChoice
from megatron3d_kernels.cross_entropy import Sums, cross_entropy_backward, local_max, local_softmax_sums
from megatron3d_kernels.dropout import RowDropout, dropout, row_keys
from megatron3d_kernels.fp8 import Operand
from megatron3d_kernels.gated_activation import fused_gated_activation, gated_activation, swiglu
from megatron3d_kernels.launch import TRITON, TritonSupport
from megatron3d_kernels.layer_norm import layer_norm
from megatron3d_kernels.query_key_norm import HeadNorms, normalised_query_key_value
from megatron3d_kernels.query_key_value import Heads, query_key_value
from megatron3d_kernels.residual_norm import Pair, RowNorm, added_norm, forked_norm, writes_copies
from megatron3d_kernels.rms_norm import rms_norm
from megatron3d_kernels.rotary import Angles, apply_rotary
from megatron3d_kernels.selection import KERNEL_NAMES, Selection

_ANY_ATTENTION = AttentionChoice()


class Registry(Selection):
    """A selection with the kernels as methods; arguments, results and errors are those of the functions they name."""

    def __init__(
        self,
        force: str | Mapping[str, str] | None = None,
        *,
        support: TritonSupport = TRITON,
        library: str = products.TORCH,
        grouped: str | None = None,
        packed: str = packed_documents.TORCH,
        attention: AttentionChoice = _ANY_ATTENTION,
    ) -> None:
        """Decide once for all calls: kernels as `Selection` does, the library of the products ("torch", "onednn"), the
        way of grouped ones ("looped", "batched", "grouped"; None is by the measured table), the kernel of packed
        documents on CUDA ("torch", "flash-attn"), and the backend of all other attention.

        Raises KernelError as `Selection` does, and for a library, way or kernel that is unknown or not there.
        """
        super().__init__(force, support=support)
        self._grouped = grouped_products.require_way(grouped)
        self._library = products.require_library(library)
        self._packed = packed_documents.require_packed(packed)
        self._attention = attention

    def explain(self, kernel_names: Iterable[str] = KERNEL_NAMES) -> str:
        """The table of `Selection.explain`, and how weight gradients reach fp32 buffers."""
        return f"{super().explain(kernel_names)}\n{products.describe_wide_sums()}"

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x W^T + b, without autograd; see `products.linear`."""
        return products.linear(x, weight, bias, library=self._library)

    def add_linear(self, onto: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
        """onto += x W^T, without autograd; see `products.add_linear`."""
        products.add_linear(onto, x, weight)

    def input_gradient(self, grad_out: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The gradient of a linear layer's input; see `products.input_gradient`."""
        return products.input_gradient(grad_out, weight, library=self._library)

    def linear_into(
        self, y_RTO: torch.Tensor, x_RTI: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        """x W^T + b, written where y is; see `products.linear_into`."""
        products.linear_into(y_RTO, x_RTI, weight, bias, library=self._library)

    def input_gradient_into(self, grad_x_RTI: torch.Tensor, grad_RTO: torch.Tensor, weight: torch.Tensor) -> None:
        """The gradient of a linear layer's input, written where `grad_x` is; see `products.input_gradient_into`."""
        products.input_gradient_into(grad_x_RTI, grad_RTO, weight, library=self._library)

    def weight_gradient(self, grad_TO: torch.Tensor, x_TI: torch.Tensor) -> torch.Tensor:
        """The gradient of a linear layer's weight; see `products.weight_gradient`."""
        return products.weight_gradient(grad_TO, x_TI, library=self._library)

    def add_weight_gradient(
        self, buffer_OI: torch.Tensor, grad_TO: torch.Tensor, x_TI: torch.Tensor, *, overwrites: bool = False
    ) -> None:
        """The same, added to a buffer or put in its place; see `products.add_weight_gradient`."""
        products.add_weight_gradient(buffer_OI, grad_TO, x_TI, library=self._library, overwrites=overwrites)

    def grouped_linear(
        self,
        x_RI: torch.Tensor,
        weights_OI: Sequence[torch.Tensor],
        biases_O: Sequence[torch.Tensor | None],
        counts: Sequence[int],
    ) -> torch.Tensor:
        """The linear layers of many experts, each of its own rows; see `grouped_products.grouped_linear`."""
        return grouped_products.grouped_linear(
            x_RI, weights_OI, biases_O, counts, library=self._library, way=self._grouped
        )

    def grouped_input_gradient(
        self, grad_RO: torch.Tensor, weights_OI: Sequence[torch.Tensor], counts: Sequence[int]
    ) -> torch.Tensor:
        """The gradient of their input; see `grouped_products.grouped_input_gradient`."""
        return grouped_products.grouped_input_gradient(
            grad_RO, weights_OI, counts, library=self._library, way=self._grouped
        )

    def add_grouped_weight_gradients(
        self,
        buffers_OI: Sequence[torch.Tensor],
        grad_RO: torch.Tensor,
        x_RI: torch.Tensor,
        counts: Sequence[int],
        *,
        overwrites: Sequence[bool],
    ) -> None:
        """The gradients of their weights; see `grouped_products.add_grouped_weight_gradients`."""
        grouped_products.add_grouped_weight_gradients(
            buffers_OI, grad_RO, x_RI, counts, overwrites=overwrites, library=self._library, way=self._grouped
        )

    def fp8_amax_bits(self, x: torch.Tensor) -> torch.Tensor:
        """The largest magnitude of a tensor, as bits; see `fp8_cast.amax_bits`."""
        return fp8_cast.amax_bits(x, selection=self)

    def fp8_cast_tensor(
        self, x_RC: torch.Tensor, amax: torch.Tensor, dtype: torch.dtype, wanted: fp8_cast.Orientations
    ) -> fp8_cast.Pair:
        """A matrix in fp8 by one scale; see `fp8_cast.cast_tensor`."""
        return fp8_cast.cast_tensor(x_RC, amax, dtype, wanted, selection=self)

    def fp8_cast_blocks(
        self, x_RC: torch.Tensor, dtype: torch.dtype, wanted: fp8_cast.Orientations, *, square: bool
    ) -> fp8_cast.Pair:
        """A matrix in fp8 by scales of blocks; see `fp8_cast.cast_blocks`."""
        return fp8_cast.cast_blocks(x_RC, dtype, wanted, square=square, selection=self)

    def fp8_transpose(self, operand: Operand) -> Operand:
        """An operand of one scale, to be summed over its rows; see `fp8_cast.transpose`."""
        return fp8_cast.transpose(operand, selection=self)

    def fp8_product(
        self,
        a_MK: Operand,
        b_NK: Operand,
        dtype: torch.dtype,
        *,
        bias_N: torch.Tensor | None = None,
        fast: bool = False,
    ) -> torch.Tensor:
        """a b^T + bias of two fp8 matrices; see `fp8_products.scaled_product`."""
        return fp8_products.scaled_product(a_MK, b_NK, dtype, bias_N=bias_N, fast=fast, selection=self)

    def fp8_add_weight_gradient(
        self,
        buffer_OI: torch.Tensor,
        g_OT: Operand,
        x_IT: Operand,
        layer_dtype: torch.dtype,
        *,
        overwrites: bool = False,
    ) -> None:
        """The gradient of a weight, added to a buffer; see `fp8_products.add_scaled_weight_gradient`."""
        fp8_products.add_scaled_weight_gradient(
            buffer_OI, g_OT, x_IT, layer_dtype, overwrites=overwrites, selection=self
        )

    def layer_norm(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, eps: float = 1e-5
    ) -> torch.Tensor:
        """Normalize [..., H] to mean 0, variance 1, scale, shift; see `layer_norm.layer_norm`."""
        return layer_norm(x, weight, bias, eps, selection=self)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
        """Divide [..., H] by its root mean square and scale; see `rms_norm.rms_norm`."""
        return rms_norm(x, weight, eps, selection=self)

    def forked_norm(
        self, x: torch.Tensor, norm: RowNorm, *, copies: bool = False, bias: torch.Tensor | None = None
    ) -> Pair:
        """x for the residual connection, or a copy, and norm(x); see `residual_norm.forked_norm`."""
        return forked_norm(x, norm, copies=copies, bias=bias, selection=self)

    def writes_copies(self, x: torch.Tensor) -> bool:
        """Whether a product should be added to the copy that `forked_norm` makes of such a tensor."""
        return writes_copies(x, selection=self)

    def added_norm(
        self,
        residual: torch.Tensor,
        branch: torch.Tensor,
        norm: RowNorm,
        *,
        bias: torch.Tensor | None = None,
        dropping: RowDropout | None = None,
    ) -> Pair:
        """residual + dropout(branch + bias), and its norm; see `residual_norm.added_norm`."""
        return added_norm(residual, branch, norm, bias=bias, dropping=dropping, selection=self)

    def attention(
        self,
        q_BNSD: torch.Tensor,
        k_BGTD: torch.Tensor,
        v_BGTD: torch.Tensor,
        *,
        mask: torch.Tensor | None,
        probability: float,
        is_causal: bool,
    ) -> torch.Tensor:
        """softmax(q k^T / sqrt(D)) v by device, dtype and length; see `attention.attention`."""
        how = {"mask": mask, "probability": probability, "is_causal": is_causal}
        return attention(q_BNSD, k_BGTD, v_BGTD, **how, choice=self._attention)

    def keeps_no_scores(self, q_BNSD: torch.Tensor) -> bool:
        """Whether attention is a GPU's fused kernel, of which recomputing it would save nothing."""
        return q_BNSD.is_cuda and self._attention.backend not in (UNFUSED, LOCAL)

    def rectangle_attention(
        self, q_BNSD: torch.Tensor, k_BGTD: torch.Tensor, v_BGTD: torch.Tensor, plan: rectangles.Plan
    ) -> torch.Tensor:
        """softmax(q k^T / sqrt(D)) v over rectangles of the scores; see `rectangles.rectangle_attention`, and `packed`
        for documents on CUDA."""
        if packed_documents.suits_packed(q_BNSD, plan):
            return packed_documents.packed_attention(q_BNSD, k_BGTD, v_BGTD, plan, kernel=self._packed)
        return rectangles.rectangle_attention(q_BNSD, k_BGTD, v_BGTD, plan)

    def activation(self, x: torch.Tensor, kind: str, *, bias: torch.Tensor | None = None) -> torch.Tensor:
        """gelu, gelu_tanh, relu, squared_relu or silu; see `activation.activation`."""
        return activation(x, kind, bias=bias, selection=self)

    def dropout(
        self, x: torch.Tensor, keys: torch.Tensor, probability: float, *, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Drop elements of [..., W] by the keys [...] of its rows and add a residual; see `dropout.dropout`."""
        return dropout(x, keys, probability, residual=residual, selection=self)

    def row_keys(self, x: torch.Tensor, key: int, first_sample: int, positions_SB: torch.Tensor) -> torch.Tensor:
        """The keys of the rows of x [S, B, W] by sample and position, int64 [S, B]; see `dropout.row_keys`."""
        return row_keys(x, key, first_sample, positions_SB, selection=self)

    def gated_activation(self, gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
        """act(gate) * up for swiglu, geglu, reglu; see `gated_activation.gated_activation`."""
        return gated_activation(gate, up, kind, selection=self)

    def fused_gated_activation(
        self, gate_up: torch.Tensor, kind: str, *, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The same for gate and up in one tensor [..., 2F]; see `gated_activation.fused_gated_activation`."""
        return fused_gated_activation(gate_up, kind, bias=bias, selection=self)

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up for gate_up [..., 2F]; see `gated_activation.swiglu`."""
        return swiglu(gate_up, selection=self)

    def apply_rotary(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
    ) -> torch.Tensor:
        """Turn the leading part of each head of [B, N, S, D] by its position; see `rotary.apply_rotary`."""
        return apply_rotary(x, cos, sin, interleaved, selection=self)

    def adam(self, parameters: Sequence[AdamTensors], step: AdamStep) -> None:
        """Update flat parameters and their copies in place; see `adam.adam`."""
        adam(parameters, step, selection=self)

    def query_key_value(
        self,
        qkv_SBO: torch.Tensor,
        heads: tuple[int, int],
        rotary: Angles | None = None,
        *,
        interleaved: bool = False,
        bias: torch.Tensor | None = None,
    ) -> Heads:
        """Views of a projection's output, turned in place; see `query_key_value.query_key_value`."""
        return query_key_value(qkv_SBO, heads, rotary, interleaved=interleaved, bias=bias, selection=self)

    def normalised_query_key_value(
        self,
        qkv_SBO: torch.Tensor,
        heads: tuple[int, int],
        norms: HeadNorms,
        rotary: Angles | None = None,
        *,
        interleaved: bool = False,
        bias: torch.Tensor | None = None,
    ) -> Heads:
        """The same with normalised queries and keys; see `query_key_norm.normalised_query_key_value`."""
        return normalised_query_key_value(
            qkv_SBO, heads, norms, rotary, interleaved=interleaved, bias=bias, selection=self
        )

    def local_max(self, logits: torch.Tensor, num_valid: int) -> torch.Tensor:
        """Largest valid logit of each row of a vocabulary shard; see `cross_entropy.local_max`."""
        return local_max(logits, num_valid, selection=self)

    def local_softmax_sums(
        self, logits: torch.Tensor, target: torch.Tensor, vocab_start: int, num_valid: int, *, overwrite: bool = False
    ) -> Sums:
        """Maximum, sum of exponentials and target logit of a shard; see `cross_entropy.local_softmax_sums`."""
        return local_softmax_sums(logits, target, vocab_start, num_valid, overwrite=overwrite, selection=self)

    def cross_entropy_backward(
        self,
        logits: torch.Tensor,
        target: torch.Tensor,
        max: torch.Tensor,
        sum_exp: torch.Tensor,
        target_logit: torch.Tensor,
        grad_loss: torch.Tensor,
        *,
        vocab_start: int,
        num_valid: int,
        in_place: bool = False,
        overwritten: bool = False,
    ) -> torch.Tensor:
        """Gradient of the loss by a shard's logits; see `cross_entropy.cross_entropy_backward`."""
        rows = (logits, target, max, sum_exp, target_logit, grad_loss)
        shard = {"vocab_start": vocab_start, "num_valid": num_valid}
        return cross_entropy_backward(*rows, **shard, in_place=in_place, overwritten=overwritten, selection=self)
