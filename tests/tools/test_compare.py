"""tools/bench/compare.py with models that take no time: the tables' form, and that a failure costs only its own row."""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron3d.errors import DataError
from tools.bench import compare, scaling
from tools.bench.checkpoint import compare_checkpoints, compare_stalls
from tools.bench.overhead import compare_overhead, median_step_s
from tools.bench.peers import megatron3d_samples, torch_samples
from tools.bench.peers.start import PeerFailed
from tools.bench.peers.work import LAYOUTS, PEERS_OF_BERT, Peer, Work, find_peers
from tools.bench.rounds import TurnFailed, speed_ratio, take_turns
from tools.bench.samples import write_corpus
from tools.bench.startup import first_loss_after_s
from tools.bench.tables import Table, write_tables

TINY = Work(
    num_layers=2, hidden_size=32, num_attention_heads=2, seq_length=16, vocab_size=128, micro_batch=2, threads=1
)
CRASHING = Peer("crashing", "tests.tools.crashing_peer", "torch", "nothing")
ABSENT = Peer("absent", "no.module", "no-such-distribution", "pip install no-such-distribution")


@pytest.mark.heavy
def test_two_peers_have_rows_and_those_that_crash_or_are_absent_are_named() -> None:
    peers = [*find_peers(["torch", "megatron3d"]), CRASHING, ABSENT]
    table, failures = compare.compare_steps(peers, TINY, num_rounds=1, num_steps=1)
    assert [row[0] for row in table.rows] == ["torch", "megatron3d"]
    torch_row, our_row = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    assert torch_row["M parameters"] == our_row["M parameters"] == "0.03"
    assert float(torch_row["megatron3d to it"].split()[0]) > 0 and our_row["megatron3d to it"] == ""
    assert int(torch_row["peak MiB"].replace(",", "")) > 100
    assert failures == [
        "crashing: rank 0 ended with code 1: RuntimeError: the flux capacitor is empty in step 3",
    ]
    assert table.notes == [
        "absent: not installed; pip install no-such-distribution",
        f"failed: {failures[0]}",
    ]


def test_both_berts_have_the_same_parameters_and_begin_with_the_same_loss() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[test]'")
    work = replace(TINY, vocab_size=512)
    theirs, ours = (importlib.import_module(peer.module).build(work) for peer in PEERS_OF_BERT)
    assert theirs.num_parameters == ours.num_parameters
    assert theirs.step() == pytest.approx(ours.step(), rel=0.05)  # near log(512) + log(2), other draws


@pytest.mark.heavy
def test_two_ranks_have_a_row_with_the_bytes_that_the_formula_gives() -> None:
    work = replace(TINY, ranks=2, layout="zero1", hidden_size=128)
    table = Table("a", "", scaling.COLUMNS)
    assert scaling.add_family(table, find_peers(["megatron3d"]), [work], num_rounds=1, num_steps=1) == []
    ((ranks, layout, peer, _, ratio, _, sent),) = table.rows
    assert (ranks, layout, peer, ratio) == ("2", "zero1", "megatron3d", "")
    hidden, num_blocks = work.hidden_size, work.num_layers
    tables, block = (work.vocab_size + work.seq_length) * hidden, 12 * hidden**2 + 13 * hidden
    half_of_it = 4 * (tables + num_blocks * block + 2 * hidden) / 2 / 2**20  # what a ring of two ranks sends in fp32
    assert sent == f"shard reduce-scatter {half_of_it:.2f}, gather all-gather {half_of_it:.2f}"


def test_each_layout_reads_every_sequence_of_a_step_once() -> None:
    for layout in LAYOUTS:
        work = Work(micro_batch=8, ranks=4, layout=layout)
        data_ranks = work.ranks // (work.tensor_ranks * work.pipeline_ranks)
        assert data_ranks * work.num_micro_batches * work.micro_batch_size == work.num_sequences == 32, layout


def test_samples_are_read_from_the_corpus_that_is_written(tmp_path: Path) -> None:
    work = replace(TINY, corpus=str(tmp_path / "corpus"))
    write_corpus(work, num_documents=20)
    for peer in (torch_samples, megatron3d_samples):
        peer.build(work).step()
    Path(f"{work.corpus}.bin").unlink()
    for peer in (torch_samples, megatron3d_samples):
        with pytest.raises((OSError, DataError), match="corpus"):
            peer.build(work).step()


