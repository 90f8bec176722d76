"""Stages of a GPT against the dense formulas, and a model cut into stages against the same model in one."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.config.sections.model import ModelConfig
from megatron3d.config.sections.train import TrainConfig
from megatron3d.models.gpt import build_gpt_stage
from megatron3d.models.stage import MicroBatch, Stage, StagePart, unit_of
from megatron3d.nn.dropout import DropoutStream
from megatron3d.params.grads import GradSink
from megatron3d.params.module import declared_parameters, materialize_all
from megatron3d.params.spec import Init, ParamSpec
from megatron3d.tensor.context import LayerContext
from tests.dist.pool import Pool
from tests.models.asking import asking_for_losses
from tests.nn import dense
from tests.nn.dense import model_config
from tests.tensor.full import assert_gradients_equal, fill

S, B, VOCAB, LAYERS = 8, 2, 13, 3
CPU = torch.device("cpu")
LLAMA: dict[str, Any] = {
    "normalization": "RMSNorm",
    "activation": "swiglu",
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "untie_embeddings_and_output_weights": True,
}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2-untied": {"untie_embeddings_and_output_weights": True},
    "llama": LLAMA,
    "llama-tied": {**LLAMA, "untie_embeddings_and_output_weights": False},
    "no positions": {"position_embedding_type": "none"},
}
SPLITS = {1: [range(0, 3)], 2: [range(0, 1), range(1, 3)], 3: [range(0, 1), range(1, 2), range(2, 3)]}
DROPOUT_SEED = 17


def context_of(tp: int = 1, sequence_parallel: bool = False) -> LayerContext:
    return LayerContext(make_mesh(Layout(tp=tp)).tp, sequence_parallel, GradSink())


def stages_of(config: ModelConfig, num_stages: int, context: LayerContext, **train: Any) -> list[Stage]:
    parts = [
        StagePart(layers, number == 0, number == num_stages - 1) for number, layers in enumerate(SPLITS[num_stages])
    ]
    return [
        build_gpt_stage(config, TrainConfig(micro_batch_size=1, global_batch_size=1, **train), part, context)
        for part in parts
    ]


def micro_of(*, dropout: bool = False, labels: bool = True) -> MicroBatch:
    generator = torch.Generator().manual_seed(3)
    tokens, targets = torch.randint(0, VOCAB, (2, B, S), generator=generator)
    mask = torch.rand(B, S, generator=generator).gt(0.3).float()
    stream = DropoutStream(DROPOUT_SEED, first_sample=4) if dropout else None
    return MicroBatch(tokens, targets if labels else None, mask if labels else None, dropout=stream)


def dense_logits(config: ModelConfig, weights: dict[str, Tensor], tokens_BS: Tensor) -> Tensor:
    """Logits [S, B, V] of the whole model by the formulas."""
    x = F.embedding(tokens_BS.t(), weights["embedding.word.weight"])
    if config.position_embedding_type == "learned_absolute":
        x = x + weights["embedding.position.weight"][:S].unsqueeze(1)
    for layer in range(LAYERS):
        x = dense.block(x, weights, config, prefix=f"layers.{layer}.")
    x = dense.norm(x, weights, "head.norm", config)
    untied = config.untie_embeddings_and_output_weights
    return x @ weights["head.output.weight" if untied else "embedding.word.weight"].t()


def dense_loss(config: ModelConfig, weights: dict[str, Tensor], micro: MicroBatch) -> Tensor:
    logits = dense_logits(config, weights, micro.tokens_BS)
    loss_SB = F.cross_entropy(logits.flatten(0, 1), micro.labels_BS.t().flatten(), reduction="none").view(S, B)
    return (loss_SB * micro.loss_mask_BS.t()).sum()


def check_whole_model(model: str, context: LayerContext) -> None:
    """Loss, logits and all gradients of the model as one stage."""
    config, micro = model_config(**MODELS[model]), micro_of()
    (stage,) = stages_of(config, 1, context)
    leaves = {name: whole.clone().requires_grad_() for name, whole in fill(stage, context.tp, scale=0.4).items()}
    expected = dense_loss(config, leaves, micro)
    expected.backward()
    micro, losses = asking_for_losses(stage, micro)
    stage(None, micro).backward()
    torch.testing.assert_close(losses.sums(), expected.detach().reshape(1), rtol=1e-6, atol=1e-6)
    # The rotary table is fp32; what it costs is enlarged by weights of this size.
    assert_gradients_equal(stage, context.tp, leaves, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        logits = stage(None, micro_of(labels=False))
        expected_logits = dense_logits(config, leaves, micro.tokens_BS)
    width = logits.shape[-1]
    first, last = width * context.tp.rank, min(VOCAB, width * (context.tp.rank + 1))
    torch.testing.assert_close(logits[..., : last - first], expected_logits[..., first:last], rtol=1e-5, atol=1e-5)


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
    """Loss and gradients, those of tied copies added to their owner's."""
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


