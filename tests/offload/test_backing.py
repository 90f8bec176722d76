"""Both backings keep what is left in them, pass after pass, for every view; files need three units of host memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron3d.offload.backing import NUM_SLOTS, Fields, FileBacking, HostBacking, StateBacking
from megatron3d.offload.file_store import FileStore
from megatron3d.offload.record import FIELD_ALIGNMENT_BYTES, record_of

CPU = torch.device("cpu")
UNITS = ["embedding", "layers.0", "layers.1", "layers.2", "head"]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.uint8]


@pytest.fixture(params=["host", "files"])
def backing(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StateBacking]:
    """A backing of each kind with five units of different sizes."""
    if request.param == "host":
        yield filled(HostBacking(CPU))
    else:
        store = FileStore(tmp_path, "rank00000")
        yield filled(FileBacking(store, CPU))
        store.close()


def filled(backing: StateBacking) -> StateBacking:
    """Add the units."""
    for number, name in enumerate(UNITS):
        size = 1000 * (number + 1) + number
        backing.add(name, record_of([("master", torch.float32, size), ("exp_avg", torch.bfloat16, size)]))
    return backing


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(0, 300)), max_size=6))
def test_the_fields_of_a_record_are_aligned_and_do_not_overlap(kinds: list[tuple[torch.dtype, int]]) -> None:
    record = record_of((f"f{i}", dtype, numel) for i, (dtype, numel) in enumerate(kinds))
    buffer = torch.zeros(record.num_bytes, dtype=torch.uint8)
    views = record.views(buffer)
    for number, view in enumerate(views.values()):
        view.view(torch.uint8).fill_(number + 1)
    for number, (f, (dtype, numel)) in enumerate(zip(record.fields, kinds, strict=True)):
        assert f.start_byte % FIELD_ALIGNMENT_BYTES == 0
        assert (views[f.name].dtype, views[f.name].numel()) == (dtype, numel)
        assert bool((views[f.name].view(torch.uint8) == number + 1).all())


def test_every_pass_finds_what_the_one_before_left(backing: StateBacking) -> None:
    def count(name: str, fields: Fields) -> None:
        fields["master"] += 1.0 + UNITS.index(name)
        fields["exp_avg"] += 2.0

    for _ in range(3):
        backing.for_each(UNITS, count)
    with backing.opened(UNITS, writes=False) as opened:
        for number, name in enumerate(UNITS):
            assert bool((opened[name]["master"] == 3.0 * (1.0 + number)).all())
            assert bool((opened[name]["exp_avg"] == 6.0).all())


def test_what_is_written_while_it_is_open_is_found_by_the_next_pass(backing: StateBacking) -> None:
    with backing.opened(UNITS, writes=True) as opened:
        for number, name in enumerate(UNITS):
            opened[name]["master"].fill_(float(number))
    found = {}
    backing.for_each(UNITS[1:3], lambda name, fields: found.update({name: float(fields["master"].mean())}))
    assert found == {"layers.0": 1.0, "layers.1": 2.0}


def test_what_runs_ahead_is_waited_for_before_the_work_in_the_slot_it_was_given(backing: StateBacking) -> None:
    slots: dict[int, str] = {}

    class Arrival:
        def __init__(self, name: str, slot: int) -> None:
            self.name, self.slot = name, slot

        def wait(self) -> None:
            slots[self.slot] = self.name

    seen = []
    backing.for_each(UNITS, lambda name, fields: seen.append(name in slots.values()), start_ahead=Arrival)
    assert seen == [True] * len(UNITS)
    assert set(slots) == set(range(NUM_SLOTS))


def test_records_of_one_field_are_stored_and_fetched_whole(backing: StateBacking) -> None:
    values = torch.randn(777).bfloat16()
    backing.add("weights", record_of([("weights", torch.bfloat16, 777)]))
    backing.start_store("weights", values).wait()
    found = torch.zeros(777, dtype=torch.bfloat16)
    backing.start_fetch("weights", found).wait()
    assert torch.equal(found, values)


def test_files_take_host_memory_for_three_units_of_the_largest_size(tmp_path: Path) -> None:
    backing = filled(FileBacking(FileStore(tmp_path, "rank00000"), CPU))
    backing.for_each(UNITS, lambda name, fields: None)
    largest = max(record.num_bytes for record in backing._records.values())
    assert (backing.host_bytes, NUM_SLOTS) == (NUM_SLOTS * largest, 3)
    assert backing.file_bytes >= sum(record.num_bytes for record in backing._records.values())
    assert (filled(HostBacking(CPU)).file_bytes, filled(HostBacking(CPU)).host_bytes > 0) == (0, True)