def test_checkpoints_have_a_ratio_to_each_other_way_of_the_same_kind() -> None:
    table = compare_checkpoints(5, num_rounds=2)
    ratios = {row[0]: row[-1] for row in table.rows}
    assert {name for name, ratio in ratios.items() if ratio == ""} == {"save_checkpoint", "load_tensors"}
    assert len(ratios) == 9 and table.key == "checkpoint"
    (share,) = table.notes
    assert re.search(
        r"^checksums .* alone .*: \S+ s, \S+% of the time of save_checkpoint and \S+% of .*load_tensors$", share
    )


@pytest.mark.skipif(torch.__version__ < "2.12", reason="the copies of torch 2.11's async_save fail on Python 3.11")
@pytest.mark.heavy
def test_the_stall_of_an_asynchronous_save_has_a_ratio_to_each_other() -> None:
    table = compare_stalls(5, num_rounds=1)
    assert [row[0] for row in table.rows if row[-1]] == ["DCP async_save", "DCP async_save, buffers kept"]
    assert [row[0] for row in table.rows if not row[-1]] == ["--async-save"] and table.key == "stall"


@pytest.mark.heavy
def test_the_training_script_is_timed_until_its_first_loss_and_named_if_it_ends_without(tmp_path: Path) -> None:
    (ours,) = find_peers(["megatron3d"])
    assert 0.1 < first_loss_after_s(ours, TINY) < 600
    with pytest.raises(PeerFailed, match=r"megatron3d: rank 0 ended with code 2: .*hidden"):
        first_loss_after_s(ours, replace(TINY, hidden_size=33))


@pytest.mark.heavy
def test_the_command_line_has_a_row_beside_the_bare_kernels() -> None:
    table, failures = compare_overhead(TINY, num_rounds=1, num_steps=2)
    assert ([row[0] for row in table.rows], failures) == (["bare kernels", "megatron3d", "pretrain_gpt.py"], [])
    assert [bool(row[-1]) for row in table.rows] == [False, True, True]


def test_seconds_of_the_command_line_are_those_between_the_ends_of_steps(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    ends = (1.0, 9.0, 10.0, 12.0, 12.5)
    records = [{"event": "start", "wall_s": 0.5}, *({"loss": 1.0, "step_time_s": 0.1, "wall_s": end} for end in ends)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert median_step_s(file) == 1.0  # of 1, 2 and 0.5
    file.write_text("")
    with pytest.raises(PeerFailed, match="times of 0 steps alone"):
        median_step_s(file)


def test_rounds_alternate_their_order_and_leave_out_who_fails() -> None:
    order: list[str] = []

    def turn(name: str, seconds: float) -> float:
        order.append(name)
        if name == "b" and len(order) > 3:
            raise TurnFailed(f"{name} broke")
        return seconds

    turns = {name: lambda name=name, s=s: turn(name, s) for name, s in (("a", 1.0), ("b", 2.0), ("c", 4.0))}
    seconds, failures = take_turns(turns, 3)
    assert order == ["a", "b", "c", "c", "b", "a", "a", "c"]
    assert seconds == {"a": [1.0] * 3, "c": [4.0] * 3} and failures == ["b broke"]


def test_a_ratio_is_taken_within_rounds() -> None:
    ratio = speed_ratio([1.0, 10.0, 2.0], [2.0, 30.0, 2.0])
    assert (ratio.median, ratio.lowest, ratio.highest) == (2.0, 1.0, 3.0)
    assert str(ratio) == "2.00 (1.00 to 3.00)"


def test_tables_replace_their_places_of_the_page_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- compare: a -->\nold\n<!-- /compare -->\nmiddle\n<!-- compare: b -->\n<!-- /compare -->\n"
    )
    table = Table("a", "Caption.", ("x", "y"), [("1", "2")], ["a note"])
    write_tables(page, [table])
    lines = ["<!-- compare: a -->", "Caption.", "", "| x | y |", "| --- | --- |", "| 1 | 2 |", "", "- a note"]
    rest = ["<!-- /compare -->", "middle", "<!-- compare: b -->", "<!-- /compare -->"]
    assert page.read_text().splitlines() == ["before", *lines, *rest]
    with pytest.raises(ValueError, match="0 places for the table 'c'"):
        write_tables(page, [Table("c", "", ())])


def test_the_page_has_one_place_for_every_table_that_the_commands_write() -> None:
    kinds = ("step", "bert", "overhead", "experts", "scaling")
    tables = [f"{kind} {dtype}" for kind in kinds for dtype in ("fp32", "bf16")]
    page = compare.PAGE.read_text()
    for key in (*tables, "samples", "startup", "checkpoint"):
        assert page.count(f"<!-- compare: {key} -->\n") == 1, key


def test_an_unknown_peer_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="nanotron: not among transformers, torch, torch-compile, litgpt"):
        find_peers(["torch", "nanotron"])
