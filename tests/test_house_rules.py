"""Every house rule over the repository, and over a snippet that breaks it: a rule that cannot fail says nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import house_rules as rules
from tests.house_rules import Rule, Source

ROOT = Path(__file__).resolve().parents[1]
HEAD = '"""Doc."""\nfrom __future__ import annotations\n'


@pytest.fixture(scope="module")
def sources() -> list[Source]:
    found = rules.read_sources(ROOT)
    assert len(found) > 20, f"only {len(found)} source files were found under {ROOT}"
    return found


# rule -> a file that breaks it (path, text), and what the rule must say of it
BAD: dict[Rule, tuple[str, str, str]] = {
    rules.forbidden_imports: (
        "megatron3d/data/x.py", "from megatron3d.comm.mesh import Mesh\n", "data may not import megatron3d.comm.mesh"
    ),
    rules.pipeline_values_that_act: ("megatron3d/pipeline/orders/named.py", "import torch\n", "imports torch"),
    rules.import_cycles: (
        "megatron3d/nn/a.py", "import megatron3d.nn.b\n", "megatron3d.nn.a -> megatron3d.nn.b -> megatron3d.nn.a"
    ),
    rules.private_imports: (
        "megatron3d/nn/x.py", "from megatron3d.params.boxes import _in_row\n", "megatron3d.params.boxes._in_row"
    ),
    rules.imports_out_of_place: ("megatron3d/nn/x.py", "def f() -> None:\n    import torch.nn\n", "inside a function"),
    rules.slow_imports_at_the_start: (
        "megatron3d/train/loop.py", "from matplotlib.figure import Figure\n", "matplotlib.figure slows the start"
    ),
    rules.missing_future_annotations: ("megatron3d/nn/x.py", "import torch\n", "megatron3d/nn/x.py"),
    rules.class_names_defined_twice: (
        "megatron3d/nn/a.py", "class Once: ...\n", "megatron3d/nn/a.py and megatron3d/nn/b.py both define Once"
    ),
    rules.distributed_outside_comm: (
        "megatron3d/nn/x.py", "from torch import distributed as dist\n", "names torch.distributed"
    ),
    rules.cuda_outside_its_module: ("megatron3d/nn/x.py", "import torch\ntorch.cuda.synchronize()\n", "x.py:4"),
    rules.environment_outside_launch: ("megatron3d/nn/x.py", "import os\nos.environ['A']\n", "names os.environ"),
    rules.fsync_outside_storage: ("tools/x.py", "import os\nos.fsync(3)\n", "names os.fsync"),
    rules.global_statements: ("tools/x.py", "def f() -> None:\n    global state\n", "global state"),
    rules.swallowed_errors: ("tools/x.py", "try:\n    f()\nexcept Exception:\n    pass\n", "goes on"),
    # What the rule must find: an example, not a mark.
    rules.unfinished_marks: ("tools/x.py", "raise NotImplementedError\n", "NotImplementedError"),
    rules.unsafe_loading: ("tools/x.py", "torch.load('f', map_location='cpu')\n", "without weights_only"),
    rules.long_files: ("tools/x.py", "a = 1\n" * 499, "501 lines"),
    rules.long_functions: ("tools/x.py", "def f() -> None:\n" + "    a = 1\n" * 80, "f has 81 lines"),
    rules.functions_too_long_on_the_whole: ("tools/x.py", "def f() -> None:\n" + "    a = 1\n" * 40, "p90 is 41"),
    rules.too_many_arguments: ("tools/x.py", "def f(a, b, c, d, e, g, h): ...\n", "f takes 7 by position"),
    rules.functions_of_whole_runs: (
        "megatron3d/nn/x.py", "def f(run: RunConfig) -> None: ...\n" * 40, "40 functions take RunConfig, over 39"
    ),
    rules.missing_docstrings: ("tools/x.py", "class A:\n    'Doc.'\n    def f(self): ...\n", "A.f"),
    rules.untyped_functions: ("tools/x.py", "def f(a: int, *, b) -> None: ...\n", "x.py:3: f"),
    rules.messages_without_a_value: ("tools/x.py", "raise ValueError('wrong')\n", "ValueError('wrong')"),
    rules.attribute_probes: ("tools/x.py", "getattr(x, 'y', None)\n", "getattr(x, 'y', None)"),
}  # fmt: skip
OTHER_FILE = Source("megatron3d/nn/b.py", HEAD + "from megatron3d.nn import a\n\n\nclass Once: ...\n")

# rule -> a file that comes close and is fine
GOOD: list[tuple[Rule, str, str]] = [
    (rules.forbidden_imports, "megatron3d/pipeline/run.py", "from megatron3d.comm.mesh import Mesh\n"),
    (rules.forbidden_imports, "megatron3d/train/x.py", "from megatron3d.zero.unit import FlatUnit\n"),
    (rules.imports_out_of_place, "megatron3d/train/x.py", "def f() -> None:\n    import wandb\n"),
    (rules.imports_out_of_place, "pretrain_x.py", "def main() -> None:\n    import torch\n"),
    (rules.distributed_outside_comm, "megatron3d/comm/x.py", "import torch.distributed as dist\n"),
    (rules.distributed_outside_comm, "megatron3d/nn/x.py", "# torch.distributed is not used here\n"),
    (rules.distributed_outside_comm, "tools/bench/peers/x.py", "import torch.distributed as dist\n"),
    (rules.environment_outside_launch, "tools/bench/peers/start.py", "import os\nos.environ | {}\n"),
    (rules.cuda_outside_its_module, "megatron3d/comm/device.py", "import torch\ntorch.cuda.synchronize()\n"),
    (rules.swallowed_errors, "tools/x.py", "try:\n    f()\nexcept Exception as e:\n    raise A(e) from e\n"),
    (rules.swallowed_errors, "tools/x.py", "try:\n    f()\nexcept KeyError:\n    pass\n"),
    (rules.unsafe_loading, "tools/x.py", "torch.load('f', weights_only=True)\n"),
    (rules.missing_docstrings, "tools/x.py", "def _f(): ...\nclass _A:\n    def f(self): ...\n"),
    (rules.messages_without_a_value, "tools/x.py", "raise ValueError(f'{x} is wrong')\n"),
    (rules.too_many_arguments, "kernels/megatron3d_kernels/x.py", "@triton.jit\ndef f(a, b, c, d, e, g, h): ...\n"),
    (rules.functions_of_whole_runs, "megatron3d/nn/x.py", "def f(model: ModelConfig) -> RunConfig: ...\n" * 40),
    (rules.missing_future_annotations, "megatron3d/nn/__init__.py", ""),
]


@pytest.mark.parametrize("rule", BAD, ids=lambda rule: rule.__name__)
def test_repository_keeps_the_rule(rule: Rule, sources: list[Source]) -> None:
    offenders = rule(sources)
    assert not offenders, f"{rule.__doc__}\n  " + "\n  ".join(offenders)


@pytest.mark.parametrize("rule", BAD, ids=lambda rule: rule.__name__)
def test_rule_catches_a_file_that_breaks_it(rule: Rule) -> None:
    path, text, message = BAD[rule]
    head = "" if rule is rules.missing_future_annotations else HEAD
    offenders = rule([Source(path, head + text), OTHER_FILE])
    assert message in "\n".join(offenders)


@pytest.mark.parametrize(("rule", "path", "text"), GOOD, ids=lambda value: getattr(value, "__name__", None))
def test_rule_lets_a_file_pass_that_comes_close(rule: Rule, path: str, text: str) -> None:
    assert rule([Source(path, text if not text else HEAD + text)]) == []


def test_a_room_without_a_row_in_the_table_is_an_offender() -> None:
    assert "room 'attic' has no row" in rules.forbidden_imports([Source("megatron3d/attic/x.py", HEAD)])[0]


def test_a_script_may_not_be_imported() -> None:
    tool = Source("tools/preprocess_data.py", HEAD)
    user = Source("megatron3d/train/x.py", HEAD + "from tools.preprocess_data import main\n")
    assert "imports the script tools.preprocess_data" in rules.forbidden_imports([tool, user])[0]
    harness = Source("tools/bench/rounds.py", HEAD)
    benchmark = Source("tools/bench/compare.py", HEAD + "from tools.bench.rounds import take_turns\n")
    other = Source("tools/estimate.py", HEAD + "from tools.bench.rounds import take_turns\n")
    assert not rules.forbidden_imports([harness, benchmark])
    assert "imports the script tools.bench.rounds" in rules.forbidden_imports([harness, other])[0]


def test_every_room_of_the_package_has_a_row_in_the_table() -> None:
    rooms = {path.name for path in (ROOT / "megatron3d").iterdir() if (path / "__init__.py").exists()}
    assert rooms <= set(rules.MAY_IMPORT), f"without a row: {sorted(rooms - set(rules.MAY_IMPORT))}"


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["lint", "format"])
def test_ruff_is_content(command: list[str]) -> None:
    ran = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_ruff_looks_at_the_pool_although_its_folder_is_named_dist() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--show-files"], cwd=ROOT, capture_output=True, text=True
    )
    assert str(ROOT / "tests/dist/pool.py") in ran.stdout.split()


def test_kernels_folder_is_no_package_so_that_hugging_face_kernels_stays_importable(tmp_path: Path) -> None:
    """With both our paths on sys.path, as tests and an installation have them, `kernels` is Hugging Face's package."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("maker = 'hugging face'\n")
    assert not (ROOT / "kernels/__init__.py").exists()
    program = "import kernels, megatron3d, megatron3d_kernels; print(kernels.maker, megatron3d_kernels.__file__)"
    path = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'kernels')!r}, {str(tmp_path)!r}]; "
    ran = subprocess.run([sys.executable, "-c", path + program], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["hugging", "face", str(ROOT / "kernels/megatron3d_kernels/__init__.py")]
