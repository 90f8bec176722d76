"""Seconds from the start of a process to its first loss, beside peers: imports, building, one step of a tiny model.

This project is started as a user does, by pretrain_gpt.py, until its first line with a loss; peers by the process that
also serves their steps, until they have one. Files are in the page cache after the first round, which is not counted.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from tools.bench.peers.megatron3d_flags import flags_of
from tools.bench.peers.start import RankProcesses, RunningPeer
from tools.bench.peers.work import OURS, Peer, Work
from tools.bench.rounds import speed_ratio, take_turns
from tools.bench.steps import split_installed
from tools.bench.tables import Table

TINY = Work(
    num_layers=2, hidden_size=64, num_attention_heads=2, seq_length=32, vocab_size=512, micro_batch=2, threads=1
)
COLUMNS = ("ranks", "peer", "seconds to the first loss", "fastest", "time of megatron3d to it")
SCRIPT = Path(__file__).resolve().parents[2] / "pretrain_gpt.py"
FIRST_LOSS = "step 1/1 | loss"


def startup_table(num_rounds: int) -> Table:
    """An empty table, for `add_startup`."""
    caption = f"2 layers, hidden 64, fp32, one thread of each process: medians of {num_rounds} rounds."
    return Table("startup", caption, COLUMNS)


def add_startup(table: Table, peers: list[Peer], ranks: int, num_rounds: int, *, timeout_s: float) -> list[str]:
    """Add the rows of one number of data-parallel ranks; messages of those that failed."""
    work = replace(TINY, ranks=ranks, timeout_s=timeout_s)
    installed, notes = split_installed(peers)
    turns = {peer.name: partial(first_loss_after_s, peer, replace(work, compiled=peer.compiled)) for peer in installed}
    seconds, failures = take_turns(turns, num_rounds + 1)
    counted = {name: times[1:] for name, times in seconds.items()}
    for name, times in counted.items():
        ratio = str(speed_ratio(times, counted[OURS])) if OURS in counted and name != OURS else ""
        table.rows.append((str(ranks), name, f"{statistics.median(times):.2f}", f"{min(times):.2f}", ratio))
    notes += [f"failed: {failure}" for failure in failures]
    table.notes.extend(note for note in dict.fromkeys(notes) if note not in table.notes)
    return failures


def first_loss_after_s(peer: Peer, work: Work) -> float:
    """Start the processes of one competitor, wait for their first loss, end them.

    Raises:
        PeerFailed: one ended before, or gave no answer in time.
    """
    began_s = time.perf_counter()
    if peer.name != OURS:
        RunningPeer(peer, work).close()
        return time.perf_counter() - began_s
    command = [sys.executable, str(SCRIPT), *flags_of(work), "--log-interval", "1", "--eval-iters", "0"]
    processes = RankProcesses(peer.name, command, work)
    try:
        while FIRST_LOSS not in processes.read_line(0):
            pass
        return time.perf_counter() - began_s
    finally:
        processes.close()
