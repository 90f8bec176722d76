"""Random samples a second of a shuffled corpus beside peers, and the seconds until a process has its first ones."""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from megatron3d.data.indexed import IndexedDatasetWriter
from tools.bench.peers.start import RunningPeer
from tools.bench.peers.work import OURS, SAMPLES_PER_STEP, Peer, Work
from tools.bench.rounds import speed_ratio, take_turns
from tools.bench.steps import split_installed, time_steps
from tools.bench.tables import Table

COLUMNS = ("peer", "samples/s", "best", "megatron3d to it", "first start s", "later start s", "peak MiB")
MEAN_LENGTH = 500


def compare_samples(peers: list[Peer], work: Work, *, num_documents: int, num_rounds: int) -> tuple[Table, list[str]]:
    """The table, and one line for every peer that failed."""
    installed, notes = split_installed(peers)
    with tempfile.TemporaryDirectory() as directory:
        work = replace(work, corpus=str(Path(directory) / "corpus"), threads=1)
        write_corpus(work, num_documents)
        starts, failures = take_turns({peer.name: partial(_start_s, peer, work) for peer in installed}, 2)
        competitors = {peer.name: (peer, work) for peer in installed if peer.name in starts}
        timed, _, failed = time_steps(competitors, num_rounds=num_rounds, num_steps=1)
    caption = (
        f"{num_documents:,} documents of about {MEAN_LENGTH} tokens, sequence {work.seq_length}, one thread, files in "
        f"the page cache: medians of {num_rounds} rounds of {SAMPLES_PER_STEP:,} samples."
    )
    table = Table("samples", caption, COLUMNS)
    for name, one in timed.items():
        ratio = str(speed_ratio(timed[OURS].seconds, one.seconds)) if OURS in timed and name != OURS else ""
        rates = [SAMPLES_PER_STEP / value for value in one.seconds]
        cells = (f"{statistics.median(rates):,.0f}", f"{max(rates):,.0f}", ratio)
        first_s, later_s = starts[name]
        table.rows.append((name, *cells, f"{first_s:.2f}", f"{later_s:.2f}", one.peak_mebibytes))
    table.notes.extend(f"{name}: {one.peer.note}" for name, one in timed.items() if one.peer.note)
    table.notes.extend([*notes, *(f"failed: {failure}" for failure in failures + failed)])
    return table, failures + failed


def write_corpus(work: Work, num_documents: int) -> None:
    """Documents of random tokens with lengths of a log-normal law, in the format of .bin and .idx files."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(np.log(MEAN_LENGTH) - 0.5, 1.0, num_documents), 1, 20 * MEAN_LENGTH)
    with IndexedDatasetWriter(work.corpus, np.uint16) as writer:
        for length in lengths.astype(np.int64):
            writer.add_document(random.integers(work.vocab_size - 1, size=length, dtype=np.uint16))


def _start_s(peer: Peer, work: Work) -> float:
    began_s = time.perf_counter()
    RunningPeer(peer, work).close()
    return time.perf_counter() - began_s
