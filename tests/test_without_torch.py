"""`--help` and mistakes of spelling are answered without torch, whose import takes seconds, on every rank of a job."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron3d.convert.export import DTYPES
from megatron3d.inference.embed import POOLINGS

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).resolve().parents[1]
TOOLS = (
    *("analyze_data", "convert_checkpoint", "deduplicate", "embed_text", "estimate", "export_onnx", "generate_text"),
    "inspect_dataset",
    *("merge_datasets", "preprocess_data", "quickstart_corpus", "serve_classifier", "show_schedule", "train_tokenizer"),
    "verify_checkpoint",
)
# What ranks of a job run, with a flag of each. A mistake ends the process, so that each call needs one of its own.
OF_RANKS = {"tools/finetune_glue.py": "--epochs", "pretrain_bert.py": "--mask-prob", "pretrain_gpt.py": "--num-layers"}
# What each of them must be given; a subcommand has the flags of convert_checkpoint.
FIRST = {"convert_checkpoint": ["hf-import"]}

# One process runs all tools, where `import torch` fails; it prints the exit code and what was said, by tool.
PROGRAM = """
import contextlib, io, json, runpy, sys
tools, last = json.loads(sys.argv[1]), sys.argv[2]
sys.modules["torch"] = None
found = {}
for tool, words in tools.items():
    sys.argv = [tool, *words, last]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            runpy.run_path(tool, run_name="__main__")
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
    found[tool] = [code, said.getvalue()]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def answers() -> dict[str, dict[str, tuple[int, str]]]:
    """For `--help` and a flag that no tool has: exit code and text of each tool."""
    found = {}
    for last in ("--help", "--no-such-flag=1"):
        tools = json.dumps({f"tools/{tool}.py": FIRST.get(tool, []) for tool in TOOLS})
        command = [sys.executable, "-c", PROGRAM, tools, last]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert ran.returncode == 0, ran.stderr
        found[last] = json.loads(ran.stdout)
    return found


def test_no_tool_is_left_out() -> None:
    others = {"finetune_glue", "torchrun", "check_docs"}  # torchrun is torch's own launcher
    assert {path.stem for path in (ROOT / "tools").glob("*.py")} - others == set(TOOLS)


@pytest.mark.parametrize("tool", TOOLS)
def test_help_of_a_tool_needs_no_torch(answers: dict[str, dict[str, tuple[int, str]]], tool: str) -> None:
    code, said = answers["--help"][f"tools/{tool}.py"]
    assert code == 0 and "usage:" in said


@pytest.mark.parametrize("tool", TOOLS)
def test_a_misspelt_flag_is_named_without_torch(answers: dict[str, dict[str, tuple[int, str]]], tool: str) -> None:
    code, said = answers["--no-such-flag=1"][f"tools/{tool}.py"]
    assert code == 2
    # argparse names required options first where they are missing.
    assert "--no-such-flag" in said or "the following arguments are required" in said or "is required" in said


@pytest.mark.parametrize("script", OF_RANKS)
def test_programs_of_ranks_need_no_torch_for_help_and_mistakes(script: str) -> None:
    program = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )

    def ran(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program, script, *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)

    helped = ran("--help")
    assert helped.returncode == 0 and OF_RANKS[script] in helped.stdout and not helped.stderr
    mistaken = ran("--num-layer", "2", "--tensor-model-parallel-size", "3")
    assert mistaken.returncode == 2 and not mistaken.stdout
    assert "--num-layer 2 is unknown; did you mean --num-layers?" in mistaken.stderr
    assert "A world of 1 ranks is not a multiple of tensor 3" in mistaken.stderr


def test_names_that_tools_offer_without_torch_are_those_of_the_package() -> None:
    for tool, name, expected in (
        ("convert_checkpoint", "DTYPE_NAMES", tuple(DTYPES)),
        ("embed_text", "POOLING_NAMES", POOLINGS),
    ):
        line = next(line for line in (ROOT / f"tools/{tool}.py").read_text().splitlines() if line.startswith(name))
        assert line.split(" = ")[1].split("  #")[0] == str(expected).replace("'", '"')
