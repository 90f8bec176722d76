"""Stages of a BERT against the dense formulas in fp64, at one and two tensor ranks, and cut against whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.config.derive import resolve_model
from megatron3d.config.sections.model import ModelConfig
from megatron3d.config.sections.train import TrainConfig
from megatron3d.data.batch import BertBatch
from megatron3d.models import bert
from megatron3d.models.bert import build_bert_stage
from megatron3d.models.losses import masked_loss_sum
from megatron3d.models.stage import MicroBatch, Stage, StagePart
from megatron3d.nn.dropout import DropoutStream
from megatron3d.params.grads import GradSink
from megatron3d.params.module import materialize_all
from megatron3d.tensor.context import LayerContext
from tests.dist.pool import Pool
from tests.models.asking import asking_for_losses
from tests.nn import dense
from tests.nn.dense import model_config
from tests.tensor.full import assert_gradients_equal, fill

S, B, VOCAB, LAYERS = 8, 3, 13, 3
CPU = torch.device("cpu")
MODELS: dict[str, dict[str, Any]] = {
    "pre": {},
    "post": {"norm_position": "post", "norm_epsilon": 1e-12},
    "masked only": {"bert_binary_head": False},
    "untied": {"untie_embeddings_and_output_weights": True},
    "rope and a gate": {"position_embedding_type": "rope", "activation": "swiglu", "normalization": "RMSNorm"},
}
SPLITS = {1: [range(0, 3)], 2: [range(0, 1), range(1, 3)], 3: [range(0, 1), range(1, 2), range(2, 3)]}


def bert_config(model: str) -> ModelConfig:
    return resolve_model(model_config(**{"architecture": "bert", "activation": "gelu", **MODELS[model]}))


def context_of(tp: int = 1, sequence_parallel: bool = False) -> LayerContext:
    return LayerContext(make_mesh(Layout(tp=tp)).tp, sequence_parallel, GradSink())


def stages_of(config: ModelConfig, num_stages: int, context: LayerContext) -> list[Stage]:
    parts = [
        StagePart(layers, number == 0, number == num_stages - 1) for number, layers in enumerate(SPLITS[num_stages])
    ]
    return [
        build_bert_stage(config, TrainConfig(micro_batch_size=1, global_batch_size=1), part, context) for part in parts
    ]


def micro_of(**changes: Any) -> MicroBatch:
    """Three samples, two of them padded; half of the real tokens are to be predicted."""
    generator = torch.Generator().manual_seed(3)
    tokens, labels = torch.randint(0, VOCAB, (2, B, S), generator=generator)
    pairs = torch.tensor([0, 1, 1])
    real = torch.arange(S) < torch.tensor([[8], [6], [3]])
    masked = (torch.rand(B, S, generator=generator) < 0.5) & real
    types = ((torch.arange(S) > 2) & real).long()
    batch = BertBatch(tokens, labels, changes.get("loss_mask_BS", masked.float()), types, real, pairs)
    return MicroBatch(**batch.model_inputs() | {"label_index_P": batch.label_index()} | changes)


def dense_outputs(config: ModelConfig, weights: dict[str, Tensor], micro: MicroBatch) -> tuple[Tensor, Tensor | None]:
    """Logits of all tokens [S, B, V] and of the pairs [B, 2] by the formulas."""
    x = F.embedding(micro.tokens_BS.t(), weights["embedding.word.weight"])
    if config.position_embedding_type == "learned_absolute":
        x = x + weights["embedding.position.weight"][:S].unsqueeze(1)
    if config.num_token_types:
        x = x + F.embedding(micro.token_types_BS.t(), weights["embedding.token_type.weight"])
    mask_BST = micro.attention_mask_BST.expand(B, S, S)
    if config.norm_position == "post":
        x = dense.norm(x, weights, "embedding.norm", config)
    for layer in range(LAYERS):
        name = f"layers.{layer}"
        if config.norm_position == "pre":
            x = dense.block(x, weights, config, mask_BST=mask_BST, prefix=f"{name}.")
            continue
        y = dense.attention(x, weights, f"{name}.attention", config, mask_BST=mask_BST)
        x = dense.norm(x + y, weights, f"{name}.attention_norm", config)
        y = dense.mlp(x, weights, f"{name}.mlp", config)
        x = dense.norm(x + y, weights, f"{name}.mlp_norm", config)
    if config.norm_position == "pre":
        x = dense.norm(x, weights, "head.norm", config)
    y = dense.activation(dense.affine(x, weights, "head.transform"), "gelu")
    table = weights["head.output.weight" if config.untie_embeddings_and_output_weights else "embedding.word.weight"]
    logits = dense.norm(y, weights, "head.transform_norm", config) @ table.t() + weights["head.output_bias"]
    if not config.has_binary_head:
        return logits, None
    pooled = torch.tanh(dense.affine(x[0], weights, "head.pooler"))
    return logits, dense.affine(pooled, weights, "head.binary")


def dense_sums(config: ModelConfig, weights: dict[str, Tensor], micro: MicroBatch) -> Tensor:
    """Both summed losses, or the first alone without the binary head; then as many hits."""
    logits_SBV, pairs_BC = dense_outputs(config, weights, micro)
    masked = micro.loss_mask_BS.t() > 0
    chosen, labels = logits_SBV[masked], micro.labels_BS.t()[masked]
    losses = [F.cross_entropy(chosen, labels, reduction="sum")]
    hits = [(chosen.argmax(-1) == labels).sum()]
    if pairs_BC is not None:
        losses.append(F.cross_entropy(pairs_BC, micro.sentence_labels_B, reduction="sum"))
        hits.append((pairs_BC.argmax(-1) == micro.sentence_labels_B).sum())
    return torch.stack(losses + hits)


def check_whole_model(model: str, context: LayerContext) -> None:
    """Losses, hits, logits and all gradients of the model as one stage; the two losses weigh differently."""
    config, micro = bert_config(model), micro_of()
    (stage,) = stages_of(config, 1, context)
    leaves = {name: whole.clone().requires_grad_() for name, whole in fill(stage, context.tp, scale=0.4).items()}
    expected = dense_sums(config, leaves, micro)
    weights = {"lm": 1 / 7, "sentence": 1 / 3} if config.has_binary_head else {"lm": 1 / 7}
    (expected[: len(weights)] * torch.tensor([*weights.values()])).sum().backward()
    micro, losses = asking_for_losses(stage, micro, gradients=weights, counts_hits=True)
    stage(None, micro).backward()
    # Sums are fp32, as the kernels' and the classes' losses are.
    found = torch.cat([losses.sums(), losses.hits()])
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)
    assert_gradients_equal(stage, context.tp, leaves, rtol=2e-5, atol=2e-6)
    with torch.no_grad():
        logits = stage(None, micro_of(labels_BS=None))
        whole = dense_outputs(config, leaves, micro)[0]
    width = logits.shape[-1]
    first, last = width * context.tp.rank, min(VOCAB, width * (context.tp.rank + 1))
    torch.testing.assert_close(logits[..., : last - first], whole[..., first:last], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_one_stage_equals_the_dense_formulas(model: str) -> None:
    check_whole_model(model, context_of())


def _check_models(rank: int, world_size: int) -> None:
    axis = make_mesh(Layout(tp=world_size)).tp
    for sequence_parallel in (False, True):
        for model in MODELS:
            check_whole_model(model, LayerContext(axis, sequence_parallel, GradSink()))


def test_one_stage_on_two_tensor_ranks_equals_the_dense_formulas(pool: Pool) -> None:
    pool.run(2, _check_models)


def run_stages(stages: list[Stage], micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses and the gradients of their sum, those of tied copies added to their owner's."""
    for stage in stages:
        materialize_all(stage, seed=5, tp=1, tp_rank=0, device=CPU)
    micro, losses = asking_for_losses(stages[-1], micro)
    x = None
    for stage in stages:
        x = stage(x, micro)
    x.backward()
    grads: dict[str, Tensor] = {}
    for stage in stages:
        for name, one in stage.parameters_by_name().items():
            grads[name] = one.parameter.grad if name not in grads else grads[name] + one.parameter.grad
    return losses.sums(), grads


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("num_stages", [2, 3])
def test_a_cut_model_has_the_losses_and_gradients_of_the_whole_one_with_dropout_on(model: str, num_stages: int) -> None:
    config = resolve_model(
        model_config(**{"architecture": "bert", **MODELS[model], "hidden_dropout": 0.2, "attention_dropout": 0.2})
    )
    micro = micro_of(dropout=DropoutStream(17, 4))
    whole_losses, whole = run_stages(stages_of(config, 1, context_of()), micro)
    losses, grads = run_stages(stages_of(config, num_stages, context_of()), micro)
    assert torch.equal(losses, whole_losses)
    assert not torch.equal(losses, run_stages(stages_of(config, 1, context_of()), micro_of())[0])
    assert set(grads) == set(whole)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, whole[name], msg=f"gradient of {name}")


