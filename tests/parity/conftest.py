"""Prints the table of layout parity at the end of the run, and says how long its rows train."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import table_of
from tests.parity import runs

TITLE = (
    "layout parity: largest relative difference from one process\n"
    f"{'model':12s} {'layout':18s} {'loss':>8s} {'norm':>8s} {'gradient':>8s} steps  options"
)


def pytest_configure(config: pytest.Config) -> None:
    """Give brief rows all steps where `--whole-parity` asks for it."""
    if config.option.whole_parity:
        runs.BRIEF_STEPS = runs.NUM_STEPS


@pytest.fixture
def parity_table(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Rows that a test appends to."""
    yield from table_of(TITLE, request)
