"""The streamed pipeline, against a fake store that notes the order of everything."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron3d.offload.stream import num_slots, stream


@dataclass
class Fake:
    """Slots that hold numbers; a transfer happens only at its `wait`, the latest moment at which it may."""

    stored: dict[int, int]
    read_ahead: int
    slots: dict[int, int] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    under_way: set[str] = field(default_factory=set)
    fails_at: int | None = None

    def start(self, kind: str, unit: int, slot: int) -> _Moving:
        """Note a transfer's start; no two may be in one slot."""
        assert not any(other.endswith(f"@{slot}") for other in self.under_way), f"slot {slot} is in use"
        name = f"{kind}{unit}@{slot}"
        self.log.append(name)
        self.under_way.add(name)
        return _Moving(self, kind, unit, slot)

    def compute(self, unit: int, slot: int) -> None:
        """Add 1000 to what the slot holds."""
        assert not any(other.endswith(f"@{slot}") for other in self.under_way), f"slot {slot} is in use"
        self.log.append(f"compute{unit}")
        if unit == self.fails_at:
            raise RuntimeError(f"unit {unit} fails")
        self.slots[slot] += 1000

    def run(self) -> None:
        """Stream all units."""
        stream(
            sorted(self.stored),
            start_read=lambda unit, slot: self.start("read", unit, slot),
            compute=self.compute,
            start_write=lambda unit, slot: self.start("write", unit, slot),
            read_ahead=self.read_ahead,
        )


@dataclass
class _Moving:
    fake: Fake
    kind: str
    unit: int
    slot: int

    def wait(self) -> None:
        self.fake.under_way.discard(f"{self.kind}{self.unit}@{self.slot}")
        if self.kind == "read":
            self.fake.slots[self.slot] = self.fake.stored[self.unit]
        else:
            self.fake.stored[self.unit] = self.fake.slots[self.slot]


@given(count=st.integers(0, 12), read_ahead=st.integers(1, 4))
def test_every_unit_is_read_computed_and_written_once_in_a_slot_of_its_own(count: int, read_ahead: int) -> None:
    fake = Fake({unit: unit for unit in range(count)}, read_ahead)
    fake.run()
    assert fake.stored == {unit: unit + 1000 for unit in range(count)}
    assert fake.under_way == set()
    assert len(fake.slots) == min(count, num_slots(read_ahead))


def test_the_next_unit_is_on_its_way_before_one_is_computed_and_the_last_one_is_written_meanwhile() -> None:
    fake = Fake({unit: unit for unit in range(4)}, read_ahead=1)
    fake.run()
    assert fake.log == [
        *("read0@0", "read1@1", "compute0", "write0@0"),
        *("read2@2", "compute1", "write1@1"),
        *("read3@0", "compute2", "write2@2"),
        *("compute3", "write3@0"),
    ]


@pytest.mark.parametrize("fails_at", [0, 2, 4])
def test_nothing_is_under_way_after_an_error(fails_at: int) -> None:
    fake = Fake({unit: unit for unit in range(5)}, read_ahead=1, fails_at=fails_at)
    with pytest.raises(RuntimeError, match=f"unit {fails_at} fails"):
        fake.run()
    assert fake.under_way == set()
    assert fake.stored[fails_at] == fails_at, "a unit whose computation failed must not be written"
