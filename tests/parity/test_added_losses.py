"""A loss added in the middle of a model: the training of plain autograd, at every layout, order and recomputation.

The model is a GPT with a penalty on the output of two of its blocks (`penalised.py`).

Shapes: S sequence, B samples, H hidden, V vocabulary.
"""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron3d.comm.launch import Launch
from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.data.batch import GPTBatch
from megatron3d.data.loader import GlobalBatches
from megatron3d.errors import StopRequested
from megatron3d.models.gpt import build_gpt_stage
from megatron3d.optim.schedule import settings_from_config
from megatron3d.params.module import materialize_all
from megatron3d.train import state
from megatron3d.train.evaluate import Evaluation, evaluate
from megatron3d.train.launch import RunContext
from megatron3d.train.loop import open_streams, train
from megatron3d.train.setup import TrainingSetup, build_model
from megatron3d.train.step import forward_backward, global_counts, micro_batches, train_step
from tests.dist.pool import Pool
from tests.parity import penalised
from tests.parity.compare import GRADIENT_TOLERANCE, LOSS_TOLERANCE, check_against_one_process, reference, relative
from tests.parity.runs import (
    RATES,
    VOCAB_SIZE,
    Case,
    Trace,
    assemble,
    brief,
    config_of,
    data_of,
    parts_of,
    trace,
    trace_cases,
)
from tests.runs.harness import records, steps
from tests.train.test_megatron_names import curves

MODEL = "penalised"
SP = "--sequence-parallel"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 2"
CPU = torch.device("cpu")

CASES = [
    brief(Case(MODEL, Layout(tp=2))),
    Case(MODEL, Layout(tp=2), f"{SP} {FULL}"),
    brief(Case(MODEL, Layout(pp=2), "--pipeline-schedule zb-h1 --micro-batch-size 1")),
    brief(Case(MODEL, Layout(pp=2), "--pipeline-schedule zb-v")),
    brief(Case(MODEL, Layout(dp=2), "--zero-stage 1 --micro-batch-size 4")),
    brief(Case(MODEL, Layout(dp=2), f"--zero-stage 3 {FULL}")),
    Case(MODEL, Layout(tp=2, pp=2), f"{SP} --pipeline-schedule zb-v {FULL}"),
    Case(MODEL, Layout(pp=2, dp=2), "--zero-stage 2 --pipeline-schedule zb-h1 --micro-batch-size 1"),
]
BATCHES = [
    pytest.param(size, list(group), id=f"world{size}", marks=[pytest.mark.slow] if size > 2 else [])
    for size, group in groupby(CASES, key=lambda case: case.layout.world_size)
]


@pytest.mark.parity
@pytest.mark.parametrize(("world_size", "batch"), BATCHES)
def test_layouts_give_the_losses_norms_and_gradients_of_one_process(
    pool: Pool, parity_table: list[str], world_size: int, batch: list[Case]
) -> None:
    by_rank = pool.run(world_size, trace_cases, batch, timeout_s=240)
    for number, case in enumerate(batch):
        check_against_one_process(case, [traces_of_rank[number] for traces_of_rank in by_rank], parity_table)


# --- plain autograd ---------------------------------------------------------------------------------------------------


@functools.cache
def by_plain_autograd() -> tuple[dict[str, float], dict[str, Tensor]]:
    """Means of both losses over the first global batch, and the gradients of their weighted sum: the blocks of a plain
    GPT, everything else torch's own, one graph over all samples."""
    config = config_of(Case(MODEL, Layout()))
    (stage,) = build_model(config, make_mesh(Layout()), CPU, build_gpt_stage).stages.values()
    materialize_all(stage, seed=config.data.seed, tp=1, tp_rank=0, device=CPU)
    seen: list[Tensor] = []
    for name in penalised.LAYERS:
        stage.layers[name].register_forward_hook(lambda block, args, y_SBH: seen.append(y_SBH))
    batch = first_batch()
    (micro,) = micro_batches(batch, batch.num_samples, device=CPU)
    logits_SBV = stage(None, replace(micro, labels_BS=None))[..., :VOCAB_SIZE]
    token_losses = F.cross_entropy(logits_SBV.flatten(0, 1), batch.labels_BS.t().flatten(), reduction="none")
    mask = batch.loss_mask_BS.t().flatten()
    lm = (token_losses * mask).sum() / mask.sum()
    penalty = sum(penalised.penalties_of(y_SBH).sum() for y_SBH in seen) / batch.tokens_BS.numel()
    (lm + penalised.WEIGHT * penalty).backward()
    gradients = {}
    for name, one in stage.parameters_by_name().items():
        assert one.parameter.grad is not None, f"{name} got no gradient"
        gradients[name] = one.parameter.grad[: one.spec.shape[0]]
    return {"lm": lm.item(), "penalty": penalty.item()}, gradients


