"""The command-line tool: its JSON form, its picture, its exit codes."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

from megatron3d.pipeline.orders.named import ORDERS

TOOL = Path(__file__).resolve().parents[2] / "tools" / "show_schedule.py"


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the tool as a script; gives (exit code, stdout, stderr)."""

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOL), run_name="__main__")
        return ended.value.code, *capsys.readouterr()

    return run


def test_json_has_the_rows_and_the_placement(show):
    code, out, _ = show("--pipeline-schedule", "1f1b", "--stages", 2, "--virtual", 1, "--microbatches", 1, "--json")
    assert code == 0
    assert json.loads(out) == {
        "ranks": [
            [{"op": "F", "stage": 0, "mb": 0}, {"op": "B", "stage": 0, "mb": 0}],
            [{"op": "F", "stage": 1, "mb": 0}, {"op": "B", "stage": 1, "mb": 0}],
        ],
        "stage_to_rank": [0, 1],
    }


def test_text_is_the_default_and_takes_costs(show):
    code, out, _ = show(
        "--stages", 2, "--microbatches", 2, "--forward-cost", 2, "--backward-cost", 3, "--link-latency", 0.5
    )
    assert code == 0
    # F 2, wire 0.5, F 2, B 3, then on the last rank F 2 and B 3, wire 0.5, B 3
    assert out.startswith("1f1b: 2 pipeline ranks, 2 microbatches, span 16,")
    assert "rank 1 | " in out


def test_png_is_written_and_named(show, tmp_path: Path):
    path = tmp_path / "g.png"
    code, out, _ = show("--pipeline-schedule", "gpipe", "--stages", 3, "--microbatches", 4, "--png", path)
    assert code == 0 and str(path) in out
    assert path.read_bytes().startswith(b"\x89PNG")


def test_costs_are_those_of_a_rank_unless_said_to_be_those_of_a_stage(show):
    size = ("--pipeline-schedule", "forward-only", "--stages", 2, "--virtual", 2, "--microbatches", 4)
    assert "span 4.5, bubble 11.1%" in show(*size)[1]
    assert "span 9, bubble 11.1%" in show(*size, "--costs-of", "stage")[1]


def test_the_comparison_has_every_order_that_trains_with_the_numbers_of_its_own_timeline(show):
    code, out, _ = show("--compare", "--stages", 4, "--microbatches", 8, "--virtual", 2)
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "4 pipeline ranks, 8 microbatches"
    rows = {line.split()[0]: line for line in lines[2 : lines.index("", 3)]}
    assert set(rows) == {"schedule", *ORDERS} - {"forward-only"}
    assert rows["gpipe"].split(maxsplit=4)[1:] == ["1", "33", "27.3%", "8 on each"]
    assert rows["1f1b"].split(maxsplit=4)[1:] == ["1", "33", "27.3%", "4 3 2 1"]
    for name in rows.keys() - {"schedule"}:
        virtual = int(rows[name].split()[1])
        single = show("--pipeline-schedule", name, "--stages", 4, "--microbatches", 8, "--virtual", virtual)[1]
        span, bubble = rows[name].split()[2:4]
        assert f"span {span}, bubble {bubble}" in single.splitlines()[0]
    assert "left out: forward-only: it has no backwards" in lines


def test_the_comparison_is_drawn_with_every_colour_that_occurs(show, tmp_path: Path):
    path = tmp_path / "all.png"
    code, out, _ = show("--compare", "--stages", 4, "--microbatches", 8, "--png", path)
    assert code == 0 and str(path) in out and f"{len(ORDERS) - 1} schedules compared" in out
    pixels = imread(path)[..., :3].reshape(-1, 3)
    for colour in ("2F6DB5", "1B9E77", "B5483A", "6C5B9E"):
        wanted = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        assert (abs(pixels - wanted).max(axis=1) < 0.01).mean() > 0.003, colour


OWN_ORDER = """
from megatron3d.pipeline.schedule import Op, Schedule, Step


def one_at_a_time(num_ranks, num_microbatches, virtual=1):
    rows = [
        tuple(Step(op, rank, mb) for mb in range(num_microbatches) for op in (Op.F, Op.B)) for rank in range(num_ranks)
    ]
    return Schedule("one at a time", num_ranks, num_microbatches, tuple(rows), tuple(range(num_ranks)))
"""


def test_an_order_of_the_user_is_shown_and_compared(show, tmp_path: Path):
    (tmp_path / "mine.py").write_text(OWN_ORDER)
    name = f"{tmp_path / 'mine.py'}:one_at_a_time"
    code, out, _ = show("--pipeline-schedule", name, "--stages", 2, "--microbatches", 3)
    assert code == 0 and "2 pipeline ranks, 3 microbatches, span 18, bubble 50.0%" in out
    _, out, _ = show("--compare", "--pipeline-schedule", name, "--stages", 2, "--microbatches", 3)
    row = next(line for line in out.splitlines() if "one_at_a_time" in line)
    assert row.split()[1:4] == ["1", "18", "50.0%"]


@pytest.mark.parametrize(
    ("args", "expected", "words"),
    [
        (["--pipeline-schedule", "1f1bb", "--stages", 2, "--microbatches", 2], 2, "did you mean '1f1b'"),
        (["--stages", 0, "--microbatches", 2], 2, "0 pipeline ranks"),
        (["--stages", 2, "--microbatches", 2, "--virtual", 3], 2, "3 virtual stages"),
        (["--stages", 2, "--microbatches", 2, "--stage-factors", 1], 2, "1 stage factors"),
        (["--stages", 2, "--microbatches", 2, "--forward-cost", 0], 2, "must be positive"),
        (["--stages", "two", "--microbatches", 2], 2, "--stages"),
        (["--stages", 2, "--microbatches", 2, "--compare", "--json"], 2, "--compare"),
        (["--stages", 2, "--microbatches", 2, "--compare", "--stage-factors", 1, 2], 2, "leave them out"),
        (["--stages", 2, "--microbatches", 2, "--compare", "--pipeline-schedule", "1f1bb"], 2, "did you mean '1f1b'"),
        (["--stages", 0, "--microbatches", 2, "--compare"], 2, "no schedule can run on 0 ranks"),
        (["--stages", 2, "--microbatches", 2, "--png", "/dev/null/a.png"], 7, "/dev/null/a.png"),
    ],
)
def test_mistakes_end_with_a_sentence_and_their_exit_code(show, args, expected, words):
    code, out, err = show(*args)
    assert (code, out) == (expected, "")
    assert words in err and "Traceback" not in err
