"""What shows a run never ends it: full disks, services that raise, and files that come back."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron3d.config.sections.train import TrainConfig
from megatron3d.errors import TrackerError
from megatron3d.train.metrics import MetricsFile, read_records
from megatron3d.train.trackers import Trackers
from megatron3d.train.writers import TensorBoardWriter
from tests.train.test_metrics import START, one_step
from tests.train.test_writers import curve


@contextmanager
def file_size_limit(size_bytes: int) -> Iterator[None]:
    """A full disk for this process: no file grows beyond this size (Python ignores the signal that comes with it)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def opened(train: TrainConfig, warnings: list[str], *, resumed_step: int = 0) -> Trackers:
    trackers = Trackers(train, warn=warnings.append)
    trackers.open(START, run={}, resumed_step=resumed_step)
    return trackers


def test_a_metrics_file_on_a_full_disk_is_reported_once_and_continues_where_there_is_space_again(
    tmp_path: Path,
) -> None:
    path, warnings = tmp_path / "m.jsonl", []
    trackers = opened(TrainConfig(micro_batch_size=1, global_batch_size=1, metrics_file=str(path)), warnings)
    trackers.step(one_step(1))
    with file_size_limit(path.stat().st_size + 40):  # half a line fits
        for step in (2, 3, 4):
            trackers.step(one_step(step))
    trackers.step(one_step(5))
    trackers.close()
    assert [r["step"] for r in read_records(path) if "loss" in r] == [1, 5]
    assert all(json.loads(line) for line in path.read_text().splitlines()), "no line may be torn"
    first, last = warnings
    assert f"--metrics-file {path} cannot be written: File too large" in first and "continues" in first
    assert last == f"--metrics-file {path} missed 3 records between steps 2 and 4"


def test_a_metrics_file_that_is_full_at_the_start_begins_with_its_start_record_later(tmp_path: Path) -> None:
    path, warnings = tmp_path / "m.jsonl", []
    with file_size_limit(10):
        trackers = opened(TrainConfig(micro_batch_size=1, global_batch_size=1, metrics_file=str(path)), warnings)
        trackers.step(one_step(1))
    trackers.step(one_step(2))
    trackers.close()
    records = read_records(path)
    assert (records[0]["event"], [r["step"] for r in records[1:]]) == ("start", [2])


def test_a_resume_on_a_full_disk_cuts_the_file_back_when_there_is_space(tmp_path: Path) -> None:
    path, warnings = tmp_path / "m.jsonl", []
    trackers = opened(TrainConfig(micro_batch_size=1, global_batch_size=1, metrics_file=str(path)), [])
    for step in range(1, 6):
        trackers.step(one_step(step))
    trackers.close()
    with file_size_limit(60):
        trackers = opened(
            TrainConfig(micro_batch_size=1, global_batch_size=1, metrics_file=str(path)), warnings, resumed_step=3
        )
        trackers.step(one_step(4))
    for step in (5, 6):
        trackers.step(one_step(step))
    trackers.close()
    assert [r["step"] for r in read_records(path) if "loss" in r] == [1, 2, 3, 5, 6]
    assert [r["event"] for r in read_records(path) if "event" in r] == ["start", "resume"]
    assert warnings[-1].endswith("missed 2 records between steps 3 and 4")


def test_a_metrics_file_that_is_removed_is_begun_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "m.jsonl"
    trackers = opened(TrainConfig(micro_batch_size=1, global_batch_size=1, metrics_file=str(path)), [])
    trackers.step(one_step(1))
    path.unlink()
    path.parent.rmdir()
    trackers.step(one_step(2))
    trackers.close()
    assert [r["step"] for r in read_records(path)] == [2]


@pytest.mark.parametrize("kind", ["metrics_file", "tensorboard_dir"])
def test_a_path_that_can_never_be_written_is_refused_at_the_start(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrackerError, match=r"cannot be written: (Not a directory|File exists)"):
        opened(TrainConfig(micro_batch_size=1, global_batch_size=1, **{kind: str(tmp_path / "file" / "below")}), [])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_device_is_neither_read_back_nor_replaced(tmp_path: Path) -> None:
    warnings: list[str] = []
    for resumed_step in (0, 4):
        trackers = opened(
            TrainConfig(micro_batch_size=1, global_batch_size=1, metrics_file="/dev/full"),
            warnings,
            resumed_step=resumed_step,
        )
        trackers.step(one_step(resumed_step + 1))
        trackers.close()
    assert [w for w in warnings if "No space left" in w] == warnings[::2]
    assert Path("/dev/full").is_char_device()
    file = MetricsFile("/dev/null")
    file.resume(4, START)
    assert Path("/dev/null").is_char_device()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_on_a_full_disk_goes_on_in_another_file(tmp_path: Path) -> None:
    now = [0.0]
    writer = TensorBoardWriter(tmp_path, clock=lambda: now[0])
    writer.open()
    writer.write(1, {"loss": 1.0})
    used = max(file.stat().st_size for file in tmp_path.iterdir())
    failures = 0
    with file_size_limit(used):
        for step in (2, 3, 4):
            now[0] += 11.0  # so that every write is flushed
            try:
                writer.write(step, {"loss": 2.0})
            except TrackerError as error:
                assert "--tensorboard-dir" in str(error)
                failures += 1
    assert failures == 3
    now[0] += 31.0
    writer.write(5, {"loss": 5.0})
    writer.close()
    points = curve(tmp_path, "loss")
    assert points[0] == (1, 1.0) and points[-1] == (5, 5.0)


class AngryRun:
    """A Weights & Biases run that raises at every point and at the end."""

    def log(self, scalars: dict[str, float], step: int) -> None:
        raise KeyError(f"step {step}")

    def finish(self) -> None:
        raise RuntimeError("the network is gone")


def angry_wandb(monkeypatch: pytest.MonkeyPatch, init: Any) -> None:
    module = ModuleType("wandb")
    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)


def test_whatever_wandb_raises_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    angry_wandb(monkeypatch, lambda **_: AngryRun())
    warnings: list[str] = []
    trackers = opened(TrainConfig(micro_batch_size=1, global_batch_size=1, wandb_project="p"), warnings)
    for step in (1, 2):
        trackers.step(one_step(step))
    trackers.close()
    assert len(warnings) == 2
    assert "--wandb-project p refused a point: KeyError: 'step 1'" in warnings[0]
    assert warnings[1] == "--wandb-project p missed 3 records between steps 1 and 2"


def test_wandb_that_cannot_be_reached_ends_a_first_start_but_not_a_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("api.wandb.ai is out of reach")

    angry_wandb(monkeypatch, refuse)
    with pytest.raises(TrackerError, match=r"out of reach.*WANDB_MODE=offline"):
        opened(TrainConfig(micro_batch_size=1, global_batch_size=1, wandb_project="p"), [])
    warnings: list[str] = []
    trackers = opened(TrainConfig(micro_batch_size=1, global_batch_size=1, wandb_project="p"), warnings, resumed_step=7)
    trackers.step(one_step(8))
    trackers.close()
    assert "out of reach" in warnings[0] and len(warnings) == 2
