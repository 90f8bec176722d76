"""Declared state: updated, saved and resharded alike at every layout, and counted once for each micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import Mesh, make_mesh
from megatron3d.config.sections.model import ModelConfig
from megatron3d.config.sections.train import TrainConfig
from megatron3d.data.loader import GlobalBatches
from megatron3d.errors import NumericsError
from megatron3d.models.gpt import build_gpt_stage
from megatron3d.models.stage import Stage, StagePart
from megatron3d.nn.inputs import LayerInputs
from megatron3d.optim.schedule import settings_from_config
from megatron3d.params.boxes import Box, ShardView
from megatron3d.params.module import ParallelModule
from megatron3d.params.spec import Init
from megatron3d.planner.memory import RankModel, declared_state_bytes
from megatron3d.tasks.glue.average import AVERAGE, WeightAverage, declare_averages
from megatron3d.tensor.context import LayerContext
from megatron3d.train import state
from megatron3d.train.evaluate import evaluate
from megatron3d.train.setup import TrainingSetup, build_parts
from megatron3d.train.state import Progress
from megatron3d.train.step import train_step
from tests.dist.pool import Pool
from tests.parity.compare import GRADIENT_TOLERANCE, LOSS_TOLERANCE, NORM_TOLERANCE, relative
from tests.parity.runs import RATES, Case, Trace, assemble, config_of, data_of

SP = "--sequence-parallel"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
AWAY = "--offload-optimizer cpu --offload-params cpu"
FIRST, SECOND = 4, 4  # steps before and after a checkpoint
DECAY = 0.9
# What a run leaves in a checkpoint: (of the first steps, of all).
CASES = [
    (Case("gpt2", Layout(tp=2), SP), Case("gpt2", Layout(dp=2), "--zero-stage 3")),
    (Case("gpt2", Layout(pp=2), FULL), Case("gpt2", Layout(tp=2), "")),
    (Case("gpt2", Layout(dp=2), f"--zero-stage 3 {AWAY}"), Case("gpt2", Layout(pp=2), "--pipeline-schedule zb-v")),
    (Case("gpt2", Layout(dp=2), "--zero-stage 1"), Case("gpt2", Layout(dp=2), "--zero-stage 2")),
    (
        Case("gpt2", Layout(tp=2, dp=2), f"{SP} --zero-stage 2"),
        Case("gpt2", Layout(pp=2, dp=2), f"--zero-stage 1 {FULL}"),
    ),
]
BATCHES = [
    pytest.param(size, list(group), id=f"world{size}")
    for size, group in groupby(CASES, key=lambda pair: pair[0].layout.world_size)
]


class Damped(ParallelModule):
    """A module whose output is divided by 1 + the running mean of its squared inputs, by feature: state that counts.

    Added to that is the largest input ever seen; `steps` and `count` are the updates and the tokens of all steps, and
    `sharded` lies in parts on the tensor-parallel ranks.
    """

    def __init__(self, inner: nn.Module, hidden: int, context: LayerContext) -> None:
        super().__init__(tp=context.tp.size)
        self.inner = inner
        is_partial = context.sequence_parallel  # each rank has tokens of its own
        self.declare_state("mean", (hidden,), torch.float32, init=Init("ones"))
        self.declare_state("largest", (hidden,), torch.float32)
        self.declare_state("steps", (1,), torch.int64)
        self.declare_state("count", (1,), torch.float64)
        self.declare_state("sharded", (hidden, 3), torch.bfloat16, init=Init("normal", 1.0), tp_dim=0)
        self.declare_total("squares", (hidden,), is_partial=is_partial)
        self.declare_total("tokens", (1,), is_partial=is_partial)
        self.declare_total("most", (hidden,), reduction="max", is_partial=is_partial)

    def forward(self, x_SBH: Tensor, inputs: LayerInputs) -> Tensor:
        """[S, B, H] to [S, B, H]."""
        seen_TH = x_SBH.detach().flatten(0, 1).double()
        x_SBH = self.contribute(x_SBH, "squares", seen_TH.square().sum(0))
        x_SBH = self.contribute(x_SBH, "tokens", torch.tensor([float(len(seen_TH))]))
        x_SBH = self.contribute(x_SBH, "most", seen_TH.abs().amax(0))
        return self.inner(x_SBH, inputs) / (1 + self.mean + self.largest)

    def update_state(self) -> None:
        """A step of the running mean, and of the largest."""
        self.mean.lerp_((self.squares / self.tokens).float(), 0.5)
        torch.maximum(self.largest, self.most.float(), out=self.largest)
        self.steps += 1
        self.count += self.tokens
        self.sharded *= -0.5


def build_damped_stage(config: ModelConfig, train: TrainConfig, part: StagePart, context: LayerContext) -> Stage:
    """A GPT with a damped MLP in each block, and averages beside its weights: two passes over a declared model."""
    stage = build_gpt_stage(config, train, part, context)
    for block in stage.layers.values():
        block.mlp = Damped(block.mlp, config.hidden_size, context)
    declare_averages(stage)
    return stage


def damped_parts(case: Case, mesh: Mesh) -> TrainingSetup:
    """The parts of a case with the model above."""
    return build_parts(config_of(case), mesh, torch.device("cpu"), build_damped_stage)


def train_on(
    parts: TrainingSetup, average: WeightAverage, *, first_step: int, num_steps: int, formula: Formula | None = None
) -> tuple[list[float], list[float]]:
    """Losses and norms of some steps; between two of them an evaluation, which must count nothing."""
    data, readers, size = data_of(parts.config), parts.mesh.batch, 8
    losses, norms = [], []
    with GlobalBatches(data.reader(data.train), num_workers=0) as batches:
        for step in range(first_step, first_step + num_steps):
            result = train_step(parts, batches.read(step * size, size, readers.rank, readers.size), RATES, step=step)
            average.add()
            if formula is not None:
                formula.follow()
            losses.append(result.loss)
            norms.append(result.grad_norm)
            if step == first_step:
                evaluate(parts, batches, num_batches=1)
    return losses, norms


def stored(parts: TrainingSetup) -> dict[str, list[tuple[Box, Tensor]]]:
    """What a checkpoint would hold of this rank: weights, state of modules, averages."""
    with parts.engine.states_opened(parts.optimizer, writes=False):
        views = parts.engine.weight_views() | parts.states.views() | parts.engine.beside_views()
        return {name: [(box, tensor.clone()) for box, tensor in view.box_tensors()] for name, view in views.items()}


class Formula:
    """The average of this rank's part of the weights by its formula, from copies of what is there after each step.

    Weights of two layouts cannot be compared to 1e-5: Adam divides a gradient by its own size, so where a gradient is
    rounding, as that of a key's bias is, the update is rounding of the size of the rate.
    """

    def __init__(self, parts: TrainingSetup, num_steps: int) -> None:
        self.parts, self.num_steps = parts, num_steps
        self.means = self._copies(parts.engine.beside_views if num_steps else parts.engine.weight_views)

    def _copies(self, views: Callable[[], dict[str, ShardView]]) -> dict[str, Tensor]:
        with self.parts.engine.states_opened(self.parts.optimizer, writes=False):
            return {name.removeprefix(f"{AVERAGE}/"): view.data.clone() for name, view in views().items()}

    def follow(self) -> None:
        """Take a step in, and compare."""
        self.num_steps += 1
        kept = min(DECAY, (1 + self.num_steps) / (10 + self.num_steps))
        weights, averages = self._copies(self.parts.engine.weight_views), self._copies(self.parts.engine.beside_views)
        assert set(averages) == set(weights)
        for name, weight in weights.items():
            self.means[name] = kept * self.means[name] + (1 - kept) * weight
            assert torch.allclose(averages[name], self.means[name], rtol=1e-5, atol=1e-7), name


@dataclass(frozen=True)
class TwoRuns:
    """Losses, norms and what is stored in the end of two runs; what the first saved, and what the second loaded."""

    end: Trace
    saved: Trace
    loaded: Trace


def in_two_runs(first: Case, second: Case, directory: str) -> TwoRuns:
    """Train, save; load at another layout, train on."""
    parts = damped_parts(
        Case(first.model, first.layout, f"{first.options} --save {directory}"), make_mesh(first.layout)
    )
    check_bytes(parts)
    average, formula = WeightAverage(parts, DECAY), Formula(parts, 0)
    losses, norms = train_on(parts, average, first_step=0, num_steps=FIRST, formula=formula)
    state.save(parts, Progress(FIRST), settings_from_config(parts.config.optim, parts.config.train))
    saved = stored(parts)
    options = f"{second.options} --save {directory}"
    parts = damped_parts(Case(second.model, second.layout, options), make_mesh(second.layout))
    assert state.restore(parts).progress.step == FIRST
    loaded = stored(parts)
    average, formula = WeightAverage(parts, DECAY, num_steps=FIRST), Formula(parts, FIRST)
    more_losses, more_norms = train_on(parts, average, first_step=FIRST, num_steps=SECOND, formula=formula)
    end = Trace(losses + more_losses, norms + more_norms, stored(parts))
    return TwoRuns(end, Trace([], [], saved), Trace([], [], loaded))


def check_bytes(parts: TrainingSetup) -> None:
    """The ledger's bytes of declared state are those that are allocated."""
    held = RankModel(parts.model.stages, {name: unit.layout for name, unit in parts.engine.units.items()})
    predicted = declared_state_bytes(parts.config.parallel, held)
    allocated = parts.states.size_bytes + parts.engine.state_bytes().beside
    assert predicted.declared + predicted.host == allocated > 0, f"predicted {predicted}, allocated {allocated}"


