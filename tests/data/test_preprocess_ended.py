"""A preprocessing that is ended leaves no process and no half-written file, whoever ends it and however."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron3d.data.indexed import IndexedDatasetWriter

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough text for many seconds: a pipe that never ends would do, but inputs are files."""
    path = tmp_path_factory.mktemp("corpus") / "big.jsonl"
    line = json.dumps({"text": "a word and another " * 200}) + "\n"
    path.write_text(line * 40_000)
    return path


@contextlib.contextmanager
def started(corpus: Path, prefix: Path, *, workers: int) -> Iterator[subprocess.Popen[str]]:
    """The tool at work, when it has begun to write; in a group of its own, which is killed at the end of the block."""
    words = f"--output-prefix {prefix} --tokenizer-type ByteTokenizer --workers {workers} --log-interval 100"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", str(corpus), *words.split()],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        process_group=0,
    )
    try:
        assert process.stderr is not None
        assert "documents" in process.stderr.readline()
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def processes_of_group(group: int) -> list[int]:
    """The living processes of a process group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, group_of = stat.read_text().rsplit(") ", 1)[1].split()[:3]
            if int(group_of) == group and state != "Z":
                found.append(int(stat.parent.name))
    return found


def wait_until_gone(group: int, *, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while left := processes_of_group(group):
        assert time.monotonic() < deadline, f"processes {left} still run after {timeout_s} s"
        time.sleep(0.05)


@pytest.mark.parametrize("to_all", [False, True], ids=["the tool", "its whole group"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_workers_and_removes_what_was_half_written(
    corpus: Path, tmp_path: Path, number: int, code: int, to_all: bool
) -> None:
    with started(corpus, tmp_path / "out", workers=2) as process:
        assert list(tmp_path.glob("*.partial")) and len(processes_of_group(process.pid)) == 3
        os.killpg(process.pid, number) if to_all else os.kill(process.pid, number)
        assert process.wait(20) == code
        wait_until_gone(process.pid, timeout_s=5)
        assert process.stderr is not None
        said = process.stderr.read()
        assert "Traceback" not in said and f"ended by {signal.Signals(number).name}" in said
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_tool_leaves_no_worker_and_the_next_run_removes_its_files(
    corpus: Path, tmp_path: Path, workers: int
) -> None:
    with started(corpus, tmp_path / "out", workers=workers) as process:
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
        wait_until_gone(process.pid, timeout_s=10)
    assert {path.suffix for path in tmp_path.iterdir()} == {".partial"}
    with IndexedDatasetWriter(tmp_path / "out_text_document", "<u2") as writer:
        writer.add_document([1, 2])
    assert sorted(os.listdir(tmp_path)) == ["out_text_document.bin", "out_text_document.idx"]


def test_what_another_run_is_writing_is_not_removed(tmp_path: Path) -> None:
    program = (
        "import sys; from megatron3d.data.indexed import IndexedDatasetWriter as W\n"
        "with W(sys.argv[1], '<u2') as writer:\n"
        "    writer.add_document([3]); print('ready', flush=True); sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "d")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert other.stdout is not None and other.stdout.readline() == b"ready\n"
    theirs = set(tmp_path.glob("*.partial"))
    with IndexedDatasetWriter(tmp_path / "d", "<u2") as writer:
        writer.add_document([1, 2])
        assert theirs < set(tmp_path.glob("*.partial"))
    assert set(tmp_path.glob("*.partial")) == theirs
    other.communicate(timeout=20)
    assert other.returncode == 0 and not list(tmp_path.glob("*.partial"))
