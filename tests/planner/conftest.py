"""Prints how near the predicted peaks come, as the table of docs/memory.md."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import table_of

TITLE = """peak memory of the rank that is furthest off, in 10^6 bytes
| case | processes | state | activations | buffers | predicted peak | measured | off |
|---|---:|---:|---:|---:|---:|---:|---:|"""


@pytest.fixture
def peak_table(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Rows that a test appends to."""
    yield from table_of(TITLE, request)