def first_batch() -> GPTBatch:
    """With labels that do not count, so that the two losses are means over different numbers."""
    config = config_of(Case(MODEL, Layout()))
    data = data_of(config)
    batch = data.reader(data.train)(0, config.train.global_batch_size)
    return replace(batch, loss_mask_BS=(batch.tokens_BS % 3 > 0).float())


def by_a_step(parts: TrainingSetup) -> dict[str, Tensor]:
    """The gradients of the same batch as a training step has them, without the loss scale."""
    batch = first_batch()
    forward_backward(parts, batch, global_counts(parts, batch), step=0)
    parts.engine.finish_reduce()
    views = parts.engine.grad_views()
    boxes = {
        name: [(box, values / parts.scaler.scale) for box, values in one.box_tensors()] for name, one in views.items()
    }
    parts.engine.clear_grads()
    return assemble([Trace([], [], boxes)], {name: one.full_shape for name, one in views.items()})


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """As a part of the largest element of the same parameter's gradient."""
    assert set(found) == set(expected)
    return max(float((found[name] - one).abs().max() / one.abs().max()) for name, one in expected.items())


@pytest.mark.parametrize(
    "options", ["", "--micro-batch-size 4", FULL, "--recompute-granularity selective", "--fp16 --initial-loss-scale 64"]
)
def test_losses_and_gradients_of_a_step_are_those_of_plain_autograd(options: str) -> None:
    """With fp16 the tolerances are those of values of 11 bits."""
    means, expected = by_plain_autograd()
    parts, is_fp16 = parts_of(Case(MODEL, Layout(), options), make_mesh(Layout())), "fp16" in options
    assert largest_error(by_a_step(parts), expected) < (0.02 if is_fp16 else GRADIENT_TOLERANCE)
    result, tolerance = train_step(parts, first_batch(), RATES, step=0), 2**-9 if is_fp16 else LOSS_TOLERANCE
    assert result.losses == pytest.approx(means, rel=tolerance)
    assert result.loss == pytest.approx(means["lm"] + penalised.WEIGHT * means["penalty"], rel=tolerance)


def test_a_penalty_of_a_frozen_layer_counts_once_though_its_group_is_recomputed() -> None:
    """No gradient goes through the first layer; the second, of the same group, still needs its forward again."""
    means, expected = by_plain_autograd()
    parts = parts_of(Case(MODEL, Layout(), f"--freeze-params embedding.* layers.0.* {FULL}"), make_mesh(Layout()))
    found = by_a_step(parts)
    assert set(found) < set(expected)
    assert largest_error(found, {name: expected[name] for name in found}) < GRADIENT_TOLERANCE
    assert train_step(parts, first_batch(), RATES, step=0).losses == pytest.approx(means, rel=LOSS_TOLERANCE)


def test_without_the_penalty_the_gradients_are_others() -> None:
    found = by_a_step(parts_of(Case("gpt2", Layout()), make_mesh(Layout())))
    assert largest_error(found, by_plain_autograd()[1]) > 1e4 * GRADIENT_TOLERANCE


# --- evaluation, checkpoints, reports ---------------------------------------------------------------------------------


def evaluated(rank: int, world_size: int, case: Case) -> Evaluation:
    parts = parts_of(case, make_mesh(case.layout))
    data = data_of(parts.config)
    with GlobalBatches(data.reader(data.valid), num_workers=0) as batches:
        return evaluate(parts, batches, num_batches=2)


