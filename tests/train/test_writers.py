"""Curves arrive in TensorBoard's event files and in Weights & Biases, and a refused write is reported."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron3d.errors import ConfigError, StorageError, TrackerError
from megatron3d.train.writers import TensorBoardWriter, WandbWriter


def curve(directory: Path, name: str) -> list[tuple[int, float]]:
    """The points of a curve as TensorBoard itself reads them."""
    events = EventAccumulator(str(directory))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars(name)]


def test_tensorboard_reads_back_what_was_written(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path)
    writer.open()
    for step in (1, 2, 3):
        writer.write(step, {"loss": 4.0 - step, "lr": 0.5 * step})
    writer.close()
    assert curve(tmp_path, "loss") == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert curve(tmp_path, "lr") == [(1, 0.5), (2, 1.0), (3, 1.5)]


def backdate(directory: Path) -> None:
    """Rename the event files below a directory as if they were a second older: within a second TensorBoard orders
    files by a counter, as text, so that file 10 would come before file 9."""
    for file in sorted(directory.rglob("events.out.tfevents.*")):
        events, out, tfevents, second, rest = file.name.split(".", 4)
        file.rename(file.with_name(f"{events}.{out}.{tfevents}.{int(second) - 1}.{rest}"))


def test_points_beyond_the_checkpoint_are_hidden_after_a_resume(tmp_path: Path) -> None:
    for resumed_step, value in ((0, 1.0), (2, 5.0)):
        writer = TensorBoardWriter(tmp_path, resumed_step=resumed_step)
        writer.open()
        for step in range(resumed_step + 1, 5):
            writer.write(step, {"loss": value})
        writer.close()
        backdate(tmp_path)
    assert curve(tmp_path, "loss") == [(1, 1.0), (2, 1.0), (3, 5.0), (4, 5.0)]


def test_a_tensorboard_directory_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="--tensorboard-dir"):
        TensorBoardWriter(tmp_path / "file" / "below").open()


def test_wandb_that_is_not_installed_names_the_command_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # what Python itself does for a module known to be absent
    with pytest.raises(ConfigError, match=r"--wandb-project p .*pip install -c .*\[wandb\]"):
        WandbWriter("p", run={}).open()


def test_wandb_gets_project_team_name_directory_configuration_and_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    class Run:
        """Notes what it is given."""

        def log(self, scalars: dict[str, float], step: int) -> None:
            """A point."""
            calls.append((step, scalars))

        def finish(self) -> None:
            """The end."""
            calls.append("finished")

    module = ModuleType("wandb")
    module.init = lambda **options: calls.append(options) or Run()
    monkeypatch.setitem(sys.modules, "wandb", module)
    folder = str(tmp_path / "new")
    writer = WandbWriter("p", entity="team", name="n", directory=folder, run={"lr": 0.1})
    writer.open()
    writer.write(3, {"loss": 2.5})
    writer.close()
    options = {"project": "p", "entity": "team", "name": "n", "dir": folder, "config": {"lr": 0.1}}
    assert calls == [options, (3, {"loss": 2.5}), "finished"]
    assert (tmp_path / "new").is_dir()


def test_a_package_that_exits_instead_of_raising_is_a_tracker_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(*_: Any, **__: Any) -> None:
        raise SystemExit("wandb: ERROR not logged in")

    module = ModuleType("wandb")
    module.init = leave
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(TrackerError, match="cannot be started: SystemExit: wandb: ERROR not logged in"):
        WandbWriter("p", run={}).open()
    run = ModuleType("run")
    run.log, run.finish, module.init = leave, leave, lambda **_: run
    writer = WandbWriter("p", run={})
    writer.open()
    with pytest.raises(TrackerError, match="refused a point: SystemExit"):
        writer.write(1, {"loss": 1.0})
    with pytest.raises(TrackerError, match="did not finish: SystemExit"):
        writer.close()


def test_a_tensorboard_that_exits_instead_of_raising_is_a_tracker_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(*_: Any, **__: Any) -> None:
        raise SystemExit(4)

    writer = TensorBoardWriter(tmp_path)
    writer.open()
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", leave)
    with pytest.raises(TrackerError, match="SystemExit: 4"):
        writer.write(1, {"loss": 1.0})


def test_a_wandb_that_exits_on_import_is_a_package_that_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb.py").write_text("raise SystemExit('too old a Python')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ConfigError, match=r"cannot be imported \(SystemExit: too old a Python"):
        WandbWriter("p", run={}).open()


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_offline_writes_a_run_to_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    writer = WandbWriter("p", directory=str(tmp_path), run={})
    writer.open()
    writer.write(1, {"loss": 2.5})
    writer.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
