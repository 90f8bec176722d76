"""Prints the table of layout parity at the end of the session."""

from __future__ import annotations

import pytest

TABLE = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def parity_table(request: pytest.FixtureRequest) -> list[str]:
    """Rows that the tests append to."""
    return request.config.stash.setdefault(TABLE, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Show the table."""
    rows = config.stash.get(TABLE, [])
    if rows:
        terminalreporter.section("layout parity: largest relative difference from one process")
        terminalreporter.write_line(f"{'model':12s} {'layout':18s} {'loss':>8s} {'norm':>8s} {'gradient':>8s}  options")
        for row in sorted(rows):
            terminalreporter.write_line(row)