@pytest.mark.parametrize("model", ["pre", "post"])
def test_what_stands_on_padding_changes_neither_losses_nor_gradients(model: str) -> None:
    micro = micro_of()
    real = micro.attention_mask_BST.squeeze(1)
    other = micro_of(tokens_BS=torch.where(real, micro.tokens_BS, (micro.tokens_BS + 1) % VOCAB))
    first, second = (run_stages(stages_of(bert_config(model), 1, context_of()), one) for one in (micro, other))
    assert not torch.equal(micro.tokens_BS, other.tokens_BS)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(grad, second[1][name]) for name, grad in first[1].items())


def test_an_earlier_token_sees_a_later_one_with_and_without_a_mask() -> None:
    stage = stages_of(bert_config("pre"), 1, context_of())[0]
    materialize_all(stage, seed=5, tp=1, tp_rank=0, device=CPU)
    whole = torch.ones(B, 1, S, dtype=torch.bool)
    tokens = micro_of().tokens_BS
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % VOCAB
    outputs = [
        stage(None, micro_of(labels_BS=None, tokens_BS=one, attention_mask_BST=mask))
        for one in (tokens, changed)
        for mask in (whole, None)
    ]
    torch.testing.assert_close(outputs[0], outputs[1])
    assert (outputs[0] - outputs[2])[0].abs().max() > 1e-6


