"""The small classifiers as ONNX files, exported once by the tool, and one service that all requests go to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron3d.checkpoint.directory import find_checkpoint
from megatron3d.comm.layout import Layout
from tests.dist.pool import Pool
from tests.made_once import made_once
from tests.serve.small import KINDS, write_checkpoint, write_vocabulary
from tests.serve.started import Started, start
from tools import export_onnx

# The layout that writes each checkpoint; all are exported by one process.
LAYOUTS = {"single": Layout(tp=2, pp=2), "pairs": Layout(), "regression": Layout()}


@dataclass(frozen=True)
class Exported:
    """A checkpoint, the layout that wrote it, its ONNX file, and what the tool reported."""

    checkpoint: Path
    layout: Layout
    path: Path
    report: dict[str, Any]


@pytest.fixture(scope="session")
def exported(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """The classifiers by name, see `small.KINDS`; each is made when first asked for, for all processes."""

    def make(name: str, folder: Path) -> None:
        layout = LAYOUTS[name]
        write_vocabulary(folder)
        if layout.world_size == 1:
            write_checkpoint(0, 1, KINDS[name], layout, folder)
        else:
            pool.run(layout.world_size, write_checkpoint, KINDS[name], layout, folder)
        words = ["--load", str(folder), "--output", str(folder / "exports" / f"{name}.onnx")]
        words += ["--label-names", "negative", "positive"] if name == "single" else []
        report = export_onnx.export(export_onnx.parser().parse_args(words))
        (folder / "report.json").write_text(json.dumps(report))

    def get(name: str) -> Exported:
        folder = made_once(tmp_path_factory, f"classifier-{name}", partial(make, name))
        report = json.loads((folder / "report.json").read_text())
        return Exported(find_checkpoint(folder), LAYOUTS[name], folder / "exports" / f"{name}.onnx", report)

    return get


@pytest.fixture(scope="session")
def service(exported: Callable[[str], Exported]) -> Iterator[Started]:
    """The classifier of single texts behind HTTP, with limits that tests can reach."""
    options = "--max-body-bytes 4096 --max-texts 8 --max-batch 8 --threads 1"
    with start("--model", exported("single").path, *options.split()) as started:
        yield started
