"""The metrics file survives crashes and resumes with each step once, and draws into a picture."""

from __future__ import annotations

import json
import math
import os
import signal
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron3d.errors import DataError, StorageError
from megatron3d.train.loss_plot import accuracy_curves, load_curves, plot_losses, smoothed
from megatron3d.train.metrics import MetricsFile, StartRecord, StepRecord, read_records

START = StartRecord(
    model="GPT",
    parameters=1_234_567,
    layout={"tp": 2, "pp": 2, "dp": 1, "zero": 1},
    bytes_per_rank={"weights": 10, "gradients": 20, "optimizer": 30},
    predicted_bytes_per_rank={"weights": 10, "gradients": 20, "optimizer": 30, "peak": 90},
    schedule="1f1b",
    predicted_bubble=0.2,
)


def one_step(step: int, loss: float = 3.0, **more: float | bool | None) -> StepRecord:
    """A step with plausible numbers."""
    return StepRecord(
        step,
        loss,
        **{"grad_norm": 1.0, "lr": 1e-4, "consumed_samples": 8 * step, "tokens_per_second": 1e5, **more},
    )


def written(path: Path, first: int, last: int) -> MetricsFile:
    """A metrics file with these steps and an evaluation after every second one."""
    file = MetricsFile(path)
    file.start(START) if first == 1 else file.resume(first - 1, START)
    for step in range(first, last + 1):
        file.step(one_step(step))
        if step % 2 == 0:
            file.evaluation(step, 4.0)
    return file


def test_records_have_the_promised_names_in_the_promised_order(tmp_path: Path) -> None:
    written(tmp_path / "deep" / "m.jsonl", 1, 2).close()
    lines = [json.loads(line) for line in (tmp_path / "deep" / "m.jsonl").read_text().splitlines()]
    assert lines[0]["event"] == "start"
    for name in ("layout", "parameters", "bytes_per_rank", "predicted_bytes_per_rank", "schedule", "predicted_bubble"):
        assert name in lines[0]
    names = ["step", "loss", "grad_norm", "lr", "consumed_samples", "tokens_per_second", "skipped"]
    assert list(lines[1]) == names
    assert lines[3] == {"step": 2, "valid_loss": 4.0}


def test_each_record_is_in_the_file_before_the_next_step(tmp_path: Path) -> None:
    file = written(tmp_path / "m.jsonl", 1, 1)
    assert len(read_records(tmp_path / "m.jsonl")) == 2
    file.close()


@given(loss=st.floats(allow_nan=False, allow_infinity=False))
def test_losses_come_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, loss: float) -> None:
    path = tmp_path_factory.mktemp("bits") / "m.jsonl"
    with MetricsFile(path) as file:
        file.step(one_step(1, loss))
    assert struct.pack("d", read_records(path)[0]["loss"]) == struct.pack("d", loss)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_null_and_its_record_says_so(tmp_path: Path, bad: float) -> None:
    with MetricsFile(tmp_path / "m.jsonl") as file:
        file.step(one_step(1, bad, skipped=True))
        file.step(one_step(2, 2.0, grad_norm=None))
    text = (tmp_path / "m.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    first, second = read_records(tmp_path / "m.jsonl")
    assert first["loss"] is None and first["finite"] is False and first["skipped"] is True
    assert "finite" not in second and second["grad_norm"] is None


def test_a_resume_leaves_each_step_once_and_notes_where_it_went_on(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    written(path, 1, 9).close()
    written(path, 5, 7).close()  # from the checkpoint of step 4
    written(path, 5, 10).close()  # crashed, and again from the same checkpoint
    records = read_records(path)
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 11))
    assert [r["step"] for r in records if "valid_loss" in r] == [2, 4, 6, 8, 10]
    assert [r.get("event") for r in records if "event" in r] == ["start", "resume"]
    assert records.index(next(r for r in records if r.get("event") == "resume")) == 7
    assert next(r for r in records if r.get("event") == "resume")["from_step"] == 4


@pytest.mark.parametrize(
    "tail",
    [
        b'{"step": 4, "los',
        b'{"step": 4}',
        b"\x00\x00\x00\x00",
        b'{"st\x00\x00',
        b"\x00" * 8 + b"\n\n",
        '{"a": "\u00e9'.encode()[:-1],
    ],
)
def test_a_torn_last_line_is_dropped_by_a_resume(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "m.jsonl"
    written(path, 1, 3).close()
    with path.open("ab") as file:
        file.write(tail)
    written(path, 4, 5).close()
    assert [r["step"] for r in read_records(path) if "loss" in r] == [1, 2, 3, 4, 5]
    for line in path.read_text().splitlines():
        json.loads(line)


@pytest.mark.parametrize("damage", [b'{"step": 2', b"\x00" * 50, b"\xff\xfe", b"{} {}"])
def test_a_damaged_line_in_the_middle_is_left_out_of_a_resume_and_kept_aside(tmp_path: Path, damage: bytes) -> None:
    path, warnings = tmp_path / "m.jsonl", []
    written(path, 1, 5).close()
    lines = path.read_bytes().split(b"\n")
    lines[2] = damage
    path.write_bytes(before := b"\n".join(lines))
    with pytest.raises(DataError, match="Line 3"):
        read_records(path)
    file = MetricsFile(path, warn=warnings.append)
    file.resume(4, START)
    file.close()
    assert [r["step"] for r in read_records(path) if "loss" in r] == [1, 3, 4]
    assert (tmp_path / "m.jsonl.damaged").read_bytes() == before
    assert len(warnings) == 1 and f"Line 3 of {path} is not JSON" in warnings[0] and ".damaged" in warnings[0]


@pytest.mark.parametrize("text", ["3\n", "some notes\nof mine\n"])
def test_a_file_that_is_no_metrics_file_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=r"Line 1.*is it a metrics file"):
        MetricsFile(path).resume(1, START)
    assert path.read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_cutting_back_never_leaves_a_half_written_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.jsonl"
    written(path, 1, 5).close()
    before = path.read_bytes()

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError, match="No space left"):
        MetricsFile(path).cut_back(2)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


