"""This project beside its peers, the same work in interleaved rounds: one command makes docs/benchmarks.md's tables.

    python -m tools.bench.compare                              print them
    python -m tools.bench.compare --write                      put them into docs/benchmarks.md too
    python -m tools.bench.compare --dtype bf16 --peers torch megatron3d --rounds 3

Every peer is a process of its own, so that its peak memory is its own and its crash ends nobody else; the peers take
turns. One that is not installed is named with the line that installs it. What is equal: tokens, shape, dropout 0, no
clipping, the exact GELU, AdamW. Run it on a machine that does nothing else. Several ranks: scaling.py.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from tools.bench.peers.work import OURS, PEERS, Peer, Work, find_peers
from tools.bench.rounds import speed_ratio
from tools.bench.steps import add_work_options, describe, split_installed, time_steps, work_of
from tools.bench.tables import Table, write_tables

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
COLUMNS = ("peer", "version", "tokens/s", "best", "megatron3d to it", "peak MiB", "M parameters")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_work_options(p, threads=2, rounds=5, peers=PEERS)
    return p


def main() -> int:
    """Measure, print, and write the page where asked; 1 if a peer failed."""
    args = parser().parse_args()
    try:
        peers = find_peers(args.peers)
    except ValueError as error:
        parser().error(str(error))
    tables, failures = [], []
    for dtype in args.dtype:
        table, failed = compare_steps(peers, work_of(args, dtype), num_rounds=args.rounds, num_steps=args.steps)
        print(table, flush=True)
        tables.append(table)
        failures += failed
    for failure in failures:
        print(failure, file=sys.stderr)
    if args.write:
        write_tables(PAGE, tables)
    return 1 if failures else 0


def compare_steps(peers: list[Peer], work: Work, *, num_rounds: int, num_steps: int) -> tuple[Table, list[str]]:
    """The table of training steps in one precision, and one line for every peer that failed."""
    installed, notes = split_installed(peers)
    competitors = {peer.name: (peer, replace(work, compiled=peer.compiled)) for peer in installed}
    timed, failures = time_steps(competitors, num_rounds=num_rounds, num_steps=num_steps)
    table = Table(f"step {work.dtype}", describe(work, num_rounds, num_steps), COLUMNS)
    for name, one in timed.items():
        ratio = str(speed_ratio(timed[OURS].seconds, one.seconds)) if OURS in timed and name != OURS else ""
        rates = (f"{one.tokens_per_s:,.0f}", f"{one.best_tokens_per_s:,.0f}")
        size = f"{one.num_parameters / 1e6:.2f}"
        table.rows.append((name, str(one.peer.version), *rates, ratio, one.peak_mebibytes, size))
    table.notes.extend(f"{name}: {one.peer.note}" for name, one in timed.items() if one.peer.note)
    table.notes.extend([*notes, *(f"failed: {failure}" for failure in failures)])
    return table, failures


if __name__ == "__main__":
    sys.exit(main())
