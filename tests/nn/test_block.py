"""Norms, attention, MLP and whole blocks against the dense formulas in float64, on one rank and cut over several."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from megatron3d_kernels.registry import Registry
from torch import Tensor

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.config.activations import ACTIVATIONS
from megatron3d.config.sections.model import ModelConfig
from megatron3d.nn.attention import SelfAttention
from megatron3d.nn.block import Block
from megatron3d.nn.documents import document_rectangles
from megatron3d.nn.dropout import DropoutStream
from megatron3d.nn.inputs import LayerInputs
from megatron3d.nn.mlp import MLP
from megatron3d.nn.norm import Norm
from megatron3d.nn.positions import rotary_table
from megatron3d.nn.recompute import recomputed
from megatron3d.params.grads import GradSink
from megatron3d.tensor.context import LayerContext
from tests.dist.pool import Pool
from tests.nn import dense
from tests.nn.dense import model_config
from tests.tensor.full import assert_gradients_equal, fill, numbered

S, B = 8, 2
# The rotary table is fp32 (2^-24 of each cosine), which softmax and weights enlarge; all else is fp64 on both sides.
RTOL, ATOL = 1e-6, 1e-6


@dataclass(frozen=True)
class Case:
    """A model, and what its attention gets of the positions."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    masked: bool = False
    positioned: bool = False

    @property
    def config(self) -> ModelConfig:
        return model_config(**self.changes)


ROPE = {"position_embedding_type": "rope"}
LLAMA = {"normalization": "RMSNorm", "activation": "swiglu", "add_bias_linear": False, **ROPE}
CASES = [
    Case("multi-head"),
    Case("grouped", {"num_query_groups": 2}),
    Case("post-norm residual", {"apply_residual_connection_post_layernorm": True}),
    Case("wide heads", {"kv_channels": 6}),
    Case("masked", masked=True),
    Case("llama", {**LLAMA, "num_query_groups": 2}, positioned=True),
    Case("masked llama", LLAMA, masked=True, positioned=True),
    Case("interleaved half rotation", {**ROPE, "rotary_interleaved": True, "rotary_percent": 0.5}),
    Case("rotation with another base", {**ROPE, "rotary_base": 500.0, "rotary_percent": 0.5, "kv_channels": 8}),
    Case("qk norm", {"qk_layernorm": True, "num_query_groups": 2}),
    Case("qk rms norm", {**LLAMA, "qk_layernorm": True, "add_qkv_bias": True}),
    Case("qk norm across heads", {**LLAMA, "qk_layernorm": True, "qk_layernorm_across_heads": True, "kv_channels": 6}),
    Case(
        "qk norm across grouped heads",
        {**LLAMA, "qk_layernorm": True, "qk_layernorm_across_heads": True, "num_query_groups": 2},
    ),
]
MULTI_QUERY = Case("multi-query", {**ROPE, "num_query_groups": 1})


DOCUMENTS_BS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1, 1]])  # cut at different places


def causal_documents() -> Tensor:
    """Causal attention within each document, as a mask."""
    same_BST = DOCUMENTS_BS.unsqueeze(2) == DOCUMENTS_BS.unsqueeze(1)
    return same_BST & torch.ones(S, S, dtype=torch.bool).tril()


def positions() -> Tensor:
    return torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 1]])


def inputs_of(case: Case) -> LayerInputs:
    ids = positions() if case.positioned else None
    is_rope = case.config.position_embedding_type == "rope"
    rotary = rotary_table(case.config, S, ids, device=torch.device("cpu")) if is_rope else None
    return LayerInputs(rotary=rotary, rectangles=document_rectangles(DOCUMENTS_BS) if case.masked else None)


def check_block(case: Case, context: LayerContext) -> None:
    """Output, input gradient and all weight gradients of one block on this rank."""
    config = case.config
    block = Block(config, context, layer=0)
    leaves = {name: whole.clone().requires_grad_() for name, whole in fill(block, context.tp, scale=0.4).items()}
    x, weight_of_loss = numbered(S, B, config.hidden_size, seed=1).requires_grad_(), numbered(S, B, 16, seed=2)
    y = dense.block(
        x,
        leaves,
        config,
        mask_BST=causal_documents() if case.masked else None,
        position_ids_BS=positions() if case.positioned else None,
    )
    (weight_of_loss * y).sum().backward()
    share = S // context.tp.size if context.sequence_parallel else S
    first = share * context.tp.rank if context.sequence_parallel else 0
    own = slice(first, first + share)
    own_x = x.detach()[own].clone().requires_grad_()
    own_y = block(own_x, inputs_of(case))
    torch.testing.assert_close(own_y, y.detach()[own], rtol=RTOL, atol=ATOL)
    (weight_of_loss[own] * own_y).sum().backward()
    torch.testing.assert_close(own_x.grad, x.grad[own], rtol=RTOL, atol=ATOL)
    assert_gradients_equal(block, context.tp, leaves, rtol=RTOL, atol=ATOL)


