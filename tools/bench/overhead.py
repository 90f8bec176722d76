"""What the framework adds to a training step: this project beside its own kernels called on plain tensors.

The command line is what users run: pretrain_gpt.py with its data, logs and metrics file. Each of its turns is a run of
its own, whose seconds a step come from the times in its metrics file, so that nothing between two steps is left out.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

from tools.bench.peers.megatron3d_flags import flags_of
from tools.bench.peers.start import PeerFailed, RankProcesses
from tools.bench.peers.work import BARE, OURS, PEERS, Work
from tools.bench.rounds import speed_ratio
from tools.bench.startup import SCRIPT
from tools.bench.steps import describe, time_steps
from tools.bench.tables import Table

COLUMNS = ("what", "ms a step", "fastest", "time to that of the bare kernels")
COMMAND = "pretrain_gpt.py"
_STARTING_STEPS = 2  # of a run, whose times are not counted


def compare_overhead(work: Work, *, num_rounds: int, num_steps: int) -> tuple[Table, list[str]]:
    """The table of one precision, and one line for each of the three that failed."""
    (ours,) = (peer for peer in PEERS if peer.name == OURS)
    timed, others, failures = time_steps(
        {BARE.name: (BARE, work), OURS: (ours, work)},
        num_rounds=num_rounds,
        num_steps=num_steps,
        others={COMMAND: partial(step_of_command_s, work, num_steps=num_steps)},
    )
    table = Table(f"overhead {work.dtype}", describe(work, num_rounds, num_steps), COLUMNS)
    seconds = {name: one.seconds for name, one in timed.items()} | others
    for name, times in seconds.items():
        ratio = str(speed_ratio(seconds[BARE.name], times)) if BARE.name in seconds and name != BARE.name else ""
        median, fastest = (f"{1e3 * pick(times):,.0f}" for pick in (statistics.median, min))
        table.rows.append((name, median, fastest, ratio))
    table.notes.extend(f"failed: {failure}" for failure in failures)
    return table, failures


def step_of_command_s(work: Work, *, num_steps: int) -> float:
    """The median of the seconds from the end of one step to the end of the next in a run of pretrain_gpt.py.

    Raises:
        PeerFailed: the run failed, or printed nothing for as long as the work allows.
    """
    with tempfile.TemporaryDirectory() as directory:
        metrics = Path(directory) / "metrics.jsonl"
        options = {"--metrics-file": metrics, "--log-interval": 1, "--eval-iters": 0}
        flags = [word for name, value in options.items() for word in (name, str(value))]
        steps = _STARTING_STEPS + num_steps
        command = [
            sys.executable,
            str(SCRIPT),
            *flags_of(replace(work, corpus="")),
            *flags,
            "--train-iters",
            str(steps),
        ]
        processes = RankProcesses(COMMAND, command, work)
        try:
            while f"step {steps}/{steps} | loss" not in processes.read_line(0):
                pass
            return median_step_s(metrics)
        finally:
            processes.close()


def median_step_s(metrics: Path) -> float:
    """The same of a metrics file, without its first steps.

    Raises:
        PeerFailed: it has no others.
    """
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    ends = [record["wall_s"] for record in records if "loss" in record and "wall_s" in record]
    if len(ends) <= _STARTING_STEPS:
        raise PeerFailed(f"{COMMAND}: its metrics file has the times of {len(ends)} steps alone")
    return statistics.median(b - a for a, b in zip(ends[_STARTING_STEPS - 1 :], ends[_STARTING_STEPS:], strict=False))
