"""What the tests of whole runs share: the launcher, and one thread for the runs in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.runs.harness import Launcher


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """A process that forks ranks which may die; see tests/runs/harness.py."""
    kept = Launcher(tmp_path_factory.mktemp("ranks"))
    yield kept
    kept.close()


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Matrices this small are slower with more threads, and much slower where tests run side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
