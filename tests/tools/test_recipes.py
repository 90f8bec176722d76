"""The recipes of CONTRIBUTING.md do what they promise, applied as they stand there to a copy of the project."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron3d.comm.layout import Layout
from tests.dist.pool import Pool
from tests.parity.compare import check_against_one_process
from tests.parity.runs import Case, trace_cases
from tools.check_docs import copy_checkout

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text().split("\n# Recipes\n")[1]
PLACE = re.compile(r"(?:New file|[Ii]n) `(?P<file>[\w/.]+)`(?:.*?(?P<side>above|below) `(?P<anchor>[^`]+)`)?")
BLOCK = re.compile(r"^   ```(?P<language>\w+)\n(?P<text>.*?)^   ```$", re.DOTALL | re.MULTILINE)
CHANGING = ("An optimizer", "A kernel", "A flag")
TESTS = {
    "An optimizer": "tests/optim/test_adagrad.py",
    "A kernel": "tests/kernels/test_references.py",
    "A flag": "tests/optim/test_dampening.py",
}


@dataclass(frozen=True)
class Step:
    """A numbered step with a block: a new file, lines beside a line of a file, or a command."""

    language: str
    text: str
    file: str = ""
    side: str = ""
    anchor: str = ""


def steps_of(title: str) -> list[Step]:
    """The steps of a recipe that have a block."""
    recipe = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    steps = []
    for step in re.split(r"^\d+\. ", recipe, flags=re.MULTILINE)[1:]:
        if block := BLOCK.search(step):
            text = textwrap.indent(textwrap.dedent(block["text"]), _indentation(block["text"]))
            place = PLACE.search(" ".join(step[: block.start()].split()))
            where = place.groupdict(default="") if place and block["language"] == "python" else {}
            steps.append(Step(block["language"], text, **where))
    return steps


def _indentation(block: str) -> str:
    """What the lines of a block are indented by beyond the list item that holds it."""
    return " " * (min(len(line) - len(line.lstrip()) for line in block.splitlines() if line.strip()) - 3)


def apply(step: Step, folder: Path) -> None:
    """Do what a step asks for, which names one line of the file that is there."""
    path = folder / step.file
    if not step.anchor:
        assert not path.exists(), f"{step.file} is there already"
        path.write_text(step.text)
        return
    lines = path.read_text().splitlines(keepends=True)
    places = [number for number, line in enumerate(lines) if line.strip() == step.anchor]
    assert len(places) == 1, f"{step.file} has {len(places)} lines {step.anchor!r}"
    lines.insert(places[0] + (step.side == "below"), step.text)
    path.write_text("".join(lines))


def environment(folder: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{folder}:{folder}/kernels", "OMP_NUM_THREADS": "1", **more}


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project to which all recipes that change it are applied."""
    folder = tmp_path_factory.mktemp("recipes") / "project"
    copy_checkout(ROOT, folder)
    for title in CHANGING:
        for step in steps_of(title):
            apply(step, folder)
    return folder


@pytest.fixture(scope="module")
def passed(changed: Path) -> dict[str, int]:
    """How many tests of each file passed in the changed project; one process for all of them."""
    report = changed / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *TESTS.values()]
    command += ["-k", "adagrad or dampening or softcap"]
    done = subprocess.run(command, cwd=changed, env=environment(changed), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    names = [case.get("classname", "") for case in ElementTree.parse(report).iter("testcase")]
    return {title: names.count(file.removesuffix(".py").replace("/", ".")) for title, file in TESTS.items()}


@pytest.mark.heavy
@pytest.mark.parametrize(("title", "num_tests"), [("An optimizer", 1), ("A kernel", 4), ("A flag", 3)])
def test_the_tests_that_a_recipe_brings_pass_in_a_project_that_followed_it(
    title: str, num_tests: int, passed: dict[str, int]
) -> None:
    assert passed[title] == num_tests


@pytest.mark.heavy
def test_the_kernel_of_the_recipe_is_chosen_on_gpus_and_agrees_in_tritons_interpreter(changed: Path) -> None:
    pytest.importorskip("triton", reason="needs the triton package")
    command = [sys.executable, "-m", "tests.kernels.run_interpreted", "softcap"]
    interpreted = environment(changed, TRITON_INTERPRET="1")
    done = subprocess.run(command, cwd=changed, env=interpreted, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {f"softcap-{dtype}": "" for dtype in ("float32", "bfloat16", "float16")}
    code = """
        import torch
        from megatron3d_kernels import Registry, TritonSupport
        registry = Registry(support=TritonSupport(installed=True, interpreted=False, detail=""))
        print(*(registry.choose("softcap", device, torch.bfloat16).implementation for device in ("cuda", "cpu")))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=environment(changed), capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["triton", "reference"], done.stderr


def test_what_the_recipes_add_is_written_as_the_project_is(changed: Path) -> None:
    files = sorted({step.file for title in CHANGING for step in steps_of(title)})
    for check in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *check, "--no-cache", *files]
        done = subprocess.run(command, cwd=changed, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout


def test_the_schedule_of_the_recipe_is_that_of_the_example_and_passes_the_checker(tmp_path: Path) -> None:
    order, command = steps_of("A pipeline schedule")
    example = (ROOT / "examples/my_pipeline_order.py").read_text()
    assert order.text.split("from megatron3d")[1] == example.split("from megatron3d")[1]
    apply(order, tmp_path)
    words = shlex.split(command.text.replace("tools/", f"{ROOT}/tools/"))
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=tmp_path, env=environment(ROOT), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "last in, first out" in done.stdout, done.stderr


@pytest.mark.parity
def test_the_schedule_of_the_recipe_trains_as_one_process_does(pool: Pool, tmp_path: Path) -> None:
    order = steps_of("A pipeline schedule")[0]
    apply(order, tmp_path)
    name = f"{tmp_path / order.file}:last_in_first_out"
    case = Case("llama-tied", Layout(pp=2), f"--pipeline-schedule {name}")
    by_rank = pool.run(2, trace_cases, [case], timeout_s=120)
    check_against_one_process(case, [traces[0] for traces in by_rank], [])
