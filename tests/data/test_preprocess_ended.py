"""A preprocessing that is ended, by whom and however, leaves no process and no output, and is resumed from there."""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron3d.data.indexed import IndexedDatasetWriter
from megatron3d.data.prepare.array_messages import WithArrays, receive_answer, send_answer
from megatron3d.data.prepare.executors import Processes, Ray
from megatron3d.errors import ConfigError, PeerError

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).resolve().parents[2]
OUTPUTS = ["out.resume.json", "out_rejects.jsonl", "out_text_document.bin", "out_text_document.idx"]
WAYS = ["SIGTERM to the tool", "SIGINT to all", "SIGKILL to the tool", "SIGKILL to a worker"]
CODES = dict(zip(WAYS, (143, 130, -signal.SIGKILL, 6)))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 MB in two files, of which the reader makes 31 batches, with some empty texts and bad records."""
    folder, random_words = tmp_path_factory.mktemp("corpus"), random.Random(3)
    words = ["".join(random_words.choices("etaoin", k=random_words.randint(1, 9))) for _ in range(500)]
    for name, repeats in (("a.jsonl", 10_000), ("b.jsonl", 21_000)):
        lines = [
            json.dumps({"text": " ".join(random_words.choices(words, k=random_words.randrange(20)))})
            if number % 301
            else "no JSON"
            for number in range(1, repeats)
        ]
        (folder / name).write_text("\n".join(lines))
    return folder


def words_of(corpus: Path, prefix: Path, *more: object) -> list[str]:
    """The tool's arguments."""
    words = f"--input {corpus}/*.jsonl --output-prefix {prefix} --tokenizer-type ByteTokenizer"
    return [*words.split(), *map(str, more)]


@contextlib.contextmanager
def started(corpus: Path, prefix: Path, *, workers: int, lines: int = 1) -> Iterator[subprocess.Popen[str]]:
    """The tool at work, when it has written so many batches; in a group of its own, which is killed with the block."""
    more = ("--workers", workers, "--log-interval", 1, "--checkpoint-interval", 0)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tools/preprocess_data.py"), *words_of(corpus, prefix, *more)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        process_group=0,
    )
    try:
        assert process.stderr is not None
        for _ in range(lines):
            line = process.stderr.readline()
            assert "documents" in line, line
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


