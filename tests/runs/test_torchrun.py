"""What only torchrun shows: restarts, stops that are no failures, signals to the agent, its report."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.runs.elastic import Elastic, children, torchrun
from tests.runs.harness import MOCK, ROOT, Launcher, exit_status, losses, run_ok, words

SLOW_SAVE = Path(__file__).with_name("slow_save.py")
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
# Every Python process that finds this file waits before it does anything, if it is the rank to be late.
LATE_RANK_0 = """
import os, time
if os.environ.get("RANK") == "0":
    time.sleep(2.5)
"""


def test_a_wrong_option_is_printed_once_though_rank_0_comes_seconds_after_the_others_and_is_killed(
    tmp_path: Path,
) -> None:
    (tmp_path / "sitecustomize.py").write_text(LATE_RANK_0)
    path = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "kernels")])
    argv = words(MOCK, "--num-attention-heads 2 --tensor-model-parallel-size 4")
    logs = ["--nproc-per-node", "4", "--log-dir", str(tmp_path / "logs")]
    with torchrun(tmp_path / "log.txt", logs, argv, PYTHONPATH=path) as job:
        assert job.wait() == 1
    wrong = "--num-attention-heads 2 is not a multiple of --tensor-model-parallel-size 4"
    assert re.findall(r"^.*not a multiple.*$", job.said, re.MULTILINE) == [
        line for line in job.said.splitlines() if line.startswith(f"error: {wrong}")
    ], job.said
    assert job.said.count(wrong) == 1
    assert re.search(r"\(local_rank: 0\)\s+exitcode  : -15 ", job.said), f"rank 0 was not killed:\n{job.said}"
    assert "traceback : ConfigError on rank" in job.said
    reports = [json.loads(path.read_text()) for path in (tmp_path / "logs").rglob("error.json")]
    assert 1 <= len(reports) <= 3
    assert all(wrong in report["message"]["message"] for report in reports)


def test_a_killed_worker_is_replaced_and_a_stop_that_was_asked_for_ends_the_job_though_restarts_are_left(
    launcher: Launcher, tmp_path: Path
) -> None:
    common = words(MOCK, "--pipeline-model-parallel-size 2 --train-iters 60 --exit-interval 40")
    common += words("--save-interval 7 --keep-last 2")
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    with launcher.job([*common, *words("--metrics-file", whole, "--save", tmp_path / "other")], 2) as job:
        assert job.wait() == [75, 75]
    argv = [*common, *words("--metrics-file", killed, "--save", tmp_path / "save")]
    with torchrun(tmp_path / "log.txt", ["--nproc-per-node", "2", "--max-restarts", "3"], argv) as elastic:
        elastic.wait_for("step 10/60")
        os.kill(elastic.workers()[-1], signal.SIGKILL)
        assert elastic.wait() == 0, elastic.said
    assert elastic.said.count("starting from the initial weights") == 1
    # Every attempt begins with the table of options. Without keys of its own in the store the first restart fails, in
    # which new workers connect to dead ones.
    assert len(re.findall("^model$", elastic.said, re.MULTILINE)) == 2, f"one restart is enough:\n{elastic.said}"
    assert losses(killed) == losses(whole)
    assert elastic.said.count("stopped after step 40 because --exit-interval 40 is over") == 1
    status = exit_status(tmp_path / "save")
    assert (status["code"], status["step"]) == (75, 40)
    assert (tmp_path / "save" / "latest").read_text().strip() == "iter_0000040"


def test_workers_whose_agent_is_killed_save_and_stop(tmp_path: Path) -> None:
    save = tmp_path / "save"
    argv = words(MOCK, "--train-iters 100000 --log-interval 1 --save", save)
    with torchrun(tmp_path / "log.txt", ["--nproc-per-node", "2"], argv) as job:
        job.wait_for("step 3/")
        workers = job.workers()
        os.kill(job.process.pid, signal.SIGKILL)
        assert job.wait() == -signal.SIGKILL
        try:
            deadline = time.monotonic() + 30
            while left := [pid for pid in workers if Path(f"/proc/{pid}").exists()]:
                assert time.monotonic() < deadline, f"{left} still run:\n{job.said}"
                time.sleep(0.05)
        finally:
            for pid in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    assert "the elastic agent that started it is gone" in job.said, "one rank that notices is enough to stop all"
    assert exit_status(save)["code"] == 75
    assert (save / "latest").read_text().strip() == f"iter_{exit_status(save)['step']:07d}"


def _stopped_by_a_signal_to_the_agent(folder: Path, number: int, *, save_s: float, timeout_s: int) -> None:
    save = folder / "save"
    argv = [f"{save_s:g}", *words(MOCK, "--train-iters 100000 --log-interval 1 --save", save)]
    options = words(f"--nproc-per-node 2 --shutdown-timeout {timeout_s} --max-restarts 2 --signals-to-handle {SIGNALS}")
    with torchrun(folder / "log.txt", options, argv, script=SLOW_SAVE) as job:
        job.wait_for("step 3/")
        began_s = time.monotonic()
        os.kill(job.process.pid, number)
        assert job.wait(timeout_s=save_s + 60) == 1, "torch's agent calls a signal a failure of its own"
        assert time.monotonic() - began_s > save_s
    assert job.said.count("stopped after step") == 1, job.said
    assert f"because {signal.Signals(number).name} was received" in job.said
    status = exit_status(save)
    assert status["code"] == 75, status
    step = f"iter_{status['step']:07d}"
    assert (save / "latest").read_text().strip() == step
    few = run_ok(MOCK, f"--train-iters {status['step'] + 1} --save", save)
    assert f"starting from {save}/{step}" in few.out


@pytest.mark.slow
def test_a_signal_to_the_agent_leaves_time_for_the_save(tmp_path: Path) -> None:
    """SIGTERM here, of which the agent makes what it makes of SIGUSR1; that is what the Slurm example gets below."""
    _stopped_by_a_signal_to_the_agent(tmp_path, signal.SIGTERM, save_s=2.5, timeout_s=60)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["SIGTERM", "SIGUSR1"])
def test_a_save_that_takes_longer_than_torchs_thirty_seconds_is_whole(tmp_path: Path, number: int) -> None:
    _stopped_by_a_signal_to_the_agent(tmp_path, number, save_s=45, timeout_s=120)


# Slurm on one node: srun runs the task here, scontrol answers and writes down what it was asked; torchrun is torchrun
# with the example's own flags for stopping, on a model that fits.
SRUN = '#!/usr/bin/env bash\n"$@"\n'
SCONTROL = '#!/usr/bin/env bash\nif [ "$1" = show ]; then echo localhost; else echo "$@" >> "$CALLS"; fi\n'
TORCHRUN_STUB = """#!/usr/bin/env bash
kept=()
while [ "$1" != pretrain_gpt.py ]; do
    case $1 in --max-restarts|--shutdown-timeout|--signals-to-handle) kept+=("$1" "$2");; esac
    shift
