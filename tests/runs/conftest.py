"""The launcher that the tests of whole runs share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.runs.harness import Launcher


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """A process that forks ranks which may die; see tests/runs/harness.py."""
    kept = Launcher(tmp_path_factory.mktemp("ranks"))
    yield kept
    kept.close()
