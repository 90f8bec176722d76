"""A user's own order is taken by name from their file or module, and every way to get it wrong is a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron3d.errors import ScheduleError
from megatron3d.pipeline.orders.named import build_schedule, placement_of, virtual_of
from megatron3d.pipeline.schedule import Op, Step
from megatron3d.pipeline.simulate import simulate

EXAMPLE = Path(__file__).parents[2] / "examples/my_pipeline_order.py"

MINE = """
from megatron3d.pipeline.orders.named import gpipe, one_f_one_b, zb_v
from megatron3d.pipeline.schedule import Schedule

table = {}

def good(num_ranks, num_microbatches, virtual):
    return one_f_one_b(num_ranks, num_microbatches)

def on_a_v(num_ranks, num_microbatches, virtual):
    return zb_v(num_ranks, num_microbatches, virtual)

def nothing(num_ranks, num_microbatches, virtual):
    pass

def other_sizes(num_ranks, num_microbatches, virtual):
    return gpipe(num_ranks, num_microbatches + 1)

def incomplete(num_ranks, num_microbatches, virtual):
    whole = gpipe(num_ranks, num_microbatches)
    return Schedule("mine", num_ranks, num_microbatches, (whole.rows[0][:-1], *whole.rows[1:]), whole.stage_to_rank)

def short(num_ranks):
    return gpipe(num_ranks, 1)

def fails(num_ranks, num_microbatches, virtual):
    return table["no such key"]
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A file with orders, right and wrong."""
    path = tmp_path / "mine_of_this_test.py"
    path.write_text(MINE)
    return path


def test_an_order_is_found_in_a_file_and_in_a_module(mine, monkeypatch):
    monkeypatch.syspath_prepend(str(mine.parent))
    expected = build_schedule("1f1b", num_ranks=3, num_microbatches=5)
    for name in (f"{mine}:good", "mine_of_this_test:good"):
        assert build_schedule(name, num_ranks=3, num_microbatches=5) == expected
        assert virtual_of(name) is None


def test_a_path_may_be_relative(mine, monkeypatch):
    monkeypatch.chdir(mine.parent)
    assert build_schedule("mine_of_this_test.py:good", num_ranks=2, num_microbatches=2).num_ranks == 2


def test_the_placement_is_that_of_the_users_schedule(mine):
    assert placement_of(f"{mine}:on_a_v", num_ranks=3, virtual=2) == (0, 1, 2, 2, 1, 0)
    assert placement_of(f"{mine}:on_a_v", num_ranks=3, virtual=2, num_microbatches=1) == (0, 1, 2, 2, 1, 0)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("nothing", ["returned a NoneType", "return a megatron3d.pipeline.schedule.Schedule"]),
        ("other_sizes", ["returned 2 ranks, 4 microbatches and 2 stages", "this run has 2, 3 and 2"]),
        ("incomplete", ["schedule 'mine': stage 0, mb 2 has the steps 'F'"]),
        ("short", ["TypeError", "function(num_ranks, num_microbatches, virtual)"]),
        ("fails", ["failed for 2 pipeline ranks, 3 microbatches and 1 stages per rank", "KeyError: 'no such key'"]),
        ("no_such", ["has no function 'no_such'", "good, gpipe"]),
        ("table", ["has no function 'table'"]),
        ("on_a_v", ["zb-v has 2 stages per rank, but 1"]),
    ],
)
def test_a_faulty_order_is_refused_with_a_sentence(mine, function, words):
    with pytest.raises(ScheduleError) as caught:
        build_schedule(f"{mine}:{function}", num_ranks=2, num_microbatches=3)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere/mine.py:good", ["there is no file nowhere/mine.py"]),
        ("no_such_module_at_all:good", ["cannot be imported: ModuleNotFoundError", "PYTHONPATH"]),
        (":good", ["names no function"]),
        ("mine:", ["names no function", "module:function"]),
    ],
)
def test_an_order_that_is_not_there_is_refused_with_a_sentence(name, words):
    with pytest.raises(ScheduleError) as caught:
        build_schedule(name, num_ranks=2, num_microbatches=3)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("text", "reason"), [("def good(:\n", "SyntaxError"), ("import sys\nsys.exit(3)\n", "SystemExit: 3")]
)
def test_a_file_that_cannot_be_loaded_says_why(tmp_path, text, reason):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(ScheduleError, match=rf"broken.py cannot be loaded: {reason}"):
        build_schedule(f"{path}:good", num_ranks=2, num_microbatches=3)


@pytest.mark.parametrize("virtual", [1, 2, 3])
def test_the_example_is_a_schedule_in_twenty_lines_that_undoes_what_came_last(virtual):
    assert len(EXAMPLE.read_text().split('"""', 2)[2].strip().splitlines()) <= 20
    schedule = build_schedule(f"{EXAMPLE}:last_in_first_out", num_ranks=3, num_microbatches=4, virtual=virtual)
    assert simulate(schedule).peak_live_activations == (4 * virtual,) * 3
    first, last = schedule.rows[0][0], schedule.rows[0][-1]
    assert (first, last) == (Step(Op.F, 0, 0), Step(Op.B, 0, 0))