@pytest.mark.parametrize("model", ["gpt2", "llama"])
@pytest.mark.parametrize("num_stages", [2, 3])
def test_a_cut_model_has_the_loss_and_gradients_of_the_whole_one_with_dropout_on(model: str, num_stages: int) -> None:
    config = model_config(**MODELS[model], hidden_dropout=0.2, attention_dropout=0.2)
    whole_loss, whole = run_stages(stages_of(config, 1, context_of()), micro_of(dropout=True))
    loss, grads = run_stages(stages_of(config, num_stages, context_of()), micro_of(dropout=True))
    assert torch.equal(loss, whole_loss)
    assert set(grads) == set(whole)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, whole[name], msg=f"gradient of {name}")


@pytest.mark.parametrize("model", MODELS)
def test_names_are_the_same_at_every_split_and_only_a_tied_table_stands_twice(model: str) -> None:
    config = model_config(**MODELS[model])
    (whole,) = stages_of(config, 1, context_of())
    names = list(whole.parameters_by_name())
    for num_stages in (2, 3):
        cut = Counter(
            name for stage in stages_of(config, num_stages, context_of()) for name in stage.parameters_by_name()
        )
        assert set(cut) == set(names)
        tied = not config.untie_embeddings_and_output_weights
        assert [name for name, count in cut.items() if count > 1] == (["embedding.word.weight"] if tied else [])


def test_the_owner_of_a_tied_table_is_the_first_stage_and_the_copy_starts_equal() -> None:
    first, _, last = stages_of(model_config(), 3, context_of())
    for stage, is_copy in ((first, False), (last, True)):
        assert stage.parameters_by_name()["embedding.word.weight"].spec.tied_copy is is_copy
        materialize_all(stage, seed=5, tp=1, tp_rank=0, device=CPU)
    assert torch.equal(first.embedding.word.weight, last.embedding.word.weight)


def test_units_hold_every_parameter_once_by_block() -> None:
    (stage,) = stages_of(model_config(untie_embeddings_and_output_weights=True), 1, context_of())
    units = stage.units()
    assert list(units) == ["embedding.word", "embedding", "layers.0", "layers.1", "layers.2", "head", "head.output"]
    assert [name for members in units.values() for name in members] == list(stage.parameters_by_name())
    assert units["head"] == ["head.norm.weight", "head.norm.bias"] and units["head.output"] == ["head.output.weight"]
    assert stage.places()["head"].forward == ("head", "head.output")
    assert all(name.startswith("layers.1.") for name in units["layers.1"])
    weight = ParamSpec("layers.12.mlp.up.weight", (2, 2), Init("zeros"), decays=True)
    assert (unit_of(weight), unit_of(replace(weight, trains=False))) == ("layers.12", "layers.12.frozen")
    assert unit_of(replace(weight, kind="expert", trains=False)) == "layers.12.expert.frozen"
    assert (stage.tied_unit, stages_of(model_config(), 1, context_of())[0].tied_unit) == (None, "embedding.word")