def one_rank() -> LayerContext:
    return LayerContext(make_mesh(Layout()).tp, False, GradSink())


@pytest.mark.parametrize("case", [*CASES, MULTI_QUERY], ids=lambda case: case.name)
def test_a_block_equals_the_dense_formulas(case: Case) -> None:
    check_block(case, one_rank())


class CopyingKernels(Registry):
    """Makes a copy of the stream beside each norm, as Triton's kernel does."""

    def writes_copies(self, x: Tensor) -> bool:
        """Always."""
        return True


@pytest.mark.parametrize("case", [*CASES, MULTI_QUERY], ids=lambda case: case.name)
def test_a_block_that_adds_to_the_stream_in_its_products_equals_the_dense_formulas(case: Case) -> None:
    check_block(case, replace(one_rank(), kernels=CopyingKernels()))


def test_adding_in_products_leaves_the_input_as_it_is_and_gradients_of_a_recomputed_block_alike() -> None:
    found = []
    for kernels in (Registry(), CopyingKernels()):
        for recomputes in (False, True):
            context = replace(one_rank(), kernels=kernels)
            block, inputs = Block(model_config(), context, layer=0), LayerInputs()
            fill(block, context.tp, scale=0.4)
            x = numbered(S, B, 16, seed=1).requires_grad_()
            y = recomputed(partial(block, inputs=inputs), x, inputs=inputs) if recomputes else block(x, inputs)
            y.square().sum().backward()
            assert torch.equal(x.detach(), numbered(S, B, 16, seed=1))
            found.append([y.detach(), x.grad, *(one.grad for one in block.parameters())])
    for other in found[1:]:
        for one, expected in zip(other, found[0], strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rate", [0.0, 0.2])
@pytest.mark.parametrize("changes", [{}, LLAMA, {"norm_position": "post"}], ids=["gpt", "llama", "post-norm"])
def test_a_block_of_triton_kernels_equals_one_of_references(changes: dict[str, Any], rate: float) -> None:
    """Through the interpreter: sums in products or in norms, masks made again, and all gradients."""
    pytest.importorskip("triton", reason="needs the triton package")
    case, found = Case("fp32", {**changes, "hidden_dropout": rate}), []
    for kernels in ("triton", "reference"):
        block = Block(case.config, replace(one_rank(), kernels=Registry(kernels)), layer=0)
        fill(block, block.context.tp, scale=0.4, dtype=torch.float32)
        x = numbered(S, B, 16, seed=1, dtype=torch.float32).requires_grad_()
        y = block(x, replace(inputs_of(case), dropout=DropoutStream(3, first_sample=0)))
        (y * numbered(S, B, 16, seed=2, dtype=torch.float32)).sum().backward()
        found.append([y.detach(), x.grad, *(one.grad for one in block.parameters())])
    for one, expected in zip(*found, strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=2e-5)


def _check_blocks(rank: int, world_size: int, cases: list[Case]) -> None:
    axis = make_mesh(Layout(tp=world_size)).tp
    for sequence_parallel in (False, True):
        for case in cases:
            check_block(case, LayerContext(axis, sequence_parallel, GradSink()))


def test_a_block_on_two_ranks_equals_the_dense_formulas(pool: Pool) -> None:
    pool.run(2, _check_blocks, CASES)


def test_a_block_on_four_ranks_equals_the_dense_formulas(pool: Pool) -> None:
    pool.run(4, _check_blocks, [case for case in CASES if case.config.num_query_groups == 4])


BOTH_WAYS = {"architecture": "bert"}
FIRST_ONLY = [
    ({**BOTH_WAYS, "norm_position": norm, "hidden_dropout": rate, "attention_dropout": rate}, masked, recompute)
    for norm, rate in (("pre", 0.0), ("post", 0.0), ("pre", 0.2))
    for masked, recompute in ((False, False), (True, False), (True, True))
]


def check_first_only(context: LayerContext, changes: dict[str, Any], masked: bool, recompute: bool) -> None:
    """What a block gives that computes the first position alone, and its gradients, against the whole block's."""
    config = model_config(**changes)
    lengths = torch.tensor([[S], [S - 3]])
    mask_BST = (torch.arange(S) < lengths).unsqueeze(1) if masked else None
    inputs = LayerInputs(attention_mask_BST=mask_BST, dropout=DropoutStream(3, first_sample=0))
    found = []
    for first_only in (False, True):
        block = Block(config, context, layer=0, recompute_core=recompute, first_only=first_only)
        fill(block, context.tp, scale=0.4)
        x = numbered(S, B, config.hidden_size, seed=1).requires_grad_()
        y = block(x, inputs)
        assert y.shape[0] == (1 if first_only else S)
        (numbered(1, B, config.hidden_size, seed=2) * y[:1]).sum().backward()
        found.append([y[:1].detach(), x.grad, *(one.grad for one in block.parameters())])
    for whole, first in zip(*found, strict=True):
        torch.testing.assert_close(first, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("changes", "masked", "recompute"), FIRST_ONLY)
def test_the_first_position_alone_is_that_of_the_whole_block(
    changes: dict[str, Any], masked: bool, recompute: bool
) -> None:
    check_first_only(one_rank(), changes, masked, recompute)


def _check_first_only(rank: int, world_size: int) -> None:
    context = LayerContext(make_mesh(Layout(tp=world_size)).tp, False, GradSink())
    for case in FIRST_ONLY:
        check_first_only(context, *case)


def test_the_first_position_alone_is_that_of_the_whole_block_on_two_ranks(pool: Pool) -> None:
    pool.run(2, _check_first_only)


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_the_mlp_equals_its_formula_with_every_activation(kind: str, bias: bool) -> None:
    config, context = model_config(activation=kind, add_bias_linear=bias), one_rank()
    module = MLP(config, context)
    leaves = {name: whole.clone().requires_grad_() for name, whole in fill(module, context.tp).items()}
    x = numbered(S, B, config.hidden_size, seed=1).requires_grad_()
    y = dense.mlp(x, {f"mlp.{name}": leaf for name, leaf in leaves.items()}, "mlp", config)
    y.square().sum().backward()
    own_x = x.detach().clone().requires_grad_()
    own_y = module(own_x)
    torch.testing.assert_close(own_y, y.detach())
    own_y.square().sum().backward()
    torch.testing.assert_close(own_x.grad, x.grad)
    assert_gradients_equal(module, context.tp, leaves)


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norms_equal_their_formulas_and_keep_the_dtype(kind: str, dtype: torch.dtype) -> None:
    config, context = model_config(normalization=kind, norm_epsilon=1e-3), one_rank()
    module = Norm(config, context, 16, tp_gradient="equal")
    weights = {f"n.{name}": one.double() for name, one in fill(module, context.tp, dtype=dtype).items()}
    x = (numbered(S, B, 16, seed=1) * 3 + 2).to(dtype)
    y = module(x)
    assert y.dtype == dtype and (module.bias is None) == (kind == "RMSNorm")
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    expected = dense.norm(x.double(), weights, "n", config)
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=2 * tolerance)


class Cache:
    """Keys and values side by side along T."""

    def __init__(self) -> None:
        self.kept: tuple[Tensor, Tensor] | None = None

    def extend(self, layer: int, k_BGTD: Tensor, v_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        """Append."""
        if self.kept is not None:
            k_BGTD, v_BGTD = (torch.cat([old, new], 2) for old, new in zip(self.kept, (k_BGTD, v_BGTD)))
        self.kept = (k_BGTD, v_BGTD)
        return self.kept


def test_attention_one_token_at_a_time_with_a_cache_equals_all_at_once() -> None:
    config, context = model_config(num_query_groups=2), one_rank()
    module = SelfAttention(config, context, layer=0)
    fill(module, context.tp)
    x, cache = numbered(S, B, config.hidden_size, seed=1), Cache()
    whole = module(x, LayerInputs())
    prompt = module(x[:4], LayerInputs(cache=cache))
    tokens = [module(x[at : at + 1], LayerInputs(cache=cache)) for at in range(4, S)]
    torch.testing.assert_close(torch.cat([prompt, *tokens]), whole)
