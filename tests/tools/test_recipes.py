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
from tests.runs import harness
from tools import estimate
from tools.check_docs import copy_checkout

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text().split("\n# Recipes\n")[1]
PLACE = re.compile(r"(?:New file|[Ii]n) `(?P<file>[\w/.]+)`(?:.*?(?P<side>above|below) `(?P<anchor>[^`]+)`)?")
BLOCK = re.compile(r"^   ```(?P<language>\w+)\n(?P<text>.*?)^   ```$", re.DOTALL | re.MULTILINE)
CHANGING = ("An optimizer", "A model that ships with the project", "A kernel", "A flag")
TESTS = {
    "An optimizer": "tests/optim/test_adagrad.py",
    "A model that ships with the project": "tests/models/test_sandwich.py",
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
    command += ["-k", "adagrad or sandwich or dampening or softcap"]
    done = subprocess.run(command, cwd=changed, env=environment(changed), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    names = [case.get("classname", "") for case in ElementTree.parse(report).iter("testcase")]
    return {title: names.count(file.removesuffix(".py").replace("/", ".")) for title, file in TESTS.items()}


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("title", "num_tests"),
    [("An optimizer", 1), ("A model that ships with the project", 2), ("A kernel", 7), ("A flag", 3)],
)
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


@pytest.mark.parity
def test_the_model_of_the_recipe_trains_as_one_process_does(pool: Pool, tmp_path: Path) -> None:
    file = steps_of("A model")[0]
    apply(file, tmp_path)
    architecture = f"--architecture {tmp_path / file.file}:PARALLEL"
    case = Case("llama-tied", Layout(tp=2, pp=2), f"{architecture} --sequence-parallel")
    by_rank = pool.run(4, trace_cases, [case], timeout_s=120)
    traces = [traces[0] for traces in by_rank]
    check_against_one_process(case, traces, [], of_model=architecture)
    assert "layers.1.norm.weight" in traces[0].gradients and "layers.1.mlp_norm.weight" not in traces[0].gradients
    assert traces[0].losses[-1] < traces[0].losses[0] - 0.3


@pytest.mark.heavy
def test_the_commands_of_the_recipe_for_a_model_estimate_train_resume_and_generate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, estimated, trained = steps_of("A model")
    apply(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert estimate.main(_words_of(estimated)[2:]) == 0
    # Of H = 1024: 24 blocks of a norm (2H), 4 H x H matrices of attention and 8 of the MLP with their biases (4 + 5 H).
    count = (50257 + 1024) * 1024 + 24 * (12 * 1024**2 + (2 + 4 + 5) * 1024) + 2 * 1024
    assert f"parallel GPT: {count:,} parameters" in capsys.readouterr().out
    words = [*_words_of(trained)[2:], "--device", "cpu", "--metrics-file", "metrics.jsonl"]
    assert harness.run(words).code == 0
    found = harness.losses(tmp_path / "metrics.jsonl")
    assert len(found) == 10 and found[-1] < found[0] - 0.3
    resumed = harness.run([*words, "--train-iters", "12", "--override-opt-param-scheduler"])
    assert resumed.code == 0 and len(harness.losses(tmp_path / "metrics.jsonl")) == 12, resumed.err
    prompt = ["--load", "out/my_model", "--tokenizer-type", "NullTokenizer", "--prompt", "7", "--device", "cpu"]
    tool = ROOT / "tools/generate_text.py"
    unnamed = harness.run(prompt, script=tool)
    assert unnamed.code == 2
    unnamed.says("my_model.py:PARALLEL, which is code that is run only where the command names it")
    text = harness.run([*prompt, "--max-new-tokens", "3", "--architecture", "my_model.py:PARALLEL"], script=tool)
    assert text.code == 0 and len(text.out.split()) == 4, text.err


def _words_of(step: Step) -> list[str]:
    return shlex.split(step.text.replace("\\\n", " "))
