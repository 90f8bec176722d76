"""Frozen parameters: every layout trains what plain torch trains with `requires_grad` False, and nothing else."""

from __future__ import annotations

import math
from itertools import groupby
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.data.loader import GlobalBatches
from megatron3d.errors import ConfigError
from megatron3d.optim.build import step_count
from megatron3d.optim.schedule import settings_from_config
from megatron3d.params.freeze import freeze
from megatron3d.params.grads import GradSink
from megatron3d.params.module import materialize_all
from megatron3d.params.spec import Init
from megatron3d.tensor.context import LayerContext
from megatron3d.tensor.linear import ColumnParallelLinear
from megatron3d.train import state
from megatron3d.train.reports import frozen_parameters
from megatron3d.train.setup import TrainingSetup
from megatron3d.train.state import Progress
from tests.dist.pool import Pool
from tests.parity.compare import LOSS_TOLERANCE, NORM_TOLERANCE, check_against_one_process, relative
from tests.parity.runs import FROZEN, RATES, Case, brief, data_of, parts_of, trace, trace_cases
from tests.parity.test_transformers import gpt2_tensors

transformers = pytest.importorskip("transformers")

SP = "--sequence-parallel"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
AWAY_STATES = "--offload-optimizer cpu"
AWAY = f"{AWAY_STATES} --offload-params cpu"
CASES = [
    Case("gpt2-mixed", Layout(tp=2), SP),
    brief(Case("gpt2-begun", Layout(tp=2), "")),
    Case("gpt2-begun", Layout(pp=2), ""),  # nothing trains on the first stage
    brief(Case("gpt2-mixed", Layout(pp=2), "--pipeline-schedule zb-h1")),
    brief(Case("gpt2-begun", Layout(dp=2), "--zero-stage 1")),
    brief(Case("gpt2-mixed", Layout(dp=2), "--zero-stage 2")),
    brief(Case("gpt2-begun", Layout(dp=2), f"--zero-stage 3 {FULL}")),
    Case("gpt2-mixed", Layout(dp=2), f"--zero-stage 3 {AWAY}"),
    brief(Case("gpt2-begun", Layout(pp=2, dp=2), "--zero-stage 3 --pipeline-schedule zb-v")),
    brief(Case("gpt2-mixed", Layout(tp=2, dp=2), f"{SP} --zero-stage 3 {FULL}")),
]
BATCHES = [
    pytest.param(size, list(group), id=f"world{size}")
    for size, group in groupby(CASES, key=lambda case: case.layout.world_size)
]
# The same by hand, so that nothing depends on how patterns match.
FROZEN_IN_BLOCK = ("attention.", "mlp.up.weight", "mlp_norm.bias")


def is_frozen(model: str, name: str) -> bool:
    """Whether a parameter of one of the two models is frozen."""
    if model == "gpt2-begun":
        return name.startswith(("embedding.", "layers.0.", "layers.1."))
    return name == "embedding.position.weight" or name.split(".", 2)[-1].startswith(FROZEN_IN_BLOCK)


