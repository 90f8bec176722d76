"""Prints the table of layout parity at the end of the run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import table_of

TITLE = (
    "layout parity: largest relative difference from one process\n"
    f"{'model':12s} {'layout':18s} {'loss':>8s} {'norm':>8s} {'gradient':>8s} steps  options"
)


@pytest.fixture
def parity_table(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Rows that a test appends to."""
    yield from table_of(TITLE, request)