def test_a_new_run_keeps_the_old_file_beside_its_own(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    written(path, 1, 3).close()
    written(path, 1, 1).close()
    assert len(read_records(path)) == 2
    assert [r["step"] for r in read_records(tmp_path / "m.jsonl.previous") if "loss" in r] == [1, 2, 3]


def test_resuming_into_a_new_file_begins_with_a_start_record(tmp_path: Path) -> None:
    written(tmp_path / "m.jsonl", 6, 7).close()
    first, second = read_records(tmp_path / "m.jsonl")[:2]
    assert (first["event"], first["from_step"], second["step"]) == ("start", 5, 6)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_a_storage_error_with_the_option(tmp_path: Path) -> None:
    file = MetricsFile("/dev/full")
    with pytest.raises(StorageError, match=r"--metrics-file /dev/full.*No space left"):
        file.step(one_step(1))


def test_steps_before_a_sigkill_are_all_there(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from megatron3d.train.metrics import MetricsFile, StepRecord\n"
        "file = MetricsFile(sys.argv[1])\n"
        "for k in range(1, 8):\n"
        "    file.step(StepRecord(k, 3.0, 1.0, 1e-4, k, 1e5))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "m.jsonl"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=root, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert [r["step"] for r in read_records(path)] == list(range(1, 8))


def test_smoothing_equals_a_plain_mean_in_the_middle_and_does_not_lag_behind_a_line() -> None:
    losses = [5.0 - 0.01 * k for k in range(200)]
    means = smoothed(losses, 10)
    assert means[100] == pytest.approx(sum(losses[90:111]) / 21)
    assert means[:190] == pytest.approx(losses[:190])
    assert means[-1] == pytest.approx(sum(losses[-11:]) / 11)


@pytest.mark.parametrize("steps", [1, 2, 300])
def test_a_run_of_any_length_draws_a_png_of_the_promised_size(tmp_path: Path, steps: int) -> None:
    file = written(tmp_path / "m.jsonl", 1, steps)
    file.step(one_step(steps + 1, math.nan, skipped=True))
    file.close()
    plot_losses(tmp_path / "m.jsonl", tmp_path / "out" / "loss.png")
    data = (tmp_path / "out" / "loss.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (1920, 1080)


def test_accuracies_of_evaluations_and_loads_of_experts_get_panels_of_their_own(tmp_path: Path) -> None:
    file = written(tmp_path / "plain.jsonl", 1, 20)
    file.close()
    with written(tmp_path / "experts.jsonl", 1, 20) as experts:
        loads = {"expert_load/layer_1": 1.5, "router_entropy/layer_1": 0.1, "expert_load/layer_11": 2.0}
        experts.step(replace(one_step(21, 4.0), expert_loads=loads))
    with written(tmp_path / "more.jsonl", 1, 20) as more:
        more.evaluation(20, 4.0, {"valid_masked_accuracy": 0.3, "valid_unigram_accuracy": 0.05, "valid_lm_loss": 4.0})
    assert accuracy_curves(read_records(tmp_path / "plain.jsonl")) == {}
    assert accuracy_curves(read_records(tmp_path / "more.jsonl")) == {"masked": [(20, 0.3)], "unigram": [(20, 0.05)]}
    assert load_curves(read_records(tmp_path / "more.jsonl")) == {}
    assert load_curves(read_records(tmp_path / "experts.jsonl")) == {1: [(21, 1.5)], 11: [(21, 2.0)]}
    names = ("plain", "more", "experts")
    for name in names:
        plot_losses(tmp_path / f"{name}.jsonl", tmp_path / f"{name}.png")
    sizes = [struct.unpack(">II", (tmp_path / f"{name}.png").read_bytes()[16:24]) for name in names]
    assert sizes == [(1920, 1080)] * 3
    assert len({(tmp_path / f"{name}.png").read_bytes() for name in names}) == 3


def test_a_file_without_a_loss_is_not_drawn(tmp_path: Path) -> None:
    with MetricsFile(tmp_path / "m.jsonl") as file:
        file.start(START)
    with pytest.raises(DataError, match="no finite training loss"):
        plot_losses(tmp_path / "m.jsonl", tmp_path / "loss.png")
    with pytest.raises(DataError, match="cannot be read"):
        plot_losses(tmp_path / "absent.jsonl", tmp_path / "loss.png")


def test_a_line_that_is_nested_too_deep_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text("[" * 100_000 + '\n{"step": 1}\n')
    with pytest.raises(DataError, match=r"Line 1 of .*m\.jsonl is not JSON \(it is nested too deep"):
        read_records(tmp_path / "m.jsonl")
