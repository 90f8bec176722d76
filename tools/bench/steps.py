"""Times training steps of competitors that take turns: the part that compare.py and scaling.py have in common."""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from types import MappingProxyType

from tools.bench.peers.start import PeerFailed, RunningPeer, Turn
from tools.bench.peers.work import Peer, Work
from tools.bench.rounds import take_turns
from tools.bench.tables import processor_name

MEBI = 2**20
SHAPE = ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "vocab_size", "micro_batch")


@dataclass(frozen=True)
class Timed:
    """One competitor after all rounds.

    Attributes:
        seconds: the median step of each round.
        last: its last turn.
        num_parameters: of all its ranks together.
    """

    peer: Peer
    work: Work
    seconds: list[float]
    last: Turn
    num_parameters: int

    @property
    def tokens_per_s(self) -> float:
        """The median of the rounds."""
        return self.work.num_tokens / statistics.median(self.seconds)

    @property
    def best_tokens_per_s(self) -> float:
        """Of the fastest round."""
        return self.work.num_tokens / min(self.seconds)

    @property
    def peak_mebibytes(self) -> str:
        """Resident memory at its highest, of all ranks together, as tables show it."""
        return f"{self.last.peak_bytes / MEBI:,.0f}"


def time_steps(
    competitors: Mapping[str, tuple[Peer, Work]],
    *,
    num_rounds: int,
    num_steps: int,
    others: Mapping[str, Callable[[], float]] = MappingProxyType({}),
) -> tuple[dict[str, Timed], dict[str, list[float]], list[str]]:
    """Those that lived to the end, by their names, and the messages of those that failed.

    `others` take their turns between them, in ways of their own; the second result has their seconds.
    """
    running: dict[str, RunningPeer] = {}
    failures: list[str] = []
    last: dict[str, Turn] = {}

    def turn(name: str) -> float:
        last[name] = running[name].run_steps(num_steps)
        return statistics.median(last[name].seconds)

    try:
        for name, (peer, work) in competitors.items():
            try:
                running[name] = RunningPeer(peer, work)
            except PeerFailed as failure:
                failures.append(str(failure))
        seconds, failed = take_turns({name: partial(turn, name) for name in running} | dict(others), num_rounds)
    finally:
        for one in running.values():
            one.close()
    timed = {
        name: Timed(*competitors[name], times, last[name], running[name].num_parameters)
        for name, times in seconds.items()
        if name in running
    }
    return timed, {name: seconds[name] for name in others if name in seconds}, failures + failed


def split_installed(peers: list[Peer]) -> tuple[list[Peer], list[str]]:
    """The peers that are installed, and one note for each of the others."""
    absent = [peer for peer in peers if peer.version is None]
    return [peer for peer in peers if peer not in absent], [f"{p.name}: not installed; {p.install}" for p in absent]


def add_work_options(parser: argparse.ArgumentParser, *, threads: int, rounds: int, peers: tuple[Peer, ...]) -> None:
    """The options of the shape, of the rounds, and of who takes part."""
    shape = {f.name: f.default for f in fields(Work)}
    for name in SHAPE:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=shape[name], help=f"default {shape[name]}")
    parser.add_argument("--threads", type=int, default=threads, help=f"of each process (default {threads})")
    parser.add_argument("--dtype", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"], help="default both")
    parser.add_argument("--peers", nargs="+", help=f"default all: {' '.join(peer.name for peer in peers)}")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"default {rounds}")
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn (default 2)")
    parser.add_argument(
        "--timeout", type=float, default=shape["timeout_s"], help="seconds a peer may give no answer (default 300)"
    )
    parser.add_argument("--write", action="store_true", help="replace the tables of docs/benchmarks.md")


def work_of(args: argparse.Namespace, dtype: str) -> Work:
    """The work that the options describe, for one rank."""
    return Work(**{name: vars(args)[name] for name in (*SHAPE, "threads")}, dtype=dtype, timeout_s=args.timeout)


def describe(work: Work, num_rounds: int, num_steps: int) -> str:
    """The sentence above a table."""
    return (
        f"{work.num_layers} layers, hidden {work.hidden_size}, {work.num_attention_heads} heads, sequence "
        f"{work.seq_length}, vocabulary {work.vocab_size:,}, micro-batch {work.micro_batch}, {work.dtype}, "
        f"threads of a process {work.threads}, {os.cpu_count()} cores of {processor_name()}: medians of "
        f"{num_rounds} rounds of {num_steps} step{'s' * (num_steps != 1)}."
    )
