"""`--profile`: the parts of a step add up to the step, each of them is seen, and the files hold what the lines say."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.train import step_profile
from megatron3d.train.step import train_step
from megatron3d.train.step_profile import DATA, PARTS, StepProfiler, parts_of_steps
from tests.dist.pool import Pool
from tests.parity.runs import RATES, Case, data_of, parts_of


def profiled(case: Case, directory: str, *, steps: int = 4) -> tuple[list[list[str]], dict[str, float]]:
    """The lines after each of some steps of which 1 and 2 are profiled, and the shares in percent by part."""
    mesh = make_mesh(case.layout)
    parts = parts_of(case, mesh)
    ranks = tuple(str(rank) for rank in range(case.layout.world_size))
    options = replace(
        parts.config.train, profile=True, profile_step_start=1, profile_step_end=3, profile_ranks=ranks[-1:]
    )
    profiler = StepProfiler(replace(options, profile_dir=directory), mesh, torch.device("cpu"))
    data = data_of(parts.config)
    samples = parts.config.train.global_batch_size // mesh.batch.size
    lines = []
    for step in range(steps):
        with profiler.step(step):
            with profiler.part(DATA):
                batch = data.reader(data.train)(step * 8 + mesh.batch.rank * samples, samples)
            train_step(parts, batch, RATES, step=step)
        lines.append(profiler.written(step + 1, is_last=step == steps - 1))
    table = [line.rsplit(maxsplit=4) for found in lines for line in found[1:]]
    return lines, {words[0].strip(): float(words[-2]) for words in table}


def test_the_profiled_steps_give_a_trace_and_a_table_once_they_are_over(tmp_path: Path) -> None:
    lines, shares = profiled(Case("gpt2", Layout()), str(tmp_path / "new"))
    assert [bool(found) for found in lines] == [False, False, True, False]
    trace = tmp_path / "new/iterations1-2.rank0.trace.json.gz"
    assert str(trace) in lines[2][0]
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "step" and event.get("ph") == "X" for event in events) == 2
    assert (tmp_path / "new/iterations1-2.rank0.txt").read_text().splitlines() == lines[2]
    assert shares.pop("sum") == 100.0
    assert sum(shares.values()) == pytest.approx(100.0, abs=0.1 * len(PARTS))
    assert {"products", "attention", "optimizer", "data", "element-wise and reductions"} <= shares.keys()


def _of_last_rank(rank: int, world_size: int, directory: str) -> tuple[bool, dict[str, float]]:
    lines, shares = profiled(Case("gpt2", Layout(tp=2, pp=2), "--sequence-parallel"), directory)
    return any(lines), shares


def test_waits_of_the_named_rank_are_communication_and_bubble(pool: Pool, tmp_path: Path) -> None:
    found = pool.run(4, _of_last_rank, str(tmp_path))
    assert [records for records, _ in found] == [False, False, False, True]
    assert {"exposed communication", "bubble and messages"} <= found[3][1].keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "iterations1-2.rank3.trace.json.gz",
        "iterations1-2.rank3.txt",
    ]


def test_a_profile_that_runs_to_the_end_of_the_run_is_written_too(tmp_path: Path) -> None:
    lines, _ = profiled(Case("gpt2", Layout()), str(tmp_path), steps=2)
    assert [bool(found) for found in lines] == [False, True]
    assert (tmp_path / "iterations1-1.rank0.trace.json.gz").exists()


def test_a_folder_that_cannot_be_made_is_reported_and_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    lines, _ = profiled(Case("gpt2", Layout()), str(tmp_path / "file"))
    (line,) = lines[2]
    assert line.startswith("no profile was written: ") and "--profile-dir" in line


def test_parts_are_the_times_that_operations_spend_in_themselves() -> None:
    x = torch.randn(64, 64)
    with profile(activities=[ProfilerActivity.CPU]) as run:
        x.exp()  # outside of every step
        for _ in range(2):
            with record_function("step"):
                with record_function("data"):
                    x.exp()
                with record_function("wait tp all_reduce"):
                    x @ x
                with record_function("wait pp receive"):
                    x.exp()
                (x @ x).exp()
    events = run.events() or []
    totals = parts_of_steps(events)
    whole = sum(event.cpu_time_total for event in events if event.name == "step")
    assert sum(totals.values()) == pytest.approx(whole)

    def inclusive(name: str) -> float:
        return sum(event.cpu_time_total for event in events if event.name == name)

    assert totals["data"] == pytest.approx(inclusive("data"))
    assert totals["exposed communication"] == pytest.approx(inclusive("wait tp all_reduce"))
    assert totals["bubble and messages"] == pytest.approx(inclusive("wait pp receive"))
    assert 0 < totals["products"] <= inclusive("aten::mm")
    assert totals["attention"] == totals["optimizer"] == 0
    assert step_profile.table_lines(totals)[-1].split()[0] == "sum"