def run_pairs(rank: int, world_size: int, pairs: list[tuple[Case, Case]], directory: str) -> list[TwoRuns]:
    """Body of a worker."""
    return [in_two_runs(*pair, f"{directory}/{number}") for number, pair in enumerate(pairs)]


def with_a_flipped_value(rank: int, world_size: int, layout: Layout) -> str:
    """Body of a worker: what the comparison of replicas says when the state of one rank is another."""
    parts = damped_parts(Case("gpt2", layout), make_mesh(layout))
    state.check_replicas(parts, 1)
    if rank == 1:
        parts.states.values()["layers.2.mlp.steps"].add_(1)
    try:
        state.check_replicas(parts, 2)
    except NumericsError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("layout", [Layout(dp=2), Layout(tp=2)])
def test_state_that_differs_between_ranks_that_hold_the_same_is_found(pool: Pool, layout: Layout) -> None:
    for message in pool.run(2, with_a_flipped_value, layout):
        assert "layers.2.mlp.steps: rank" in message and "after step 2" in message


@pytest.fixture(scope="module")
def alone() -> tuple[Trace, dict[str, Tensor], list[dict[str, Tensor]]]:
    """One process without an interruption: its trace, what it holds in the end, and its weights after each step."""
    parts = damped_parts(Case("gpt2", Layout()), make_mesh(Layout()))
    average = WeightAverage(parts, DECAY)
    losses, norms, weights = [], [], [whole_weights(parts)]
    for step in range(FIRST + SECOND):
        loss, norm = train_on(parts, average, first_step=step, num_steps=1)
        losses, norms = losses + loss, norms + norm
        weights.append(whole_weights(parts))
    trace = Trace(losses, norms, stored(parts))
    return trace, assemble([trace], shapes_of(parts)), weights