@pytest.mark.parametrize(("layout", "options"), [(Layout(tp=2), SP), (Layout(pp=2), "")], ids=["SP", "PP2"])
def test_an_evaluation_has_the_loss_and_accuracy_that_the_model_declares(
    pool: Pool, layout: Layout, options: str
) -> None:
    expected = evaluated(0, 1, Case(MODEL, Layout()))
    assert [*expected.scalars()] == ["lm_loss", "penalty_loss", "small_penalty_share"]
    assert 0 < expected.accuracies["small_penalty_share"] < 1
    assert expected.loss == expected.losses["lm"] + penalised.WEIGHT * expected.losses["penalty"]
    for found in pool.run(2, evaluated, Case(MODEL, layout, options)):
        assert found.scalars() == pytest.approx(expected.scalars(), rel=LOSS_TOLERANCE)
        assert found.loss == pytest.approx(expected.loss, rel=LOSS_TOLERANCE)


HALF = 3


def save_halfway(rank: int, world_size: int, directory: str) -> list[float]:
    case = Case(MODEL, Layout(tp=2), f"{SP} --save {directory}")
    parts = parts_of(case, make_mesh(case.layout))
    losses = trace(parts, num_steps=HALF).losses
    schedule = settings_from_config(parts.config.optim, parts.config.train)
    state.save(parts, state.Progress(HALF, HALF * 8, HALF, HALF * 8), schedule)
    return losses


def resume(rank: int, world_size: int, directory: str, cases: list[Case]) -> list[list[float]]:
    found = []
    for case in cases:
        parts = parts_of(replace(case, options=f"{case.options} --load {directory}"), make_mesh(case.layout))
        assert state.restore(parts).progress.step == HALF
        found.append(trace(parts, num_steps=HALF, first_step=HALF).losses)
    return found


def test_a_run_resumes_from_a_checkpoint_of_another_layout(pool: Pool, tmp_path: Path) -> None:
    expected = reference(MODEL)[0].losses
    for losses in pool.run(2, save_halfway, str(tmp_path)):
        assert relative(losses, expected[:HALF]) < LOSS_TOLERANCE
    cases = [Case(MODEL, Layout(pp=2), "--pipeline-schedule zb-v"), Case(MODEL, Layout(dp=2), "--zero-stage 3")]
    for found in pool.run(2, resume, str(tmp_path), cases):
        for case, losses in zip(cases, found, strict=True):
            assert relative(losses, expected[HALF : 2 * HALF]) < LOSS_TOLERANCE, case


def test_a_run_reports_the_loss_by_name_and_resumes_bit_for_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Log lines, metrics file and TensorBoard, of steps and evaluations."""
    whole, metrics, events = tmp_path / "whole.jsonl", tmp_path / "m.jsonl", tmp_path / "events"
    common = "--train-iters 4 --eval-iters 1 --eval-interval 2 --log-interval 1"

    def run(options: str) -> None:
        parts = parts_of(Case(MODEL, Layout(), f"{common} {options}"), make_mesh(Layout()))
        with open_streams(data_of(parts.config), parts.config.data) as streams:
            train(parts, streams, RunContext(Launch()))

    run(f"--metrics-file {whole}")
    again = f"--metrics-file {metrics} --tensorboard-dir {events} --save {tmp_path}/save"
    with pytest.raises(StopRequested):
        run(f"{again} --exit-interval 2")
    run(again)
    names = ("loss", "lm_loss", "penalty_loss", "grad_norm")
    made = [[record[name] for name in names] for record in steps(metrics)]
    assert made == [[record[name] for name in names] for record in steps(whole)] and len(made) == 4
    assert all(loss == pytest.approx(lm + penalised.WEIGHT * penalty, rel=1e-12) for loss, lm, penalty, _ in made)
    log = capsys.readouterr().out
    assert re.search(r"step 1/4 \| loss \S+ \| lm loss \S+ \| penalty loss \S+ \| lr", log), log
    assert re.search(r"validation after step 2 .* penalty loss \S+ \| small penalty share \S+", log), log
    (valid,) = [one for one in records(metrics) if one.get("step") == 2 and "valid_loss" in one]
    assert {"valid_lm_loss", "valid_penalty_loss", "valid_small_penalty_share"} < set(valid)
    drawn = curves(events)["."]
    assert drawn["penalty loss"] == [(step, pytest.approx(one[2])) for step, one in enumerate(made, start=1)]
    assert drawn["valid_penalty_loss"][0] == (2, pytest.approx(valid["valid_penalty_loss"]))
