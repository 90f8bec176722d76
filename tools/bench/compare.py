"""This project beside its peers, the same work in interleaved rounds: one command makes docs/benchmarks.md's tables.

    python -m tools.bench.compare                              print them
    python -m tools.bench.compare --write                      put them into docs/benchmarks.md too
    python -m tools.bench.compare --what step --dtype bf16 --peers torch megatron3d --rounds 3

Every peer is a process of its own, so that its peak memory is its own and its crash ends nobody else; the peers take
turns. One that is not installed is named with the line that installs it, one that crashes or hangs with its last
message. What is equal: tokens, shape, dropout 0, no clipping, the exact GELU, AdamW. Run it on a machine that does
nothing else. Several ranks: scaling.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tools.bench.checkpoint import compare_checkpoints, compare_stalls
from tools.bench.expert_step import compare_experts
from tools.bench.overhead import compare_overhead
from tools.bench.peers.start import exit_when_terminated
from tools.bench.peers.work import (
    OURS,
    PEERS,
    PEERS_OF_BERT,
    PEERS_OF_SAMPLES,
    PEERS_ON_RANKS,
    Peer,
    Work,
    find_peers,
)
from tools.bench.rounds import speed_ratio
from tools.bench.samples import compare_samples
from tools.bench.startup import add_startup, startup_table
from tools.bench.steps import add_work_options, describe, split_installed, time_steps, work_of
from tools.bench.tables import Table, write_tables

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
COLUMNS = ("peer", "version", "tokens/s", "best", "megatron3d to it", "peak MiB", "M parameters")
WHAT = ("step", "bert", "overhead", "experts", "samples", "startup", "checkpoint")
BERT = {"seq_length": 128, "micro_batch": 16, "vocab_size": 30522}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_work_options(p, threads=2, rounds=5, peers=PEERS)
    p.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT), help="default all")
    p.add_argument("--megabytes", type=int, default=1000, help="of a checkpoint (default 1000)")
    p.add_argument("--documents", type=int, default=100_000, help="of the corpus of samples (default 100,000)")
    return p


def main() -> int:
    """Measure, print, and write the page where asked; 1 if a peer failed."""
    args = parser().parse_args()
    exit_when_terminated()
    try:
        peers = find_peers(args.peers, PEERS + PEERS_ON_RANKS)
    except ValueError as error:
        parser().error(str(error))
    tables, failures = [], []
    for table, failed in measure(args, [peer.name for peer in peers]):
        print(table, end="\n\n", flush=True)
        tables.append(table)
        failures += failed
    for failure in failures:
        print(failure, file=sys.stderr)
    if args.write:
        write_tables(PAGE, tables)
    return 1 if failures else 0


def measure(args: argparse.Namespace, names: list[str]) -> Iterator[tuple[Table, list[str]]]:
    """The tables that were asked for, each with the messages of the peers that failed in it."""
    rounds = {"num_rounds": args.rounds}
    if "step" in args.what:
        for dtype in args.dtype:
            yield compare_steps(named(names, PEERS), work_of(args, dtype), **rounds, num_steps=args.steps)
    if "bert" in args.what:
        for dtype in args.dtype:
            peers, work = named(names, PEERS_OF_BERT), replace(work_of(args, dtype), **BERT)
            yield compare_steps(peers, work, **rounds, num_steps=args.steps, model="bert")
    if "overhead" in args.what:
        for dtype in args.dtype:
            yield compare_overhead(work_of(args, dtype), **rounds, num_steps=args.steps)
    if "experts" in args.what:
        for dtype in args.dtype:
            yield compare_experts(work_of(args, dtype), **rounds, num_steps=args.steps)
    if "samples" in args.what:
        peers = named(names, PEERS_OF_SAMPLES)
        yield compare_samples(peers, work_of(args, "fp32"), **rounds, num_documents=args.documents)
    if "startup" in args.what:
        table = startup_table(args.rounds)
        one = [peer for peer in named(names, PEERS) if not peer.compiled]
        two = [peer for peer in named(names, PEERS_ON_RANKS) if "dp" in peer.layouts]
        options = {"timeout_s": args.timeout}
        failed = add_startup(table, one, 1, args.rounds, **options)
        yield table, failed + add_startup(table, two, 2, args.rounds, **options)
    if "checkpoint" in args.what:  # last, in this process: its memory counts in none of the others
        yield compare_checkpoints(args.megabytes, **rounds), []
        yield compare_stalls(args.megabytes, **rounds), []


def named(names: list[str], peers: tuple[Peer, ...]) -> list[Peer]:
    """Those of the peers that have one of the names."""
    return [peer for peer in peers if peer.name in names]


def compare_steps(
    peers: list[Peer], work: Work, *, num_rounds: int, num_steps: int, model: str = "step"
) -> tuple[Table, list[str]]:
    """The table of training steps in one precision, and one line for every peer that failed; `model` begins its key."""
    installed, notes = split_installed(peers)
    competitors = {peer.name: (peer, replace(work, compiled=peer.compiled)) for peer in installed}
    timed, _, failures = time_steps(competitors, num_rounds=num_rounds, num_steps=num_steps)
    table = Table(f"{model} {work.dtype}", describe(work, num_rounds, num_steps), COLUMNS)
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