def whole_weights(parts: TrainingSetup) -> dict[str, Tensor]:
    """A copy of all weights of a run in one process."""
    return {name: view.data.view(view.full_shape).clone() for name, view in parts.engine.weight_views().items()}


def shapes_of(parts: TrainingSetup) -> dict[str, tuple[int, ...]]:
    """Full shapes of everything stored."""
    views = parts.engine.weight_views() | parts.states.views() | parts.engine.beside_views()
    return {name: view.full_shape for name, view in views.items()}


@pytest.mark.parity
@pytest.mark.parametrize(("world_size", "pairs"), BATCHES)
def test_state_is_that_of_one_process_at_every_layout_through_a_checkpoint(
    pool: Pool, tmp_path: Path, alone: tuple, world_size: int, pairs: list[tuple[Case, Case]]
) -> None:
    trace, whole, _ = alone
    by_rank = pool.run(world_size, run_pairs, pairs, str(tmp_path), timeout_s=240)
    for number, pair in enumerate(pairs):
        runs = [one[number] for one in by_rank]
        assert relative(runs[0].end.losses, trace.losses) < LOSS_TOLERANCE, pair
        assert relative(runs[0].end.norms, trace.norms) < NORM_TOLERANCE, pair
        shapes = {name: tuple(tensor.shape) for name, tensor in whole.items()}
        got = assemble([one.end for one in runs], shapes)
        for name, expected in whole.items():
            if name.endswith(("mean", "largest", "steps", "count", "sharded")):
                difference = float((got[name] - expected).abs().max() / expected.abs().max())
                assert difference < GRADIENT_TOLERANCE, f"{pair}: {name} differs by {difference}"
        saved, loaded = (assemble(traces, shapes) for traces in zip(*((one.saved, one.loaded) for one in runs)))
        assert all(torch.equal(saved[name], loaded[name]) for name in shapes), f"{pair}: resharded to other values"


