"""Standard streams that are closed, full or gone end no process, and the other stream reports it once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BODY = """
import os, sys
from megatron3d.process.streams import patient_streams
with patient_streams():
    for number in range(3):
        print("line", number, flush=True)
    opened = os.open(os.devnull, os.O_RDONLY)
    print("fd", opened, file=sys.stderr)
    print("x" * 100_000)
"""


def run(shell: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PY": sys.executable, "BODY": BODY}
    return subprocess.run(["bash", "-c", shell], capture_output=True, text=True, env=environment, timeout=60)


def test_lines_reach_a_healthy_stream_whole_and_in_order() -> None:
    ran = run('"$PY" -c "$BODY"')
    assert ran.returncode == 0
    assert ran.stdout == "line 0\nline 1\nline 2\n" + "x" * 100_000 + "\n"


@pytest.mark.parametrize("flag", ["", "-u"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize(
    ("redirection", "reason"),
    [(">/dev/full", "No space left on device"), ("| head -1", "Broken pipe")],
    ids=["full disk", "closed pipe"],
)
def test_output_that_cannot_be_written_is_reported_once_and_ends_nothing(
    redirection: str, reason: str, flag: str
) -> None:
    ran = run(f'"$PY" {flag} -c "$BODY" {redirection}; echo code ${{PIPESTATUS[0]}} >&2')
    assert ran.stderr.count(f"standard output cannot be written ({reason})") == 1
    assert "bytes were lost" in ran.stderr
    assert ran.stderr.endswith("code 0\n"), ran.stderr
    assert "Traceback" not in ran.stderr and "Exception" not in ran.stderr


@pytest.mark.parametrize("closed", [">&-", "<&- >&-"])
def test_a_file_never_gets_the_number_of_a_closed_stream(closed: str) -> None:
    ran = run(f'"$PY" -c "$BODY" {closed}')
    assert ran.returncode == 0
    assert int(ran.stderr.split("fd ")[1]) > 2


def test_both_streams_gone_end_nothing() -> None:
    assert run('"$PY" -c "$BODY" >/dev/full 2>/dev/full').returncode == 0
