"""The small classifiers as ONNX files, exported once by the tool, and one service that all requests go to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron3d.checkpoint.directory import find_checkpoint
from megatron3d.comm.layout import Layout
from tests.dist.pool import Pool
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
    """The classifiers by name, see `small.KINDS`; each is made when first asked for."""
    made: dict[str, Exported] = {}

    def get(name: str) -> Exported:
        if name not in made:
            folder, layout = tmp_path_factory.mktemp(name), LAYOUTS[name]
            write_vocabulary(folder)
            if layout.world_size == 1:
                write_checkpoint(0, 1, KINDS[name], layout, folder)
            else:
                pool.run(layout.world_size, write_checkpoint, KINDS[name], layout, folder)
            path = folder / "exports" / f"{name}.onnx"
            words = ["--load", str(folder), "--output", str(path)]
            words += ["--label-names", "negative", "positive"] if name == "single" else []
            report = export_onnx.export(export_onnx.parser().parse_args(words))
            made[name] = Exported(find_checkpoint(folder), layout, path, report)
        return made[name]

    return get


@pytest.fixture(scope="session")
def service(exported: Callable[[str], Exported]) -> Iterator[Started]:
    """The classifier of single texts behind HTTP, with limits that tests can reach."""
    options = "--max-body-bytes 4096 --max-texts 8 --max-batch 8 --threads 1"
    with start("--model", exported("single").path, *options.split()) as started:
        yield started
