"""What a mixture of experts costs beside a dense model of as many operations a token, both by this project.

Experts are narrower than the dense MLP by the number that a token passes, so both make products of the same size in
all. What remains is what experts cost: the router, rows there and back, products of fewer rows each, and an optimizer
with more weights. The load is forced to be even, so these are no figures of training.
"""

from __future__ import annotations

import statistics
from dataclasses import replace

from tools.bench.peers.work import OURS, PEERS, Work
from tools.bench.rounds import speed_ratio
from tools.bench.steps import describe, time_steps
from tools.bench.tables import Table

COLUMNS = ("model", "ms a step", "fastest", "time to that of the dense model", "M parameters")
EXPERTS, CHOSEN = 8, 2
DENSE, MIXTURE = "dense", f"{EXPERTS} experts, top {CHOSEN}"


def compare_experts(work: Work, *, num_rounds: int, num_steps: int) -> tuple[Table, list[str]]:
    """The table of one precision, and one line for each of the two that failed."""
    (ours,) = (peer for peer in PEERS if peer.name == OURS)
    timed, _, failures = time_steps(
        {DENSE: (ours, work), MIXTURE: (ours, replace(work, options=options_of(work)))},
        num_rounds=num_rounds,
        num_steps=num_steps,
    )
    table = Table(f"experts {work.dtype}", describe(work, num_rounds, num_steps), COLUMNS)
    for name, one in timed.items():
        ratio = str(speed_ratio(timed[DENSE].seconds, one.seconds)) if DENSE in timed and name != DENSE else ""
        median, fastest = (f"{1e3 * pick(one.seconds):,.0f}" for pick in (statistics.median, min))
        table.rows.append((name, median, fastest, ratio, f"{one.num_parameters / 1e6:.2f}"))
    table.notes.append("routing forced to an even load (--moe-router-force-load-balancing)")
    table.notes.extend(f"failed: {failure}" for failure in failures)
    return table, failures


def options_of(work: Work) -> str:
    """Experts whose chosen ones together are as wide as the MLP of this model."""
    width = 4 * work.hidden_size // CHOSEN
    return (
        f"--num-experts {EXPERTS} --moe-router-topk {CHOSEN} --moe-ffn-hidden-size {width} "
        "--moe-router-force-load-balancing"
    )
