"""A stop that comes at another time than between steps: the run ends at once, saved, and resumes as if nothing was."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from unittest import mock

import pytest

from megatron3d.comm import agent
from megatron3d.comm.launch import Launch
from megatron3d.train import launch, loop
from tests.runs.harness import MOCK, Fault, Launcher, exit_status, losses, records, run, steps, words

# Training, validation and test split, an evaluation after step 3 and after the last, and one of the test split.
EVALUATING = "--split 6,2,2 --eval-iters 3 --eval-interval 3 --train-iters 6"
LAYOUT = "--pipeline-model-parallel-size 2"
OF_STEP = {1: 3, 2: 6, 3: 6}


def _evaluations(metrics: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["valid_loss"]) for record in records(metrics) if "valid_loss" in record]


@pytest.fixture(scope="module")
def whole(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The metrics of a run that nobody stops."""
    folder = tmp_path_factory.mktemp("whole")
    argv = words(MOCK, EVALUATING, LAYOUT, "--metrics-file", folder / "metrics.jsonl", "--save", folder / "save")
    with launcher.job(argv, 2) as job:
        assert job.wait() == [0, 0]
        assert "test after step 6" in job.said(0), job.said(0)
    assert [step for step, _ in _evaluations(folder / "metrics.jsonl")] == [3, 6]
    return folder / "metrics.jsonl"


@pytest.mark.parametrize("number", OF_STEP, ids=["after step 3", "after the last", "test split"])
def test_a_stop_within_an_evaluation_does_not_wait_for_it_and_the_next_run_makes_it_once(
    launcher: Launcher, tmp_path: Path, whole: Path, number: int
) -> None:
    metrics, save, step = tmp_path / "metrics.jsonl", tmp_path / "save", OF_STEP[number]
    argv = words(MOCK, EVALUATING, LAYOUT, "--metrics-file", metrics, "--save", save)
    with launcher.job(argv, 2, fault=Fault(rank=1, step=number, kind="stop-evaluating")) as job:
        assert job.wait() == [75, 75]
        assert f"stopped after step {step} because SIGTERM was received" in job.said(0)
    assert (exit_status(save)["code"], exit_status(save)["step"]) == (75, step)
    done = [at for at, _ in _evaluations(whole) if at < step or number == 3]
    assert [at for at, _ in _evaluations(metrics)] == done, "an evaluation that was given up left a record"
    for again in range(1 + (number == 2)):
        with launcher.job(argv, 2) as job:
            assert job.wait() == [0, 0]
            assert not again or "validation after" not in job.said(0), "all is done, and yet it was made once more"
        assert losses(metrics) == losses(whole)
        assert _evaluations(metrics) == _evaluations(whole)


def test_a_delayed_update_is_not_disturbed_by_an_evaluation_that_was_given_up(
    launcher: Launcher, tmp_path: Path
) -> None:
    """The evaluation has the updated weights in the layers, which the training does not compute with yet."""
    delayed = "--zero-stage 1 --offload-optimizer cpu --offload-delayed-update"
    argv = words(MOCK, EVALUATING, delayed)
    names = ("--metrics-file", tmp_path / "whole.jsonl", "--save", tmp_path / "other")
    with launcher.job([*argv, *words(*names)], 2) as job:
        assert job.wait() == [0, 0]
    argv += words("--metrics-file", tmp_path / "metrics.jsonl", "--save", tmp_path / "save")
    with launcher.job(argv, 2, fault=Fault(rank=1, step=1, kind="stop-evaluating")) as job:
        assert job.wait() == [75, 75]
    with launcher.job(argv, 2) as job:
        assert job.wait() == [0, 0]
    assert losses(tmp_path / "metrics.jsonl") == losses(tmp_path / "whole.jsonl")
    assert _evaluations(tmp_path / "metrics.jsonl") == _evaluations(tmp_path / "whole.jsonl")


