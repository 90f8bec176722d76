"""What the framework adds to a training step: this project beside its own kernels called on plain tensors."""

from __future__ import annotations

import statistics

from tools.bench.peers.work import BARE, OURS, PEERS, Work
from tools.bench.rounds import speed_ratio
from tools.bench.steps import describe, time_steps
from tools.bench.tables import Table

COLUMNS = ("what", "ms a step", "fastest", "time to that of the bare kernels")


def compare_overhead(work: Work, *, num_rounds: int, num_steps: int) -> tuple[Table, list[str]]:
    """The table of one precision, and one line for each of the two that failed."""
    (ours,) = (peer for peer in PEERS if peer.name == OURS)
    timed, failures = time_steps(
        {BARE.name: (BARE, work), OURS: (ours, work)}, num_rounds=num_rounds, num_steps=num_steps
    )
    table = Table(f"overhead {work.dtype}", describe(work, num_rounds, num_steps), COLUMNS)
    for name, one in timed.items():
        ratio = str(speed_ratio(timed[BARE.name].seconds, one.seconds)) if BARE.name in timed and name == OURS else ""
        median, fastest = (f"{1e3 * pick(one.seconds):,.0f}" for pick in (statistics.median, min))
        table.rows.append((name, median, fastest, ratio))
    table.notes.extend(f"failed: {failure}" for failure in failures)
    return table, failures
