"""Prints how near the predicted peaks come, as the table of docs/memory.md."""

from __future__ import annotations

import pytest

TABLE = pytest.StashKey[list[str]]()
HEAD = (
    "| case | processes | state | activations | buffers | predicted peak | measured | off |",
    "|---|---:|---:|---:|---:|---:|---:|---:|",
)


@pytest.fixture(scope="session")
def peak_table(request: pytest.FixtureRequest) -> list[str]:
    """Rows that the tests append to."""
    return request.config.stash.setdefault(TABLE, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Show the table."""
    rows = config.stash.get(TABLE, [])
    if rows:
        terminalreporter.section("peak memory of the rank that is furthest off, in 10^6 bytes")
        for row in (*HEAD, *rows):
            terminalreporter.write_line(row)