def test_an_evaluation_that_is_due_is_made_once_though_the_run_that_makes_it_is_killed(
    launcher: Launcher, tmp_path: Path, whole: Path
) -> None:
    metrics, save = tmp_path / "metrics.jsonl", tmp_path / "save"
    argv = words(MOCK, EVALUATING, LAYOUT, "--metrics-file", metrics, "--save", save)
    with launcher.job(argv, 2, fault=Fault(rank=0, step=1, kind="stop-evaluating")) as job:
        assert job.wait() == [75, 75]
    with launcher.job(argv, 2, fault=Fault(rank=1, step=5, kind="kill")) as job:
        assert job.wait() == [6, -signal.SIGKILL]
    assert [at for at, _ in _evaluations(metrics)] == [3]
    with launcher.job(argv, 2) as job:
        assert job.wait() == [0, 0]
    assert losses(metrics) == losses(whole)
    assert _evaluations(metrics) == _evaluations(whole)


def test_a_stop_while_starting_ends_all_ranks_before_a_step_and_touches_nothing(
    launcher: Launcher, tmp_path: Path
) -> None:
    metrics, save = tmp_path / "metrics.jsonl", tmp_path / "save"
    argv = words(MOCK, "--train-iters 3 --metrics-file", metrics, "--save", save)
    with launcher.job(argv, 2) as job:
        assert job.wait() == [0, 0]
    before = metrics.read_text()
    longer = [*argv, *words("--train-iters 5")]
    with launcher.job(longer, 2, fault=Fault(rank=1, step=0, kind="stop-starting")) as job:
        assert job.wait() == [75, 75]
        assert "stopped before training because SIGTERM was received" in job.said(0)
        assert "step 4/" not in job.said(0)
    assert exit_status(save)["code"] == 75
    assert (metrics.read_text(), (save / "latest").read_text().strip()) == (before, "iter_0000003")
    with launcher.job(longer, 2) as job:
        assert job.wait() == [0, 0]
    assert len(steps(metrics)) == 5


def test_the_time_of_a_run_is_counted_from_the_start_of_its_process(tmp_path: Path) -> None:
    """Importing, joining and loading took half an hour of the time that the job has."""
    began = Launch(started_s=time.monotonic() - 1800.0)
    with mock.patch.object(launch, "read_launch", lambda: began):
        ended = run(words(MOCK, "--exit-duration-in-mins 29 --save", tmp_path / "save"))
    assert ended.code == 75
    ended.says("stopped after step 1 because --exit-duration-in-mins 29 is over")


def test_an_exit_that_python_is_asked_for_leaves_its_code(tmp_path: Path) -> None:
    with mock.patch.object(loop, "train_step", side_effect=SystemExit(5)):
        assert run(words(MOCK, "--save", tmp_path / "save")).code == 5
    assert (exit_status(tmp_path / "save")["code"], exit_status(tmp_path / "save")["reason"]) == (5, "SystemExit: 5")


def test_a_mistake_in_where_the_options_come_from_replaces_the_status_of_an_earlier_run(tmp_path: Path) -> None:
    """The command line cannot be read to its end, and yet --save is known."""
    save = tmp_path / "save"
    save.mkdir()
    (save / "exit_status.json").write_text('{"code": 0}')
    ended = run(words(MOCK, "--use-checkpoint-args --load", tmp_path / "absent", "--save", save))
    assert ended.code == exit_status(save)["code"] == 4


class _Workers:
    """Stands for the processes of an agent: what they were sent, and how long they had."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, float]] = []

    def close(self, death_sig: int | None = None, timeout: float = 30) -> None:
        """As torch's, which waits for processes that are there."""
        self.sent.append((death_sig or signal.SIGTERM, timeout))


def test_the_agent_for_older_torch_waits_as_told_after_a_signal_and_only_then() -> None:
    with mock.patch.object(agent.LocalElasticAgent, "__init__", lambda self, *_, **__: None):
        one = agent.PatientAgent(shutdown_timeout_s=600)
    one._worker_watchdog = one._health_check_server = None
    one._pcontext = workers = _Workers()
    one._shutdown()  # a process failed
    assert workers.sent == [(signal.SIGTERM, 30)]
    workers.sent.clear()
    one._shutdown(signal.SIGUSR1)
    assert workers.sent[0] == (signal.SIGUSR1, 600)
    workers.sent.clear()
    one._shutdown()  # torch does so once more where a second signal comes meanwhile
    assert workers.sent[0] == (signal.SIGTERM, 600)
