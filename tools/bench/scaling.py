"""Training steps on 1, 2 and 4 ranks of one machine, beside peers in the same layout, with the bytes that ranks send.

    python -m tools.bench.scaling                       print
    python -m tools.bench.scaling --write               put the tables into docs/benchmarks.md too
    python -m tools.bench.scaling --ranks 2 --layouts tp tp_sp --dtype bf16

A step takes as many micro-batches as there are ranks, in every layout: data parallelism gives each rank one, tensor
parallelism works through them, and a pipeline cuts each into four. Peers of one layout take turns, as in compare.py.
With fewer cores than ranks, times say how much the layouts cost and nothing about how they scale; bytes are counted by
the collectives themselves and do not depend on the machine.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from tools.bench.compare import PAGE
from tools.bench.peers.start import exit_when_terminated
from tools.bench.peers.work import LAYOUTS, OURS, PEERS, PEERS_ON_RANKS, Peer, Work, find_peers
from tools.bench.rounds import speed_ratio
from tools.bench.steps import MEBI, Timed, add_work_options, describe, split_installed, time_steps, work_of
from tools.bench.tables import Table, write_tables

# Layouts that are compared with each other. Sequence parallelism is there to save memory: it competes with tensor
# parallelism alone, which is what megatron-core's layers in plain torch do.
FAMILIES = (("dp",), ("zero1",), ("zero2",), ("zero3",), ("tp", "tp_sp"), ("pp",))
COLUMNS = ("ranks", "layout", "peer", "tokens/s", "to the best peer", "peak MiB", "MiB sent by a rank in a step")
SHOWN_BYTES = 0.01 * MEBI  # counts and norms that are reduced beside gradients and activations are left out


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_work_options(p, threads=1, rounds=3, peers=PEERS_ON_RANKS)
    p.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="default 1 2 4")
    p.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="default all")
    return p


def main() -> int:
    """Measure, print, and write the page where asked; 1 if a peer failed."""
    args = parser().parse_args()
    exit_when_terminated()
    try:
        names = [peer.name for peer in find_peers(args.peers, PEERS_ON_RANKS)]
    except ValueError as error:
        parser().error(str(error))
    tables, failures = [], []
    for dtype in args.dtype:
        work = work_of(args, dtype)
        table = Table(f"scaling {dtype}", describe(work, args.rounds, args.steps), COLUMNS)
        for ranks in args.ranks:
            for family in FAMILIES if ranks > 1 else (("dp",),):
                chosen = [replace(work, ranks=ranks, layout=one) for one in family if one in args.layouts]
                options = {"num_rounds": args.rounds, "num_steps": args.steps}
                failures += add_family(table, peers_for(names, ranks), chosen, **options)
        print(table, flush=True)
        tables.append(table)
    for failure in failures:
        print(failure, file=sys.stderr)
    if args.write:
        write_tables(PAGE, tables)
    return 1 if failures else 0


def peers_for(names: list[str], ranks: int) -> list[Peer]:
    """The peers of these names: in one process without their wrappers for several."""
    alone = {peer.name: peer for peer in PEERS}
    found = find_peers(names, PEERS_ON_RANKS)
    return [alone.get(peer.name, peer) for peer in found] if ranks == 1 else found


def add_family(table: Table, peers: list[Peer], works: list[Work], *, num_rounds: int, num_steps: int) -> list[str]:
    """Time all peers in these layouts against each other and add their rows; messages of those that failed."""
    installed, notes = split_installed(peers)
    competitors = {
        f"{work.layout} {peer.name}": (peer, work)
        for work in works
        for peer in installed
        if work.ranks == 1 or work.layout in peer.layouts
    }
    timed, _, failures = time_steps(competitors, num_rounds=num_rounds, num_steps=num_steps)
    others = [one for one in timed.values() if one.peer.name != OURS]
    best = max(others, key=lambda one: one.tokens_per_s, default=None)
    for one in timed.values():
        table.rows.append(_row(one, str(speed_ratio(one.seconds, best.seconds)) if best not in (None, one) else ""))
    notes += [f"{one.peer.name}: {one.peer.note}" for one in timed.values() if one.peer.note]
    notes += [f"failed: {failure}" for failure in failures]
    table.notes.extend(note for note in dict.fromkeys(notes) if note not in table.notes)
    return failures


def _row(one: Timed, ratio: str) -> tuple[str, ...]:
    layout = one.work.layout.replace("_", " + ") if one.work.ranks > 1 else "one process"
    sent = {name: count for name, count in one.last.sent_bytes.items() if count >= SHOWN_BYTES}
    shown = ", ".join(f"{name} {count / MEBI:.2f}" for name, count in sent.items())
    return (str(one.work.ranks), layout, one.peer.name, f"{one.tokens_per_s:,.0f}", ratio, one.peak_mebibytes, shown)


if __name__ == "__main__":
    sys.exit(main())
