"""Goodput by hand-made clocks and records: what counts, what was lost, and that the parts make up the wall time."""

from __future__ import annotations

from typing import Any

import pytest

from megatron3d.train.goodput import Goodput, TimeSpent, spent_when_resuming

BEFORE = TimeSpent(wall_s=100.0, steps_s=60.0, saves_s=4.0, evaluations_s=6.0, lost_s=0.0, lost_steps=0)


def step(number: int, wall_s: float, lost_steps: int = 0) -> dict[str, Any]:
    return {"step": number, "loss": 3.0, "wall_s": wall_s, "lost_steps": lost_steps}


SAVE = {"step": 6, "save_s": 2.0, "save_bytes": 10, "wall_s": 102.0}


def test_goodput_is_the_time_of_steps_over_the_wall_time_of_all_processes() -> None:
    now = 1000.0
    goodput = Goodput(BEFORE, started_s=990.0, clock=lambda: now)
    goodput.add("steps_s", 7.0)
    goodput.add("saves_s", 1.0)
    now = 1020.0
    spent = goodput.spent()
    assert spent == TimeSpent(wall_s=130.0, steps_s=67.0, saves_s=5.0, evaluations_s=6.0)
    assert spent.goodput == 67.0 / 130.0
    assert spent.summary() == (
        "goodput 51.5 % of 2 min 10 s: steps 1 min 7 s, saves 5 s, evaluations 6 s, start-up and the rest 52 s"
    )
    assert TimeSpent().goodput == 0.0


def test_what_a_killed_process_did_since_its_save_is_lost_and_its_save_is_not() -> None:
    records = [step(5, 90.0), step(6, 100.0), SAVE, step(7, 113.0), {"step": 7, "valid_loss": 2.0}, step(8, 125.0)]
    spent = spent_when_resuming(BEFORE, 6, records)
    assert spent == TimeSpent(wall_s=125.0, steps_s=60.0, saves_s=6.0, evaluations_s=6.0, lost_s=23.0, lost_steps=2)


def test_a_process_that_is_lost_on_the_way_to_its_first_save_counts_too() -> None:
    """Twice resumed from one checkpoint; its records carry what was lost before it."""
    resume = {"event": "resume", "from_step": 6, "wall_s": 125.0, "lost_steps": 2}
    spent = spent_when_resuming(BEFORE, 6, [step(6, 100.0), SAVE, resume, step(7, 140.0, 2)])
    assert (spent.wall_s, spent.lost_s, spent.lost_steps) == (140.0, 38.0, 3)
    spent = spent_when_resuming(BEFORE, 6, [step(6, 100.0), SAVE, resume])
    assert (spent.wall_s, spent.lost_s, spent.lost_steps) == (125.0, 23.0, 2), "killed before its first step"


def test_without_a_metrics_file_the_exit_status_says_how_many_steps_were_lost() -> None:
    spent = spent_when_resuming(BEFORE, 6, [], ended_after=9)
    assert (spent.wall_s, spent.lost_s, spent.lost_steps) == (130.0, 30.0, 3), "each as long as the six before"
    for ended_after in (None, 6, 2):
        assert spent_when_resuming(BEFORE, 6, [], ended_after=ended_after) == BEFORE


@pytest.mark.parametrize(
    "record", [{"step": "x"}, {"step": 7, "wall_s": None}, {"step": 6, "save_s": [], "wall_s": {}}]
)
def test_records_that_somebody_has_edited_are_no_error(record: dict[str, Any]) -> None:
    assert spent_when_resuming(BEFORE, 6, [record]) == BEFORE


def test_what_is_stored_comes_back_and_anything_else_is_refused() -> None:
    assert TimeSpent.from_json(BEFORE.to_json()) == BEFORE
    for wrong in (-1, "1", None, float("nan"), True):
        with pytest.raises(ValueError, match="saves_s"):
            TimeSpent.from_json(BEFORE.to_json() | {"saves_s": wrong})
    with pytest.raises(ValueError, match="lost_s"):
        TimeSpent.from_json({"wall_s": 1.0, "steps_s": 1.0, "saves_s": 0.0, "evaluations_s": 0.0})
