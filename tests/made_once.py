"""What several test files use and one process makes: a folder that the processes of pytest-xdist share."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder of this name, which `make` has filled in this run of pytest.

    The process that asks first makes it; others wait until it is done. If `make` raises, the next to ask tries again.
    Tests only read what is there.

    Args:
        factory: pytest's own.
        name: unique within the tests.
        make: called with an empty folder.
    """
    base = factory.getbasetemp()
    # Each process of pytest-xdist has a folder of its own, such as popen-gw0, in that of the run.
    common = (base.parent if base.name.startswith("popen-") else base) / "made-once"
    common.mkdir(exist_ok=True)
    folder, done = common / name, common / f"{name}.done"
    with (common / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder
