"""Every fenced command of the documentation is either run by `tools/check_docs.py` or marked with the reason."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron3d.errors import ConfigError
from tools import check_docs
from tools.check_docs import Block, all_pages, blocks_of, page_blocks, run_block

ROOT = Path(__file__).resolve().parents[2]
PAGES = all_pages(ROOT)
BLOCKS = [block for page in PAGES for block in page_blocks(ROOT, page)]
SCRIPT = re.compile(r"(?:python|bash)\s+((?:tools|examples|tests)/[\w/.]+|pretrain_\w+\.py)")
INDENTED_COMMAND = re.compile(r"^    (?:\$ )?(?:python|pip|torchrun|bash|curl|printf|\.venv/|[A-Z_]+=)")


def test_every_page_and_example_is_looked_at() -> None:
    on_disk = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.sh")]
    assert {p.relative_to(ROOT).as_posix() for p in on_disk} == set(PAGES)
    assert len(PAGES) == len(set(PAGES))
    assert len([b for b in BLOCKS if b.skip is None]) >= 20


def test_every_block_that_is_left_out_has_a_reason() -> None:
    assert [b.place for b in BLOCKS if b.skip is not None and len(b.skip) < 5] == []


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.place)
def test_block_parses_in_its_language(block: Block) -> None:
    if block.language == "python":
        ast.parse(block.text)
    else:
        parsed = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True, timeout=30)
        assert parsed.returncode == 0, parsed.stderr


def test_every_script_that_a_block_names_is_there() -> None:
    named = [(b.place, name) for b in BLOCKS for name in SCRIPT.findall(b.text)]
    assert len(named) > 30
    assert [(place, name) for place, name in named if not (ROOT / name).is_file()] == []


def test_no_command_stands_in_an_indented_block_where_nothing_checks_it() -> None:
    found = []
    for page in (page for page in PAGES if page.endswith(".md")):
        fenced = False
        for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), start=1):
            fenced ^= line.startswith("```")
            if not fenced and INDENTED_COMMAND.match(line):
                found.append(f"{page}:{number}")
    assert found == []


def test_torchrun_on_one_machine_takes_a_free_port() -> None:
    commands = [(b.place, line) for b in BLOCKS for line in b.text.replace("\\\n", " ").splitlines()]
    commands += [(p.name, line) for p in (ROOT / "tools").glob("*.sh") for line in p.read_text().splitlines()]
    commands += [(p.name, line) for p in (ROOT / "examples").glob("*.sh") for line in p.read_text().splitlines()]
    started = [(place, line) for place, line in commands if re.search(r"(?:^|[\s/])torchrun --", line)]
    assert len(started) >= 8
    assert [place for place, line in started if not re.search(r"--standalone|--nnodes", line)] == []


def test_blocks_are_found_with_their_line_language_and_marker() -> None:
    text = "a\n```bash\nls\n```\n<!-- check: skip (needs a GPU) -->\n```python\n1\n```\n```\nno\n```\n```json\n1\n```\n"
    found = blocks_of(text, "p.md")
    assert [(b.place, b.language, b.text, b.skip) for b in found] == [
        ("p.md:2", "bash", "ls\n", None),
        ("p.md:6", "python", "1\n", "needs a GPU"),
    ]


def test_a_page_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--pages docs/none\.md is not a file"):
        page_blocks(ROOT, "docs/none.md")


def test_variables_last_through_a_page_and_failures_and_long_blocks_are_seen(tmp_path: Path) -> None:
    scratch, variables = tmp_path / "checkout", tmp_path / "variables"
    scratch.mkdir()

    def code(text: str, language: str = "bash", limit_s: float = 20.0) -> int | None:
        return run_block(Block("p.md", 1, language, text, None), scratch, variables, limit_s=limit_s).code

    assert code('FLAGS="-a\n  b"\n') == 0
    assert code('test "$FLAGS" = "-a\n  b"\n') == 0
    assert code("ONLY_HERE=1 python -c \"import os; os.environ['ONLY_HERE']\"\n") == 0
    assert code('test -z "${ONLY_HERE+set}"\n') == 0
    assert code("false\ntrue\n") == 1
    assert code("false | true\n") == 1
    assert code("import sys; sys.exit(3)\n", "python") == 3
    assert code("sleep 30\n", limit_s=0.5) == -1


def test_what_a_block_leaves_running_is_ended(tmp_path: Path) -> None:
    block = Block("p.md", 1, "bash", "sleep 300 &\necho $!\n", None)
    outcome = run_block(block, tmp_path, tmp_path / "variables", limit_s=20.0)
    stat = Path(f"/proc/{outcome.output.strip()}/stat")
    deadline = time.monotonic() + 10
    while stat.exists() and stat.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert outcome.code == 0
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


@pytest.mark.parametrize(("page", "command"), [("docs/memory.md", "estimate.py"), ("docs/pipeline.md", "--compare")])
@pytest.mark.heavy
def test_figures_under_a_command_are_those_it_prints(page: str, command: str, tmp_path: Path) -> None:
    (block,) = [b for b in page_blocks(ROOT, page) if command in b.text]
    outcome = run_block(block, ROOT, tmp_path / "variables", limit_s=120)
    assert outcome.code == 0, outcome.output
    after = (ROOT / page).read_text(encoding="utf-8").splitlines()[block.line + len(block.text.splitlines()) + 1 :]
    section = after[: next(number for number, line in enumerate(after) if line.startswith("## "))]
    printed = {line.strip() for line in outcome.output.splitlines()}
    shown = [line.strip() for line in section if re.match(r"\| +\d+ \||    \S", line)]
    assert len(shown) >= 3
    assert [line for line in shown if line not in printed] == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_command_of_the_documentation_works() -> None:
    ran = subprocess.run([sys.executable, check_docs.__file__], text=True, capture_output=True, timeout=3500)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