def in_plain_torch(model: str, initial: dict[str, Tensor], num_steps: int) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of Hugging Face's GPT-2 from the same weights, on the same data, by torch's AdamW."""
    config = parts_of(Case(model, Layout()), make_mesh(Layout())).config
    shape = {"vocab_size": config.model.vocab_size, "n_positions": 16, "n_embd": 32, "n_layer": 4, "n_head": 4}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    activation = {"gelu": "gelu", "gelu_tanh": "gelu_new"}[config.model.activation]
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            **shape, **no_dropout, activation_function=activation, layer_norm_epsilon=config.model.norm_epsilon
        )
    )
    parameters = gpt2_tensors(dict(theirs.named_parameters()), layers=4)
    for name, tensor in parameters.items():
        tensor.data.copy_(initial[name])
    ids = {tensor.data_ptr(): name for name, tensor in parameters.items()}
    trained = []
    for parameter in theirs.parameters():
        parameter.requires_grad_(not is_frozen(model, ids[parameter.data_ptr()]))
        trained += [parameter] if parameter.requires_grad else []
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": RATES.weight_decay},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    optim = config.optim
    optimizer = torch.optim.AdamW(groups, lr=RATES.lr, betas=(optim.adam_beta1, optim.adam_beta2), eps=optim.adam_eps)
    data, losses, norms = data_of(config), [], []
    with GlobalBatches(data.reader(data.train), num_workers=0) as batches:
        for step in range(num_steps):
            inputs = batches.read(step * 8, 8, 0, 1).model_inputs()
            logits = theirs(inputs["tokens_BS"]).logits
            each = F.cross_entropy(logits.flatten(0, 1), inputs["labels_BS"].flatten(), reduction="none")
            mask = inputs["loss_mask_BS"].flatten()
            loss = (each * mask).sum() / mask.sum()
            optimizer.zero_grad()
            loss.backward()
            losses.append(loss.item())
            norms.append(torch.nn.utils.clip_grad_norm_(trained, optim.clip_grad).item())
            optimizer.step()
    return losses, norms


@pytest.mark.parametrize("model", FROZEN)
def test_one_process_trains_what_plain_torch_trains_without_gradients_of_frozen_parameters(model: str) -> None:
    parts = parts_of(Case(model, Layout()), make_mesh(Layout()))
    initial = weights_of(parts)
    losses, norms = in_plain_torch(model, initial, 20)
    ours = trace(parts)
    assert relative(ours.losses, losses) < LOSS_TOLERANCE
    assert relative(ours.norms, norms) < NORM_TOLERANCE
    after = weights_of(parts)
    unchanged = {name for name in initial if torch.equal(initial[name], after[name])}
    assert unchanged == {name for name in initial if is_frozen(model, name)} != set()
    assert set(ours.gradients) == set(initial) - unchanged
    declared = parts.model.stages[0].parameters_by_name().values()
    assert all(one.parameter.grad is None for one in declared), "a gradient that nobody asked for"


@pytest.mark.parametrize("frozen", [["weight"], ["bias"], ["weight", "bias"]])
def test_a_linear_layer_keeps_its_input_only_for_the_product_of_a_weight_that_trains(frozen: list[str]) -> None:
    context = LayerContext(make_mesh(Layout()).tp, False, GradSink())
    layer = ColumnParallelLinear(context, 5, 7, bias=True, init=Init("normal", 0.5))
    freeze(layer, frozen)
    materialize_all(layer, seed=1, tp=1, tp_rank=0, device=torch.device("cpu"))
    x, grad = torch.randn(3, 2, 5, requires_grad=True), torch.randn(3, 2, 7)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = layer(x)
    y.backward(grad)
    assert len(saved) == ("weight" not in frozen)
    plain = torch.nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.equal(plain, y)
    assert torch.allclose(x.grad, grad @ layer.weight)
    expected = {"weight": grad.flatten(0, 1).t() @ x.flatten(0, 1), "bias": grad.sum((0, 1))}
    for name, parameter in layer.named_parameters():
        assert (parameter.grad is None) == (name in frozen)
        assert name in frozen or torch.allclose(parameter.grad, expected[name])


def weights_of(parts: TrainingSetup) -> dict[str, Tensor]:
    """A copy of all weights of a run in one process."""
    return {name: view.data.view(view.full_shape).clone() for name, view in parts.engine.weight_views().items()}


@pytest.mark.parity
@pytest.mark.parametrize(("world_size", "batch"), BATCHES)
def test_frozen_parameters_give_the_training_of_one_process_at_every_layout(
    pool: Pool, parity_table: list[str], world_size: int, batch: list[Case]
) -> None:
    by_rank = pool.run(world_size, trace_cases, batch, timeout_s=240)
    for number, case in enumerate(batch):
        check_against_one_process(case, [traces_of_rank[number] for traces_of_rank in by_rank], parity_table)


# From one run to the next: trained, frozen at several layouts, trained again.
MOVES = [
    Case("gpt2", Layout(dp=2), "--zero-stage 1"),
    Case("gpt2-begun", Layout(tp=2), ""),
    Case("gpt2-begun", Layout(pp=2), ""),
    Case("gpt2-begun", Layout(dp=2), "--zero-stage 1"),
    Case("gpt2-begun", Layout(dp=2), f"--zero-stage 3 {AWAY}"),
    Case("gpt2", Layout(dp=2), f"--zero-stage 2 {AWAY_STATES}"),
]
STEPS_EACH = 2


def chain(moves: list[Case], directory: str) -> list[tuple[list[float], int, tuple[str, ...], dict[str, float]]]:
    """Losses of each run, its count of updates where it began, what it said, and the largest first moments then."""
    found = []
    for number, case in enumerate(moves):
        paths = f"--save {directory}/{number}" + (f" --load {directory}/{number - 1}" if number else "")
        parts = parts_of(Case(case.model, case.layout, f"{case.options} {paths}"), make_mesh(case.layout))
        lines = state.restore(parts).lines
        with parts.engine.states_opened(parts.optimizer, writes=False):
            views = parts.engine.state_views(parts.optimizer, "exp_avg")
            moments = {name: float(view.data.abs().max()) for name, view in views.items()}
        count = step_count(parts.optimizer)
        step = STEPS_EACH * number
        losses = trace(parts, num_steps=STEPS_EACH, first_step=step).losses
        state.save(parts, Progress(step + STEPS_EACH), settings_from_config(parts.config.optim, parts.config.train))
        found.append((losses, count, lines, moments))
    return found


def chain_on_rank(rank: int, world_size: int, directory: str) -> list:
    """Body of a worker."""
    return chain(MOVES, directory)


def test_a_run_goes_from_trained_to_frozen_and_back_at_other_layouts(pool: Pool, tmp_path: Path) -> None:
    first, second = pool.run(2, chain_on_rank, str(tmp_path / "two"), timeout_s=240)
    alone = chain([Case(move.model, Layout()) for move in MOVES], str(tmp_path / "one"))
    for (losses, *_), (expected, *_) in zip(first, alone, strict=True):
        assert relative(losses, expected) < LOSS_TOLERANCE
    assert [max(one[1], other[1]) for one, other in zip(first, second)] == [0, 2, 4, 6, 8, 10]
    assert [one[1] for one in alone] == [0, 2, 4, 6, 8, 10]
    _, frozen, *same, thawed = ("\n".join(one[2]) for one in first)
    names = set(alone[0][3])
    number = sum(is_frozen("gpt2-begun", name) for name in names)
    assert f"{number} parameters that trained in the checkpoint are frozen now" in frozen
    assert f"{number} parameters that were frozen in the checkpoint train now" in thawed
    assert not any("frozen" in one for one in same)
    moments = alone[-1][3]
    assert {name for name in names if moments[name] == 0.0} == {n for n in names if is_frozen("gpt2-begun", n)}


def test_a_pattern_that_matches_nothing_is_an_error_at_the_start() -> None:
    with pytest.raises(ConfigError) as caught:
        parts_of(Case("gpt2", Layout(), "--freeze-params layers.0.* layers.4.* encoder"), make_mesh(Layout()))
    assert "--freeze-params layers.4.* matches no parameter" in str(caught.value)
    assert "--freeze-params encoder matches no parameter" in str(caught.value)
    assert "embedding.word.weight" in str(caught.value)


def test_a_run_in_which_nothing_trains_is_an_error_at_the_start() -> None:
    with pytest.raises(ConfigError, match="nothing trains"):
        parts_of(Case("gpt2", Layout(), "--freeze-params embedding.* layers.* head.*"), make_mesh(Layout()))


def test_frozen_weights_are_all_that_is_held_of_frozen_parameters() -> None:
    trained, frozen = (
        parts_of(Case(model, Layout(), "--bf16"), make_mesh(Layout())) for model in ("gpt2", "gpt2-begun")
    )
    elements = sum(
        unit.layout.length for name, unit in frozen.engine.units.items() if name not in frozen.engine.trained
    )
    before, after = trained.engine.state_bytes(), frozen.engine.state_bytes()
    assert frozen_parameters(trained) is None
    count = sum(
        view.data.numel() for name, view in frozen.engine.weight_views().items() if is_frozen("gpt2-begun", name)
    )
    assert f"{count / 1000:.1f}K parameters are frozen (--freeze-params embedding.*" in str(frozen_parameters(frozen))
    assert elements > 0 and math.isclose(before.weights, after.weights, rel_tol=0.02)  # but for padding
    assert after.gradients == 4 * sum(unit.layout.length for unit in frozen.engine.trained.values())
    assert before.gradients - after.gradients == 4 * elements
    assert before.master_weights - after.master_weights == 4 * elements
