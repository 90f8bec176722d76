"""This project beside its peers, the same work in interleaved rounds: one command makes docs/benchmarks.md's tables.

    python -m tools.bench.compare                              print them
    python -m tools.bench.compare --write                      put them into docs/benchmarks.md too
    python -m tools.bench.compare --dtype bf16 --peers torch megatron3d --rounds 3

Every peer is a process of its own, so that its peak memory is its own and its crash ends nobody else; the peers take
turns. One that is not installed is named with the line that installs it. What is equal: tokens, shape, dropout 0, no
clipping, the exact GELU, AdamW. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

from tools.bench.peers.start import PeerFailed, RunningPeer, Turn
from tools.bench.peers.work import OURS, PEERS, Peer, Work, find_peers
from tools.bench.rounds import speed_ratio, take_turns
from tools.bench.tables import Table, processor_name, write_tables

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
MEBI = 2**20
STEP_COLUMNS = ("peer", "version", "tokens/s", "best", "megatron3d to it", "peak MiB", "M parameters")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = {f.name: f.default for f in fields(Work)}
    for name in ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "vocab_size", "micro_batch"):
        p.add_argument(f"--{name.replace('_', '-')}", type=int, default=shape[name], help=f"default {shape[name]}")
    p.add_argument("--threads", type=int, default=shape["threads"], help="of each process (default 2)")
    p.add_argument("--dtype", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"], help="default both")
    p.add_argument("--peers", nargs="+", help=f"default all: {' '.join(peer.name for peer in PEERS)}")
    p.add_argument("--rounds", type=int, default=5, help="default 5")
    p.add_argument("--steps", type=int, default=2, help="steps of a turn (default 2)")
    p.add_argument("--write", action="store_true", help="replace the tables of docs/benchmarks.md")
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
        shape = {f.name: vars(args)[f.name] for f in fields(Work) if f.name in vars(args)}
        table, failed = compare_steps(peers, Work(**shape | {"dtype": dtype}), args.rounds, args.steps)
        print(table, flush=True)
        tables.append(table)
        failures += failed
    for failure in failures:
        print(failure, file=sys.stderr)
    if args.write:
        write_tables(PAGE, tables)
    return 1 if failures else 0


def compare_steps(peers: list[Peer], work: Work, num_rounds: int, num_steps: int) -> tuple[Table, list[str]]:
    """The table of training steps in one precision, and one line for every peer that failed."""
    table = Table(f"step {work.dtype}", _caption(work, num_rounds, num_steps), STEP_COLUMNS)
    running, failures = start_peers(peers, work, table)
    last: dict[str, Turn] = {}
    try:
        turns = {name: partial(_turn, one, num_steps, last) for name, one in running.items()}
        seconds, failed = take_turns(turns, num_rounds)
    finally:
        for one in running.values():
            one.close()
    failures += failed
    for name, times in seconds.items():
        rates = [work.num_tokens / value for value in times]
        ratio = str(speed_ratio(seconds[OURS], times)) if OURS in seconds and name != OURS else ""
        peer, memory = running[name].peer, f"{last[name].peak_bytes / MEBI:,.0f}"
        cells = (f"{statistics.median(rates):,.0f}", f"{max(rates):,.0f}", ratio, memory)
        table.rows.append((name, str(peer.version), *cells, f"{running[name].num_parameters / 1e6:.2f}"))
        table.notes.extend([f"{name}: {peer.note}"] if peer.note else [])
    table.notes.extend(f"failed: {failure}" for failure in failures)
    return table, failures


def start_peers(peers: list[Peer], work: Work, table: Table) -> tuple[dict[str, RunningPeer], list[str]]:
    """Those of the peers that run, by name; the table notes those not installed, and failures are returned."""
    running: dict[str, RunningPeer] = {}
    failures = []
    for peer in peers:
        if peer.version is None:
            table.notes.append(f"{peer.name}: not installed; {peer.install}")
            continue
        try:
            running[peer.name] = RunningPeer(peer, replace(work, compiled=peer.compiled))
        except PeerFailed as failure:
            failures.append(str(failure))
    return running, failures


def _turn(running: RunningPeer, num_steps: int, last: dict[str, Turn]) -> float:
    last[running.peer.name] = turn = running.run_steps(num_steps)
    return statistics.median(turn.seconds)


def _caption(work: Work, num_rounds: int, num_steps: int) -> str:
    return (
        f"{work.num_layers} layers, hidden {work.hidden_size}, {work.num_attention_heads} heads, sequence "
        f"{work.seq_length}, vocabulary {work.vocab_size:,}, micro-batch {work.micro_batch}, {work.dtype}, "
        f"{work.threads} threads of {os.cpu_count()} on {processor_name()}: medians of {num_rounds} rounds of "
        f"{num_steps} steps."
    )


if __name__ == "__main__":
    sys.exit(main())