def test_a_micro_batch_without_masked_tokens_has_no_token_loss_and_gradients_of_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, rows = bert_config("masked only"), []

    def spy(logits_PV: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows.append(len(logits_PV))
        return masked_loss_sum(logits_PV, *args, **kwargs)

    monkeypatch.setattr(bert, "masked_loss_sum", spy)
    losses, grads = run_stages(stages_of(config, 1, context_of()), micro_of(loss_mask_BS=torch.zeros(B, S)))
    assert losses.tolist() == [0.0]
    assert all(not grad.any() for grad in grads.values())
    assert rows == [1], "a kernel on a GPU cannot be started for no rows"


def test_segments_left_out_are_all_of_type_zero() -> None:
    zeros = torch.zeros(B, S, dtype=torch.int64)
    config = bert_config("pre")
    first, second = (
        run_stages(stages_of(config, 1, context_of()), micro_of(token_types_BS=types))[0] for types in (None, zeros)
    )
    assert torch.equal(first, second)


def test_names_are_those_the_documentation_lists() -> None:
    ends = {
        "pre": {"head.norm.weight", "head.norm.bias"},
        "post": {"embedding.norm.weight", "embedding.norm.bias"},
    }
    always = {"embedding.word.weight", "embedding.position.weight", "embedding.token_type.weight", "head.output_bias"}
    linears = ("head.transform", "head.transform_norm", "head.pooler", "head.binary")
    always |= {f"{name}.{part}" for name in linears for part in ("weight", "bias")}
    for model, more in ends.items():
        (stage,) = stages_of(bert_config(model), 1, context_of())
        names = {name for name in stage.parameters_by_name() if not name.startswith("layers.")}
        assert names == always | more


def test_a_pair_without_its_label_says_what_is_missing() -> None:
    (stage,) = stages_of(bert_config("pre"), 1, context_of())
    materialize_all(stage, seed=5, tp=1, tp_rank=0, device=CPU)
    with pytest.raises(AssertionError, match="a label for every pair"):
        stage(None, asking_for_losses(stage, micro_of(sentence_labels_B=None))[0])
