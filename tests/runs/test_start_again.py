""" "Start again to go on": the same command started again continues where it stopped, from whatever is whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron3d.checkpoint.directory import latest_checkpoint, step_of
from tests.runs.harness import MOCK, Ended, exit_status, run, run_ok, steps, words

FALL_BACK = "--fall-back-to-previous-checkpoint"


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("six") / "save"
    run_ok(MOCK, "--save-interval 2 --save", folder)
    return folder


@pytest.fixture
def own(six: Path, tmp_path: Path) -> Path:
    """A copy of them to damage or to write to."""
    return Path(shutil.copytree(six, tmp_path / "own"))


def latest(save: Path) -> int:
    found = latest_checkpoint(save)
    assert found is not None
    return step_of(found)


def started_from(ended: Ended) -> str:
    """The line about the start, without its first words."""
    (line,) = [line for line in ended.log if line.startswith("starting from")]
    return line.removeprefix("starting from ")


def again(*options: str | Path, code: int = 0, base: str = MOCK) -> Ended:
    ended = run(words(base, *options))
    assert ended.code == code, ended.out + ended.err
    return ended


# --- --load and --save ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source", ["--finetune --load", "--pretrained-checkpoint", "--finetune --pretrained-checkpoint"]
)
def test_a_finetuning_that_stopped_is_resumed_and_not_begun_again(six: Path, tmp_path: Path, source: str) -> None:
    """The source is further, at step 6; the losses are those of a fine-tuning without a stop."""
    whole, stopped, save = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl", tmp_path / "save"
    options = (source, six, "--train-iters 5")
    again(*options, "--metrics-file", whole)
    command = (*options, "--exit-interval 2 --metrics-file", stopped, "--save", save)
    first = again(*command, code=75)
    assert started_from(first).startswith(f"{six}/iter_0000006 (")
    second = again(*command, code=75)
    assert started_from(second).startswith(f"{save}/iter_0000002 (")
    again(*command)
    assert [record["loss"] for record in steps(stopped)] == [record["loss"] for record in steps(whole)]
    assert latest(save) == 5


def test_with_load_and_save_the_later_step_is_resumed_and_latest_never_goes_back(six: Path, tmp_path: Path) -> None:
    whole, stopped, save = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl", tmp_path / "save"
    again("--train-iters 10 --load", six, "--metrics-file", whole)
    command = ("--train-iters 10 --exit-interval 2 --load", six, "--metrics-file", stopped, "--save", save)
    seen = []
    for code in (75, 0):
        ended = again(*command, code=code)
        seen.append((started_from(ended).partition(" (")[0], latest(save)))
    assert seen == [(f"{six}/iter_0000006", 8), (f"{save}/iter_0000008", 10)]
    assert [record["loss"] for record in steps(stopped)] == [record["loss"] for record in steps(whole)]
    assert "--save is at step 8 and --load" in ended.out


def test_a_source_that_is_further_than_save_is_taken(own: Path, tmp_path: Path) -> None:
    again("--train-iters 2 --save", tmp_path / "save")
    ended = again("--train-iters 7 --load", own, "--save", tmp_path / "save")
    assert started_from(ended).startswith(f"{own}/iter_0000006 (--load is at step 6 and --save")
    assert latest(tmp_path / "save") == 7


def test_a_source_that_is_gone_does_not_hinder_a_run_that_has_begun(own: Path, tmp_path: Path) -> None:
    command = ("--train-iters 9 --load", own, "--save", tmp_path / "save")
    again(*command, "--exit-interval 7", code=75)
    shutil.rmtree(own)
    assert started_from(again(*command)).startswith(f"{tmp_path}/save/iter_0000007")
    shutil.rmtree(tmp_path / "save")
    again(*command, code=4).says(f"--load {own} is not a directory")


def test_finetuning_in_place_is_refused_before_anything_starts(own: Path) -> None:
    for load in (own, own / "iter_0000006", own.parent / "." / "own"):
        ended = again("--finetune --load", load, "--save", own, code=2)
        ended.says("whether a checkpoint there is to be fine-tuned or resumed", "give another --save")


@pytest.mark.parametrize("way", ["--ckpt-step", "by name"])
def test_turning_back_is_done_once_and_then_continued(own: Path, tmp_path: Path, way: str) -> None:
    metrics = tmp_path / "m.jsonl"
    turn = ("--ckpt-step 2 --save", own) if way == "--ckpt-step" else ("--load", own / "iter_0000002", "--save", own)
    command = ("--train-iters 8 --exit-interval 3 --metrics-file", metrics, *turn)
    first = again(*command, code=75)
    assert started_from(first) == f"{own}/iter_0000002 (turning back to step 2)"
    assert latest(own) == 3, "this was asked for"
    second = again(*command, code=75)
    assert started_from(second).startswith(f"{own}/iter_0000003 (it was written after turning back to step 2")
    assert latest(own) == 6
    again(*command)
    assert [record["step"] for record in steps(metrics)] == [3, 4, 5, 6, 7, 8]
    again("--train-iters 9 --save", own)
    ended = again(*command, code=75)
    assert started_from(ended).startswith(f"{own}/iter_0000002"), "a run without the turn lies between"


def test_no_load_optim_holds_for_what_the_command_has_not_written_itself(six: Path, tmp_path: Path) -> None:
    """With a stop the losses are those without one, which they are not if the optimizer starts anew once more."""
    whole, stopped, save = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl", tmp_path / "save"
    options = ("--train-iters 10 --no-load-optim --load", six)
    again(*options, "--metrics-file", whole)
    command = (*options, "--exit-interval 8 --metrics-file", stopped, "--save", save)
    assert "the optimizer starts anew (--no-load-optim)" in again(*command, code=75).out
    ended = again(*command)
    assert f"--no-load-optim was obeyed by the run that wrote {save}/iter_0000008, so its optimizer" in ended.out
    assert [record["loss"] for record in steps(stopped)] == [record["loss"] for record in steps(whole)]
    other = again("--train-iters 11 --no-load-optim --optimizer lion --save", save)
    assert "the optimizer starts anew (--no-load-optim)" in other.out, "the state is of another optimizer"


# --- Where a checkpoint once was --------------------------------------------------------------------------------------


def test_a_latest_without_its_checkpoint_never_starts_anew(own: Path) -> None:
    """All are gone: there is nothing to fall back to, and random weights would be worse than an end."""
    for step in (2, 4, 6):
        shutil.rmtree(own / f"iter_{step:07d}")
    for option in ("", FALL_BACK, f"--load {own}"):
        again("--save", own, option, code=4).says(
            "names 'iter_0000006', which is not a checkpoint", "put the checkpoint back, or give another --save"
        )


def test_checkpoints_without_latest_never_start_anew(own: Path) -> None:
    (own / "latest").unlink()
    again("--save", own, code=4).says(f"{own}/iter_0000006 is there: start from it with {FALL_BACK}")
    assert started_from(again("--train-iters 7 --save", own, FALL_BACK)).startswith(f"{own}/iter_0000006")


@pytest.mark.parametrize("text", ["", "iter_0000099", "\x00\x00\x00", b"\xff\xfe"])
def test_a_damaged_latest_is_an_error_and_falls_back_to_the_newest(own: Path, text: str | bytes) -> None:
    (own / "latest").write_bytes(text if isinstance(text, bytes) else text.encode())
    again("--save", own, code=4).says(FALL_BACK)
    ended = again("--train-iters 7 --save", own, FALL_BACK)
    assert started_from(ended) == f"{own}/iter_0000006 (the newest that is there in --save)"
    (reason,) = [line for line in ended.log if "fell back" in line]
    assert reason.startswith(f"fell back to another checkpoint, because {own}/latest ")
    assert latest(own) == 7


@pytest.mark.parametrize("step", [4, 9])
def test_a_latest_or_a_step_that_is_gone_is_reported_when_falling_back(own: Path, tmp_path: Path, step: int) -> None:
    """Of --save beside a --load, of --load alone, and a step asked for."""
    (own / "latest").write_text("iter_0000009")
    where = f"fell back to another checkpoint, because {own}/latest names 'iter_0000009'"
    assert where in again("--train-iters 7 --load", own, FALL_BACK).out
    assert where in again("--finetune --train-iters 1 --load", own, FALL_BACK).out
    again("--train-iters 2 --save", tmp_path / "other")
    assert where in again("--train-iters 7 --load", tmp_path / "other", "--save", own, FALL_BACK).out
    shutil.rmtree(own / "iter_0000004")
    ended = again(f"--train-iters 8 --ckpt-step {step} --load", own, FALL_BACK)
    assert f"fell back to another checkpoint, because --ckpt-step {step}" in ended.out


def test_falling_back_stays_on_the_branch_of_the_last_turn(own: Path) -> None:
    """Step 6 is of the run before: a later step, and yet from before the turn back to step 4."""
    again("--ckpt-step 4 --train-iters 5 --save", own)
    (own / "latest").write_text("")
    again("--train-iters 6 --save", own, code=4).says(f"{own}/iter_0000005 is there")
    ended = again("--train-iters 6 --save", own, FALL_BACK)
    assert started_from(ended).startswith(f"{own}/iter_0000005 (")
    assert "iter_0000006 was passed over: the run has turned back from it since" in ended.out


def _damage(directory: Path, what: str) -> None:
    if what == "index":
        (directory / "index.json").write_text("{}")
    elif what == "document":
        path = directory / "state.json"
        path.write_text(path.read_text().replace("1", "2"))
    else:
        path = directory / "rank00000.safetensors"
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize(("at_six", "at_four"), [("bytes", "index"), ("index", "document"), ("document", "bytes")])
def test_damage_to_two_checkpoints_falls_back_to_the_third(
    own: Path, tmp_path: Path, at_six: str, at_four: str
) -> None:
    _damage(own / "iter_0000006", at_six)
    _damage(own / "iter_0000004", at_four)
    command = ("--train-iters 7 --metrics-file", tmp_path / "m", "--save", own)
    again(*command, code=4).says("iter_0000006", "iter_0000004 is the one before", FALL_BACK)
    ended = again(*command, FALL_BACK)
    assert started_from(ended).startswith(f"{own}/iter_0000002")
    (reason,) = [line for line in ended.out.splitlines() if "fell back to another checkpoint, because" in line]
    assert started_from(ended).endswith("(the newest that is whole)")
    assert "iter_0000006" in reason and "iter_0000004" in reason
    assert [record["step"] for record in steps(tmp_path / "m")] == [3, 4, 5, 6, 7]


def test_damage_to_all_checkpoints_is_an_error_even_when_falling_back(own: Path) -> None:
    for step in (2, 4, 6):
        _damage(own / f"iter_{step:07d}", "bytes")
    again("--save", own, FALL_BACK, code=4).says("none of the 3 checkpoints to start from is whole")
    assert exit_status(own)["code"] == 4


def test_a_damaged_finetuning_falls_back_to_its_source_when_asked(six: Path, tmp_path: Path) -> None:
    command = ("--finetune --load", six, "--train-iters 4 --save", tmp_path)
    again(*command)
    _damage(tmp_path / "iter_0000004", "bytes")
    again(*command, code=4).says(FALL_BACK)
    assert started_from(again(*command, FALL_BACK)).startswith(f"{six}/iter_0000006")


def test_a_run_killed_between_the_names_of_its_first_save_is_resumed(tmp_path: Path) -> None:
    """The checkpoint has its name and `latest` still has its temporary name; so does the next save leave it."""
    again("--train-iters 3 --save", tmp_path)
    (tmp_path / "latest").rename(tmp_path / ".tmp-latest")
    assert started_from(again("--train-iters 3 --save", tmp_path)).startswith(f"{tmp_path}/iter_0000003")
    again("--train-iters 4 --save", tmp_path)
    assert latest(tmp_path) == 4


# --- --exit-on-missing-checkpoint and --pretrained-checkpoint ---------------------------------------------------------


def test_exit_on_missing_checkpoint_ends_instead_of_starting_anew(tmp_path: Path) -> None:
    place = ("--load", tmp_path / "save", "--save", tmp_path / "save")
    ended = again(*place, "--exit-on-missing-checkpoint", code=4)
    ended.says(f"--exit-on-missing-checkpoint: {tmp_path}/save holds no checkpoint")
    assert "accepted without effect" not in ended.out
    again(*place, "--train-iters 1")
    again(*place, "--train-iters 2 --exit-on-missing-checkpoint")
    again("--exit-on-missing-checkpoint", code=2).says("--exit-on-missing-checkpoint needs --load")


def test_a_pretrained_checkpoint_must_be_there(tmp_path: Path) -> None:
    again("--pretrained-checkpoint", tmp_path / "none", code=4).says(f"{tmp_path}/none holds no checkpoint")


def test_the_options_of_the_start_are_kept_in_each_checkpoint(six: Path, tmp_path: Path) -> None:
    again("--finetune --load", six, "--train-iters 1 --save", tmp_path)
    saved = json.loads((tmp_path / "iter_0000001" / "run.json").read_text())["checkpoint"]
    assert (saved["finetune"], saved["load"]) == (True, str(six))
