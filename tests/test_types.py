"""The types of the package, as its users see them: pyright finds no error, and a resolved run keeps its promises."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron3d.config.check import resolve
from megatron3d.config.cli import parse_args

ROOT = Path(__file__).resolve().parents[1]
SHAPE = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 2 --lr 1e-3"
LENGTH = "--train-iters 10 --vocab-size 100 --mock-data"


@pytest.mark.heavy
def test_pyright_finds_no_error_in_the_package() -> None:
    pytest.importorskip("pyright", reason="pyright is not installed: pip install -e '.[test]'")
    ran = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson"], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    report = json.loads(ran.stdout)
    assert report["summary"]["filesAnalyzed"] > 200
    found = [
        f"{one['file']}:{one['range']['start']['line'] + 1}: {one['message']}" for one in report["generalDiagnostics"]
    ]
    assert found == []


@pytest.mark.parametrize(
    ("options", "architecture", "world_size"),
    [
        ("", "gpt", 1),
        ("", "bert", 2),
        ("--swiglu --group-query-attention --num-query-groups 2 --tensor-model-parallel-size 2", "gpt", 4),
        ("--pipeline-model-parallel-layout Ett|ttL --pipeline-model-parallel-size 2", "gpt", 2),
        ("--step-batch-size-schedule 0:4,1K:8", "gpt", 1),
    ],
)
def test_a_resolved_run_has_none_only_where_the_type_of_the_field_says_so(
    options: str, architecture: str, world_size: int
) -> None:
    given = parse_args(f"{SHAPE} {LENGTH} {options}".split(), program="t", description="t", architecture=architecture)
    run = resolve(given, world_size)
    sections = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
    untrue = [
        f"{name}.{field.name}: {field.type}"
        for name, section in sections.items()
        if dataclasses.is_dataclass(section)
        for field in dataclasses.fields(section)
        if getattr(section, field.name) is None and not str(field.type).endswith("| None")
    ]
    assert untrue == []


def test_both_packages_ship_the_mark_that_their_types_are_to_be_read() -> None:
    for package in ("megatron3d", "kernels/megatron3d_kernels"):
        assert (ROOT / package / "py.typed").is_file()
    assert '["py.typed"]' in (ROOT / "setup.py").read_text()
