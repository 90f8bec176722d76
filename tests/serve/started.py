"""`tools/serve_classifier.py` as a process of its own on a free port."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_END_TIMEOUT_S = 60


@dataclass
class Started:
    """A running service: its process, its address, and what it has said so far."""

    process: subprocess.Popen[str]
    url: str
    lines: list[str]
    reader: threading.Thread

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.url.rpartition(":")[2])

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to end; returns its exit code once it has."""
        self.process.send_signal(number)
        code = self.process.wait(_END_TIMEOUT_S)
        self.reader.join(_END_TIMEOUT_S)
        return code


def command(*options: str | Path) -> list[str]:
    """The command line of the service."""
    return [sys.executable, str(ROOT / "tools" / "serve_classifier.py"), *map(str, options)]


@contextmanager
def start(*options: str | Path) -> Iterator[Started]:
    """A service on a free port, ready for requests; ended with the block."""
    process = subprocess.Popen(command(*options, "--port", "0"), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    lines: list[str] = []
    ready = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line.rstrip())
            if line.startswith("serving on"):
                ready.set()
        ready.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert ready.wait(120), "the service said nothing for two minutes"
        address = re.fullmatch(r"serving on (http://\S+)", lines[-1])
        assert address is not None, "\n".join(lines)
        yield Started(process, address[1], lines, reader)
    finally:
        process.kill()
        process.wait(_END_TIMEOUT_S)