def test_parameters_of_another_kind_are_a_unit_of_their_own_and_come_and_go_with_their_block() -> None:
    (stage,) = stages_of(model_config(), 1, context_of())
    stage.layers["1"].mlp.up.declare("scale", (3,), init=Init("ones"), decays=False, kind="expert")
    units, places = stage.units(), stage.places()
    assert units["layers.1.expert"] == ["layers.1.mlp.up.scale"] and "layers.1.mlp.up.scale" not in units["layers.1"]
    assert places["layers.1"].forward == places["layers.1"].backward == ("layers.1", "layers.1.expert")
    assert places["layers.0"].forward == ("layers.0",) and list(places)[:3] == ["embedding", "layers.0", "layers.1"]


@pytest.mark.parametrize("num_stages", [1, 2])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("recompute", [{}, {"recompute_granularity": "full"}, {"recompute_granularity": "selective"}])
def test_each_backward_brings_as_many_contributions_as_the_stage_says(
    num_stages: int, model: str, recompute: dict[str, str]
) -> None:
    context = context_of()
    stages = stages_of(model_config(**MODELS[model]), num_stages, context, **recompute)
    arrivals: Counter[tuple[int, str]] = Counter()
    expected: Counter[tuple[int, str]] = Counter()
    for number, stage in enumerate(stages):
        materialize_all(stage, seed=5, tp=1, tp_rank=0, device=CPU)
        for name, one in declared_parameters(stage).items():
            key = (number, name)
            context.sink.bind(
                one.parameter, torch.zeros(one.spec.local_shape(1)), lambda key=key: arrivals.update([key])
            )
            expected[key] = stage.uses_of(name)
    micro, _ = asking_for_losses(stages[-1], micro_of())
    x = None
    for stage in stages:
        x = stage(x, micro)
    x.backward()
    assert arrivals == expected


def test_a_masked_token_changes_neither_loss_nor_gradient() -> None:
    config, micro = model_config(), micro_of()
    labels = torch.where(micro.loss_mask_BS > 0, micro.labels_BS, (micro.labels_BS + 1) % VOCAB)
    changed = MicroBatch(micro.tokens_BS, labels, micro.loss_mask_BS)
    first, second = (run_stages(stages_of(config, 1, context_of()), one) for one in (micro, changed))
    assert not torch.equal(labels, micro.labels_BS) and torch.equal(first[0], second[0])
    assert all(torch.equal(grad, second[1][name]) for name, grad in first[1].items())


def test_without_a_mask_every_token_counts() -> None:
    config, micro = model_config(), micro_of()
    unmasked = MicroBatch(micro.tokens_BS, micro.labels_BS)
    ones = MicroBatch(micro.tokens_BS, micro.labels_BS, torch.ones(B, S))
    first, second = (run_stages(stages_of(config, 1, context_of()), one) for one in (unmasked, ones))
    torch.testing.assert_close(first[0], second[0])


def test_a_later_stage_without_its_hidden_tensor_says_so() -> None:
    last = stages_of(model_config(), 2, context_of())[1]
    with pytest.raises(AssertionError, match="only the first stage runs without a hidden tensor"):
        last(None, micro_of())


def test_padding_of_the_vocabulary_changes_neither_loss_nor_gradients() -> None:
    narrow, wide = (
        run_stages(stages_of(model_config(make_vocab_size_divisible_by=multiple), 1, context_of()), micro_of())
        for multiple in (1, 64)
    )
    torch.testing.assert_close(narrow[0], wide[0], rtol=1e-6, atol=0)
    padding = wide[1]["embedding.word.weight"][VOCAB:]
    assert padding.shape == (64 - VOCAB, 16) and torch.count_nonzero(padding) == 0
    torch.testing.assert_close(wide[1]["embedding.word.weight"][:VOCAB], narrow[1]["embedding.word.weight"])


def test_hidden_tensors_between_stages_have_the_shape_of_the_wire(pool: Pool) -> None:
    assert pool.run(2, _hidden_shape) == [(S // 2, B, 16)] * 2


def _hidden_shape(rank: int, world_size: int) -> tuple[int, ...]:
    context = context_of(world_size, sequence_parallel=True)
    first = stages_of(model_config(), 2, context)[0]
    fill(first, context.tp, dtype=torch.float32)
    return tuple(first(None, micro_of()).shape)