done
echo $$ > "$PID_FILE"
exec {python} {launcher} --standalone --nproc-per-node 2 "${{kept[@]}}" {slow_save} 1 {flags}
"""


@pytest.mark.parametrize(
    ("number", "requeues"),
    [(signal.SIGUSR1, True), pytest.param(signal.SIGTERM, False, marks=pytest.mark.slow)],
    ids=["limit", "scancel"],
)
def test_the_slurm_example_saves_and_requeues_itself_before_its_limit_and_not_after_scancel(
    tmp_path: Path, number: int, requeues: bool
) -> None:
    """Slurm signals every process of a step: torchrun and its workers, which get it once more from torchrun."""
    save, pid_file = tmp_path / "save", tmp_path / "pid"
    flags = " ".join([*words(MOCK, "--train-iters 100000 --log-interval 1 --save", save)])
    # As the example says of older versions of torch.
    launcher = "-m torch.distributed.run" if torch.__version__ >= "2.13" else str(ROOT / "tools" / "torchrun.py")
    stub = TORCHRUN_STUB.format(python=sys.executable, launcher=launcher, slow_save=SLOW_SAVE, flags=flags)
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "torchrun": stub}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    place = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "OMP_NUM_THREADS": "1",
        "CALLS": str(tmp_path / "calls"),
        "PID_FILE": str(pid_file),
        **dict.fromkeys(("DATA", "VOCAB", "MERGES"), "unused"),
        **{"CHECKPOINTS": str(save), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1"},
    }
    log = tmp_path / "log.txt"
    with log.open("wb") as output:
        script = ["bash", str(ROOT / "examples" / "gpt3_175b_slurm.sh")]
        process = subprocess.Popen(script, env=place, stdout=output, stderr=output, cwd=ROOT)
    step = Elastic(process, log)
    try:
        step.wait_for("step 3/")
        agent = int(pid_file.read_text())
        for pid in [*children(agent), agent]:
            os.kill(pid, number)
        assert step.wait() == 1
    finally:
        process.kill()
    assert exit_status(save)["code"] == 75, step.said
    calls = (tmp_path / "calls").read_text() if requeues else ""
    assert calls == ("requeue 7\n" if requeues else "")
    assert (tmp_path / "calls").exists() is requeues
