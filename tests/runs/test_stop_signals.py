"""Stops at moments of their own: while a run starts, by a terminal that closes, and of a run whose agent then dies."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.runs.harness import MOCK, ROOT, SCRIPT, Launcher, exit_status, words

SLOW_SAVE = Path(__file__).with_name("slow_save.py")
LONG_S = 60.0
# Stands for an agent: starts the command in $1 and waits, until it is killed itself.
AGENT = "import subprocess, sys; child = subprocess.Popen(sys.argv[1:]); print(child.pid, flush=True); child.wait()"


@contextlib.contextmanager
def _started(log: Path, argv: Sequence[str], **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A process that is killed at the end of the block if it still runs; its standard error goes to the log."""
    path = os.pathsep.join(filter(None, [environment.pop("FIRST", ""), str(ROOT), str(ROOT / "kernels")]))
    place = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *argv], env=place, stdout=subprocess.PIPE, stderr=output, text=True, cwd=ROOT
        )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize(("agent", "code"), [({}, 75), ({"TORCHELASTIC_RUN_ID": "test"}, 0)], ids=["alone", "agent"])
def test_a_stop_while_torch_is_imported_leaves_its_status(
    tmp_path: Path, number: signal.Signals, agent: dict[str, str], code: int
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    argv = [str(SCRIPT), *words(MOCK, "--save", tmp_path / "save")]
    with _started(tmp_path / "log", argv, FIRST=str(tmp_path), **agent) as process:
        assert process.stdout is not None
        while process.stdout.readline() not in ("importing\n", ""):
            pass
        process.send_signal(number)
        assert process.wait(LONG_S) == code
    sentence = f"stopped before training because {number.name} was received; no step was made"
    assert sentence in (tmp_path / "log").read_text()
    status = exit_status(tmp_path / "save")
    assert (status["code"], status["step"]) == (75, 0) and sentence in status["reason"]


def test_a_stop_while_a_rank_waits_for_the_others_leaves_its_status(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    argv = [str(SCRIPT), *words(MOCK, "--save", tmp_path / "save")]
    with _started(tmp_path / "log", argv, **place) as process:
        _wait_until(lambda: _accepts(port))
        process.send_signal(signal.SIGUSR1)
        assert process.wait(LONG_S) == 75
    assert exit_status(tmp_path / "save")["code"] == 75
    assert "stopped before training because SIGUSR1 was received" in (tmp_path / "log").read_text()


def test_a_terminal_that_closes_does_not_lose_the_steps(launcher: Launcher, tmp_path: Path) -> None:
    metrics, save = tmp_path / "metrics.jsonl", tmp_path / "save"
    with launcher.job(words(MOCK, "--train-iters 100000 --metrics-file", metrics, "--save", save)) as job:
        job.wait_for_step(metrics, 2)
        job.signal(signal.SIGHUP)
        assert job.wait() == [75]
    assert "because SIGHUP was received" in exit_status(save)["reason"]
    assert (save / "latest").read_text().strip() == f"iter_{exit_status(save)['step']:07d}"


def test_an_agent_that_dies_while_its_worker_saves_does_not_cut_off_the_save(tmp_path: Path) -> None:
    """The save takes longer than the time within which a second SIGTERM counts as a repeat of the first."""
    save, log = tmp_path / "save", tmp_path / "log"
    argv = [str(SLOW_SAVE), "4", *words(MOCK, "--train-iters 100000 --save", save)]
    out = ["-c", "import os, sys; os.dup2(2, 1); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"]
    with _started(log, ["-c", AGENT, sys.executable, *out, *argv], TORCHELASTIC_RUN_ID="test") as agent:
        assert agent.stdout is not None
        worker = int(agent.stdout.readline())
        try:
            _wait_until(lambda: "step 2/" in log.read_text())
            os.kill(worker, signal.SIGTERM)
            _wait_until(lambda: "saving takes" in log.read_text())
            time.sleep(2.2)
            agent.kill()
            _wait_until(lambda: not Path(f"/proc/{worker}").exists())
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
    assert "the elastic agent that started it is gone" in log.read_text()
    assert exit_status(save)["code"] == 75, log.read_text()
    assert (save / "latest").read_text().strip() == f"iter_{exit_status(save)['step']:07d}"
