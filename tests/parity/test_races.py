"""Runs whose asynchronous results are NaN until they are waited for, against the same runs as they are.

Three faults planted in the product show that the detector (tests/dist/poison.py) sees what it is for.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.data.loader import GlobalBatches
from megatron3d.errors import NumericsError
from megatron3d.pipeline import run as pipeline_run
from megatron3d.train.evaluate import evaluate
from megatron3d.train.setup import TrainingSetup
from megatron3d.train.step import train_step
from megatron3d.zero.engine import ZeroEngine
from megatron3d.zero.gatherer import UnitGatherer
from tests.dist.poison import Detector
from tests.dist.pool import Pool
from tests.parity.runs import RATES, Case, data_of, parts_of

NUM_STEPS = 4
NUM_MICROBATCHES = 4
DROPOUT = "--hidden-dropout 0.1 --attention-dropout 0.1"
OVERLAP = "--overlap-param-gather"
BF16 = "--bf16 --grad-reduce-in-bf16"
FILES = "--offload-optimizer nvme --offload-params nvme --offload-dir DIR"
DELAYED = "--offload-delayed-update"
INTERLEAVED = "--num-virtual-stages-per-pipeline-rank 2"
ZB_V = "--pipeline-schedule zb-v"
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers"
SP = "--sequence-parallel"
CUT = "--vocab-size 1029"  # a table so large that stage 3 cuts it into blocks

DP2, PP2, PP2_TP2 = Layout(dp=2), Layout(pp=2), Layout(pp=2, tp=2)
DP4, PP4, TP2_DP2, PP2_DP2 = Layout(dp=4), Layout(pp=4), Layout(tp=2, dp=2), Layout(pp=2, dp=2)
SHARDS_OF_2 = Layout(dp=4, zero_shard=2)
CASES = {
    "zero 0": (DP2, ""),
    "zero 1 overlap": (DP2, f"--zero-stage 1 {OVERLAP}"),
    "zero 2 overlap": (DP2, f"--zero-stage 2 {OVERLAP}"),
    "zero 1 overlap bf16": (DP2, f"--zero-stage 1 {OVERLAP} {BF16}"),
    "zero 2 overlap bf16": (DP2, f"--zero-stage 2 {OVERLAP} {BF16}"),
    "zero 3": (DP2, "--zero-stage 3"),
    "zero 3 prefetch 3 bf16": (DP2, "--zero-stage 3 --zero-prefetch-units 3 --bf16"),
    "zero 3 prefetch 0": (DP2, "--zero-stage 3 --zero-prefetch-units 0"),
    "zero 3 recompute": (DP2, f"--zero-stage 3 --zero-prefetch-units 2 {RECOMPUTE} 2"),
    "zero 3 untied": (DP2, "--zero-stage 3 --untie-embeddings-and-output-weights"),
    "zero 3 cut table": (DP2, f"--zero-stage 3 {CUT}"),
    "zero 3 cut tables prefetch 0 bf16": (
        DP2,
        f"--zero-stage 3 --zero-prefetch-units 0 --untie-embeddings-and-output-weights {CUT} {BF16}",
    ),
    "cut table in files": (DP2, f"--zero-stage 3 {CUT} {FILES} {DELAYED}"),
    "host": (DP2, "--zero-stage 2 --offload-optimizer cpu"),
    "host weights": (DP2, "--zero-stage 3 --offload-optimizer cpu --offload-params cpu"),
    "files": (DP2, f"--zero-stage 3 {FILES}"),
    "files prefetch 2 bf16": (DP2, f"--zero-stage 3 --bf16 --zero-prefetch-units 2 {FILES}"),
    "delayed": (DP2, f"--zero-stage 1 --offload-optimizer cpu {DELAYED}"),
    "delayed overlap": (DP2, f"--zero-stage 1 {OVERLAP} --offload-optimizer cpu {DELAYED}"),
    "delayed files": (DP2, f"--zero-stage 3 {FILES} {DELAYED}"),
    "1f1b": (PP2, f"--zero-stage 1 {OVERLAP}"),
    "gpipe": (PP2, "--pipeline-schedule gpipe --zero-stage 2"),
    "interleaved zero 1": (PP2, f"--zero-stage 1 {OVERLAP} {INTERLEAVED}"),
    "interleaved zero 3": (PP2, f"--zero-stage 3 --zero-prefetch-units 2 {INTERLEAVED}"),
    "zb-h1 zero 2": (PP2, "--pipeline-schedule zb-h1 --zero-stage 2"),
    "zb-h1 zero 3": (PP2, "--pipeline-schedule zb-h1 --zero-stage 3"),
    "zb-v zero 1": (PP2, f"{ZB_V} --zero-stage 1 {OVERLAP}"),
    "zb-v zero 2": (PP2, f"{ZB_V} --zero-stage 2"),
    "zb-v zero 3": (PP2, f"{ZB_V} --zero-stage 3 --zero-prefetch-units 2"),
    "zb-v zero 3 recompute": (PP2, f"{ZB_V} --zero-stage 3 {RECOMPUTE} 1"),
    "zb-v files": (PP2, f"{ZB_V} --zero-stage 3 {FILES}"),
    "tp zero 3": (TP2_DP2, f"{SP} --zero-stage 3 --zero-prefetch-units 2"),
    "tp zero 1": (TP2_DP2, f"--zero-stage 1 {OVERLAP}"),
    "tp zb-v": (PP2_TP2, f"{SP} {ZB_V}"),
    "tp zb-v in chunks": (PP2_TP2, f"{SP} {ZB_V} --tp-comm-overlap"),
    "tp zero 1 in chunks": (TP2_DP2, f"--zero-stage 1 {OVERLAP} --tp-comm-overlap --tp-comm-overlap-chunks 3"),
    "tp zero 3 in chunks": (TP2_DP2, f"{SP} --zero-stage 3 --zero-prefetch-units 2 {RECOMPUTE} 1 --tp-comm-overlap"),
    "tp interleaved": (PP2_TP2, f"{SP} {INTERLEAVED}"),
    "shards of 2, zero 3": (SHARDS_OF_2, "--zero-stage 3 --zero-shard-size 2"),
    "shards of 2, zero 1": (SHARDS_OF_2, f"--zero-stage 1 --zero-shard-size 2 {OVERLAP}"),
    "zb-v zero 3 cut table": (PP2_DP2, f"{ZB_V} --zero-stage 3 {CUT}"),
    "four stages": (PP4, ""),
    "four stages interleaved": (PP4, INTERLEAVED),
    "four stages zb-v": (PP4, ZB_V),
    "dualpipe-v zero 3": (PP2_DP2, "--pipeline-schedule dualpipe-v --zero-stage 3"),
    "breadth-first zero 2": (PP2_DP2, f"--pipeline-schedule breadth-first {INTERLEAVED} --zero-stage 2 {OVERLAP}"),
    "zb-h2 zero 3": (PP2_DP2, "--pipeline-schedule zb-h2 --zero-stage 3"),
    "zb-v zero 3 dp": (PP2_DP2, f"{ZB_V} --zero-stage 3 --zero-prefetch-units 2"),
    "1f1b zero 1 dp": (PP2_DP2, f"--zero-stage 1 {OVERLAP}"),
    "zb-v untied bf16": (PP2_DP2, f"{ZB_V} --zero-stage 3 --untie-embeddings-and-output-weights {BF16}"),
    "four ranks zero 2 delayed": (DP4, f"--zero-stage 2 --offload-optimizer cpu {DELAYED}"),
    "pipeline delayed files": (PP2_DP2, f"--zero-stage 3 {FILES} {DELAYED}"),
}
USUAL = ("zero 1 overlap", "zero 2 overlap bf16", "zero 3 recompute", "delayed files", "delayed overlap", "zb-v zero 1")
USUAL += ("zero 3 cut table",)


@dataclass(frozen=True)
class Seen:
    """One rank's losses, norms and sums of weights without and with the detector (None: the run raised), what it
    found, and how many operations it watched."""

    plain: list[float]
    poisoned: list[float] | None
    problems: list[str]
    num_watched: int


def case_of(name: str, directory: str) -> Case:
    """A row of the table."""
    layout, options = CASES[name]
    batch = f"--micro-batch-size 1 --global-batch-size {NUM_MICROBATCHES * layout.dp}"
    deep = "gpt2-deep" if "four stages" in name else "gpt2"
    return Case(deep, layout, f"{DROPOUT} {batch} {options}".replace("DIR", directory))


def both_ways(rank: int, world_size: int, name: str, directory: str, fault: str | None = None) -> Seen:
    """Body of a worker: a case as it is and poisoned, there with a fault."""
    case = case_of(name, directory)
    mesh = make_mesh(case.layout)
    plain = numbers_of(parts_of(case, mesh))
    detector = Detector(seed=rank)
    try:
        with ExitStack() as stack:
            if fault is not None:
                stack.enter_context(FAULTS[fault]())
            stack.enter_context(_restless_threads())
            stack.enter_context(detector)
            poisoned = numbers_of(parts_of(case, mesh))
    except NumericsError:
        poisoned = None
    return Seen(plain, poisoned, detector.problems, detector.counts.total())


@contextmanager
def _restless_threads() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def numbers_of(parts: TrainingSetup) -> list[float]:
    """Train with what lies between steps in real runs: a look at the weights, a change of them, and an evaluation."""
    config, readers, engine = parts.config, parts.mesh.batch, parts.engine
    data, size = data_of(config), config.train.global_batch_size
    numbers = []
    with GlobalBatches(data.reader(data.train), num_workers=0) as train:
        for step in range(NUM_STEPS):
            result = train_step(parts, train.read(step * size, size, readers.rank, readers.size), RATES, step=step)
            numbers += [result.loss, result.grad_norm]
            if step == 0:
                numbers.append(evaluate(parts, train, num_batches=1).loss)
            if step == 1:
                halve_weights(parts)
            if step == 2:
                numbers.append(sum_of_weights(parts))
    engine.finish_update()
    engine.finish_publish()
    return [*numbers, sum_of_weights(parts)]


def halve_weights(parts: TrainingSetup) -> None:
    """Change the weights of a model in training, as recalled and averaged ones do."""
    with parts.engine.states_opened(parts.optimizer, writes=True):
        for view in parts.engine.weight_views().values():
            view.data.mul_(0.5)
    parts.engine.publish()


def sum_of_weights(parts: TrainingSetup) -> float:
    """A sum over what this rank owns of the master weights."""
    with parts.engine.states_opened(parts.optimizer, writes=False):
        return sum(float(view.data.double().abs().sum()) for view in parts.engine.weight_views().values())


def _require_no_race(pool: Pool, name: str, directory: Path) -> None:
    for rank, seen in enumerate(pool.run(CASES[name][0].world_size, both_ways, name, str(directory))):
        assert not seen.problems, f"rank {rank}: {seen.problems}"
        assert seen.poisoned == seen.plain, f"rank {rank}"
        assert seen.num_watched > 0


@pytest.mark.parametrize("name", USUAL)
def test_nothing_is_read_or_written_while_it_is_under_way(pool: Pool, tmp_path: Path, name: str) -> None:
    _require_no_race(pool, name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(CASES) - set(USUAL)))
def test_nothing_is_read_or_written_while_it_is_under_way_at_any_layout(pool: Pool, tmp_path: Path, name: str) -> None:
    _require_no_race(pool, name, tmp_path)


# --- What the detector must see ---------------------------------------------------------------------------------------


@contextmanager
def _a_gate_that_does_not_wait() -> Iterator[None]:
    real = UnitGatherer.gather_weights

    def gather_weights(self: UnitGatherer, place: str, *, backward: bool) -> None:
        with mock.patch.object(self._weights["layers.2"], "finish_gather", lambda: None):
            real(self, place, backward=backward)

    with mock.patch.object(UnitGatherer, "gather_weights", gather_weights):
        yield


@contextmanager
def _a_stage_that_changes_what_it_sends() -> Iterator[None]:
    interpreter = pipeline_run._Interpreter
    real = interpreter._forward

    def forward(self: pipeline_run._Interpreter, stage: int, mb: int) -> None:
        real(self, stage, mb)
        for sent in self.outputs.values():
            sent.data.mul_(1.0001)

    with mock.patch.object(interpreter, "_forward", forward):
        yield


@contextmanager
def _weights_opened_while_they_are_gathered() -> Iterator[None]:
    with mock.patch.object(ZeroEngine, "finish_publish", lambda self: None):
        yield


FAULTS = {
    "gate": _a_gate_that_does_not_wait,
    "send": _a_stage_that_changes_what_it_sends,
    "open": _weights_opened_while_they_are_gathered,
}


@pytest.mark.parametrize("name", ["zero 1 overlap", "zero 3"])
def test_a_gate_that_does_not_wait_is_seen_as_a_loss_that_is_not_finite(pool: Pool, tmp_path: Path, name: str) -> None:
    for seen in pool.run(2, both_ways, name, str(tmp_path), "gate"):
        assert seen.poisoned is None


@pytest.mark.parametrize(
    ("fault", "name", "sentence"),
    [
        ("send", "zb-v zero 1", "send: what it reads was changed before its wait"),
        ("open", "zero 1 overlap", "all_gather: where it writes was written before its wait"),
    ],
)
def test_a_tensor_that_is_written_while_it_is_under_way_is_named(
    pool: Pool, tmp_path: Path, fault: str, name: str, sentence: str
) -> None:
    found = [one for seen in pool.run(2, both_ways, name, str(tmp_path), fault) for one in seen.problems]
    assert any(one.startswith(sentence) for one in found), found