def end(process: subprocess.Popen[str], way: str) -> None:
    """End the tool, or one of its workers, and wait until no process of its group is left."""
    target, number = process.pid, signal.Signals[way.split()[0]]
    if way == "SIGKILL to a worker":
        target = next((pid for pid in processes_of_group(process.pid) if pid != process.pid), target)
    with contextlib.suppress(ProcessLookupError):  # it may be done
        os.killpg(target, number) if way == "SIGINT to all" else os.kill(target, number)
    process.wait(20)
    wait_until_gone(process.pid, timeout_s=10)


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run that nobody ended, by name."""
    folder = tmp_path_factory.mktemp("whole")
    assert importlib.import_module("tools.preprocess_data").main(words_of(corpus, folder / "out")) == 0
    assert sorted(os.listdir(folder)) == OUTPUTS
    return {name: (folder / name).read_bytes() for name in OUTPUTS}


@pytest.mark.parametrize(("way", "workers", "lines"), [*zip(WAYS, (2, 1, 2, 2), (3, 17, 9, 1))])
def test_a_run_that_is_ended_leaves_nobody_and_is_resumed_to_the_same_bytes(
    corpus: Path, whole: dict[str, bytes], tmp_path: Path, way: str, workers: int, lines: int
) -> None:
    with started(corpus, tmp_path / "out", workers=workers, lines=lines) as process:
        assert len(processes_of_group(process.pid)) == 1 + workers * (workers > 1)
        end(process, way)
        assert process.returncode == CODES[way]
        assert process.stderr is not None
        printed = process.stderr.read()
    assert "Traceback" not in printed
    assert way == "SIGKILL to the tool" or "the same command with --resume goes on" in printed
    left = {path.suffix for path in tmp_path.iterdir() if path.name != "out.resume.json"}
    assert left == {".partial"} and (tmp_path / "out.resume.json").exists()
    resume_and_compare(corpus, whole, tmp_path, least_documents=100)


def resume_and_compare(corpus: Path, whole: dict[str, bytes], folder: Path, *, least_documents: int) -> None:
    """The rest in this process: the same bytes, though somewhat more of them came from the run before."""
    state = folder / "out.resume.json"
    if least_documents:
        assert json.loads(state.read_text())["state"]["counts"]["num_documents"] >= least_documents
    assert importlib.import_module("tools.preprocess_data").main(words_of(corpus, folder / "out", "--resume")) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


def _work(number: int) -> int:
    if number == 30:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 20:
        raise FileNotFoundError("the file of number 20")
    return -number


def test_results_and_errors_come_in_order_and_a_lost_worker_is_an_error() -> None:
    before = set(multiprocessing.active_children())  # such as the pool of earlier tests
    done = Processes(2).map_in_order(_work, range(40))
    assert [next(done) for _ in range(20)] == [-number for number in range(20)]
    with pytest.raises(FileNotFoundError, match="the file of number 20") as caught:
        next(done)
    assert "in _work" in caught.value.__notes__[0]
    with pytest.raises(PeerError, match="One of the 2 workers was killed"):
        list(Processes(2).map_in_order(_work, range(21, 40)))
    assert set(multiprocessing.active_children()) <= before


@dataclass(frozen=True)
class Sized(WithArrays):
    """Arrays of several types, one of them larger than what a connection holds."""

    name: str
    columns: tuple[NDArray, ...]

    def arrays(self) -> tuple[NDArray, ...]:
        return self.columns

    def with_arrays(self, arrays: Sequence[NDArray]) -> Sized:
        return Sized(self.name, tuple(arrays))


def test_arrays_of_an_answer_travel_beside_it_and_half_of_one_is_an_end() -> None:
    ours, theirs = multiprocessing.Pipe()
    sent = Sized("one", (np.arange(400_000, dtype=np.uint16), np.empty(0, np.int64), np.arange(10)[::3]))
    sender = threading.Thread(target=send_answer, args=(theirs, True, sent))
    sender.start()
    is_result, found = receive_answer(ours)
    sender.join()
    assert is_result and found.name == "one"
    for array, expected in zip(found.columns, sent.columns, strict=True):
        assert array.dtype == expected.dtype and array.tolist() == expected.tolist()
    send_answer(theirs, False, ValueError("no"))
    assert str(receive_answer(ours)) == str((False, ValueError("no")))
    theirs.send((True, sent.with_arrays([]), [("<u2", 9)]))
    os.write(theirs.fileno(), b"half")
    theirs.close()
    with pytest.raises(EOFError):
        receive_answer(ours)


def test_an_address_of_ray_at_which_nobody_answers_is_an_error_at_once() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and not listening, so that connections are refused
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"--ray-address {address} cannot be reached"):
            next(Ray(1, address).map_in_order(len, ["item"]))


@pytest.mark.slow
def test_runs_killed_at_twenty_random_moments_are_resumed_to_the_same_bytes(
    corpus: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """The moments are spread over the time from the first batch to the end of a run, by chance; the seed is fixed."""
    with started(corpus, tmp_path / "out", workers=2) as process:
        begin_s = time.monotonic()
        process.communicate(timeout=60)
        duration_s = time.monotonic() - begin_s
    chance, ended = random.Random(20), Counter[str]()
    for number in range(100):
        folder, way = tmp_path / str(number), WAYS[ended.total() % 4]
        folder.mkdir()
        with started(corpus, folder / "out", workers=2) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=chance.random() * duration_s)
            if process.poll() is None:
                end(process, way)
        ended[way] += process.returncode != 0
        resume_and_compare(corpus, whole, folder, least_documents=0)
        if ended.total() == 20:
            return
    raise AssertionError(f"only {ended} of 100 runs were ended")


def test_without_resume_a_killed_run_is_replaced_and_a_line_says_so(
    corpus: Path, whole: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with started(corpus, tmp_path / "out", workers=1, lines=2) as process:
        end(process, "SIGKILL to the tool")
    assert importlib.import_module("tools.preprocess_data").main(words_of(corpus, tmp_path / "out")) == 0
    assert "The unfinished output of an earlier run is replaced; --resume would" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole


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
