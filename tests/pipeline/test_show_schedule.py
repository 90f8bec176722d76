"""The command-line tool: its JSON form, its picture, its exit codes."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    ("args", "expected", "words"),
    [
        (["--pipeline-schedule", "1f1bb", "--stages", 2, "--microbatches", 2], 2, "did you mean '1f1b'"),
        (["--stages", 0, "--microbatches", 2], 2, "0 pipeline ranks"),
        (["--stages", 2, "--microbatches", 2, "--virtual", 3], 2, "3 virtual stages"),
        (["--stages", 2, "--microbatches", 2, "--stage-factors", 1], 2, "1 stage factors"),
        (["--stages", 2, "--microbatches", 2, "--forward-cost", 0], 2, "must be positive"),
        (["--stages", "two", "--microbatches", 2], 2, "--stages"),
        (["--stages", 2, "--microbatches", 2, "--png", "/dev/null/a.png"], 7, "/dev/null/a.png"),
    ],
)
def test_mistakes_end_with_a_sentence_and_their_exit_code(show, args, expected, words):
    code, out, err = show(*args)
    assert (code, out) == (expected, "")
    assert words in err and "Traceback" not in err