def test_an_average_is_that_of_the_weights_after_each_step(alone: tuple) -> None:
    _, whole, weights = alone
    for name, mean in weights[0].items():
        for step, one in enumerate(weights[1:], 1):
            kept = min(DECAY, (1 + step) / (10 + step))
            mean = kept * mean + (1 - kept) * one[name]
        assert torch.allclose(whole[f"{AVERAGE}/{name}"], mean, rtol=1e-5, atol=1e-7), name


def test_state_of_a_frozen_beginning_is_not_updated() -> None:
    options = "--freeze-params embedding.* layers.0.* layers.1.*"
    parts = damped_parts(Case("gpt2", Layout(), options), make_mesh(Layout()))
    train_on(parts, WeightAverage(parts, DECAY), first_step=0, num_steps=2)
    steps = {name: value.item() for name, value in parts.states.values().items() if name.endswith("steps")}
    assert steps == {f"layers.{layer}.mlp.steps": 0 if layer < 2 else 2 for layer in range(4)}
    assert not any(name.startswith(f"{AVERAGE}/layers.1.") for name in parts.engine.beside_views())


def test_a_total_is_the_sum_over_the_tokens_of_a_step(alone: tuple) -> None:
    """The state after one step, by hooks on the inputs of plain forwards of each sample."""
    parts = damped_parts(Case("gpt2", Layout(), FULL), make_mesh(Layout()))
    seen: list[Tensor] = []
    module = parts.model.stages[0].layers["1"].mlp
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().flatten(0, 1)))
    data = data_of(parts.config)
    with GlobalBatches(data.reader(data.train), num_workers=0) as batches:
        evaluate(parts, batches, num_batches=1)  # the first global batch of the data, without any update
        handle.remove()
        train_step(parts, batches.read(0, 8, 0, 1), RATES, step=0)
    tokens = torch.cat(seen).double()
    assert len(tokens) == 8 * 16
    assert torch.allclose(module.mean, (0.5 + 0.5 * tokens.square().mean(0)).float(), rtol=1e-5)
    assert torch.allclose(module.largest, tokens.abs().amax(0).float(), rtol=1e-5)
    assert (module.steps.item(), module.count.item()) == (1, 8 * 16)  # not those of the evaluation, nor twice
