"""Text and picture of a timeline: to scale, complete, and within the width asked for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from matplotlib.image import imread

from megatron3d.errors import StorageError
from megatron3d.pipeline.draw.png import draw_png, step_colours
from megatron3d.pipeline.draw.text import render_text
from megatron3d.pipeline.orders.named import forward_only, gpipe, one_f_one_b
from megatron3d.pipeline.schedule import Op, Schedule, Step
from megatron3d.pipeline.simulate import Costs, simulate


def rank_lines(text: str) -> list[str]:
    """What stands behind the bar of each line of the timeline."""
    return [line.split(" | ", 1)[1] for line in text.splitlines() if " | " in line]


def test_two_ranks_of_1f1b_look_like_this():
    assert render_text(simulate(one_f_one_b(2, 3))).splitlines() == [
        "1f1b: 2 pipeline ranks, 3 microbatches, span 12, bubble 25.0%",
        "F forward, B backward; the number is the microbatch; dots are idle time",
        "",
        "rank 0 | F0 F1 ......B0--- F2 B1--- ...B2---",
        "rank 1 | ...F0 B0--- F1 B1--- F2 B2--- ......",
        "",
        "rank 0: busy 9, idle 3, at most 2 live activations",
        "rank 1: busy 9, idle 3, at most 1 live activations",
    ]


def test_four_by_eight_fits_into_120_columns_without_wrapping():
    text = render_text(simulate(gpipe(4, 8)))
    assert max(map(len, text.splitlines())) <= 120
    assert len(rank_lines(text)) == 4


@pytest.mark.parametrize("width", [40, 80, 300])
def test_wrapped_lines_keep_the_width_and_every_label(width):
    schedule = one_f_one_b(3, 12)
    text = render_text(simulate(schedule), width=width)
    lines = rank_lines(text)
    assert max(len(line) for line in text.splitlines() if " | " in line) <= width
    for rank, row in enumerate(schedule.rows):
        shown = re.findall(r"[FB]\d+", " ".join(lines[rank::3]))
        assert shown == [f"{step.op.value}{step.mb}" for step in row]


def test_labels_survive_costs_that_are_not_whole_numbers():
    schedule = gpipe(3, 11)
    text = render_text(simulate(schedule, Costs(forward=0.37, backward=0.91, link_latency=0.113)), width=10_000)
    for rank, line in enumerate(rank_lines(text)):
        assert re.findall(r"[FB]\d+", line) == [f"{s.op.value}{s.mb}" for s in schedule.rows[rank]]


def test_a_rank_with_several_stages_shows_them():
    text = render_text(simulate(forward_only(2, 2, 2)))
    assert rank_lines(text) == ["F0/0 F1/0 F0/2 F1/2 .....", ".....F0/1 F1/1 F0/3 F1/3"]
    assert "then its stage" in text
    assert text.splitlines()[-1] == "ranks 0-1: busy 4, idle 1, at most 1 live activations (as 0.5 of a whole rank)"


def test_the_picture_is_a_png_with_a_box_for_every_kind_of_step(tmp_path: Path):
    steps = (*(Step(op, 0, 0) for op in (Op.F, Op.I, Op.W)), Step(Op.F, 0, 1), Step(Op.B, 0, 1))
    path = tmp_path / "all.png"
    draw_png(simulate(Schedule("all", 1, 2, (steps,), (0,))), path, title="Every op")
    pixels = imread(path)[..., :3].reshape(-1, 3)
    for colour in ("2F6DB5", "1B9E77", "56BFD6", "E8A33D"):
        wanted = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        share = (abs(pixels - wanted).max(axis=1) < 0.01).mean()
        assert share > 0.02, colour


def test_later_stages_of_a_rank_are_drawn_paler_each_in_a_colour_of_its_own():
    colours = step_colours(simulate(forward_only(2, 3, 4)))
    by_rank = [[colours[Step(Op.F, stage, 1)] for stage in range(rank, 8, 2)] for rank in range(2)]
    assert by_rank[0] == by_rank[1]
    brightness = [sum(colour) for colour in by_rank[0]]
    assert brightness == sorted(set(brightness)) and len(brightness) == 4


def test_sixteen_ranks_with_sixty_four_microbatches_are_drawn_and_written(tmp_path: Path):
    timeline = simulate(one_f_one_b(16, 64))
    path = tmp_path / "large.png"
    draw_png(timeline, path)
    assert imread(path).shape[1] > 4000, "numbers need the width"
    lines = rank_lines(render_text(timeline))
    for rank, row in enumerate(timeline.schedule.rows):
        shown = re.findall(r"[FB]\d+", " ".join(lines[rank::16]))
        assert shown == [f"{step.op.value}{step.mb}" for step in row]


def test_a_picture_that_cannot_be_written_is_a_storage_error(tmp_path: Path):
    with pytest.raises(StorageError, match=r"could not write the picture .*missing/a\.png: No such file"):
        draw_png(simulate(gpipe(2, 2)), tmp_path / "missing" / "a.png")
