"""Run the commands of the documentation: every fenced bash and python block of README and docs, and the examples.

    python tools/check_docs.py                              everything, in the order of README's table of pages
    python tools/check_docs.py --list                       only what would run and what is left out, and why
    python tools/check_docs.py --pages README.md docs/glue.md

Blocks run one after the other in a scratch copy of the checkout, so that later ones find what earlier ones wrote; the
shell variables of a page are kept from block to block. A block that is not to be run is marked on the line before it:

    <!-- check: skip (needs 8 GPUs) -->

and a script of examples/ by a comment `# check: skip (reason)`. The exit code is 1 if a block failed.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron3d.config.tool_parser import ToolParser
from megatron3d.errors import ConfigError
from megatron3d.process.command import run_command

ROOT = Path(__file__).resolve().parents[1]
LANGUAGES = ("bash", "python")
_SKIP = re.compile(r"(?:<!--|#) check: skip \((.*)\)(?: -->)?")
_PAGE_LINK = re.compile(r"^\| \[(docs/\w+\.md)\]", re.MULTILINE)
_ASSIGNED = re.compile(r"^([A-Z_]+)=", re.MULTILINE)
_LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "out", "__pycache__", ".*_cache", "*.egg-info", ".hypothesis")
_TAIL_LINES = 15  # of a failed block's output


@dataclass(frozen=True)
class Block:
    """One fenced block: where it stands, what it is, and why it does not run (None: it runs)."""

    page: str
    line: int
    language: str
    text: str
    skip: str | None

    @property
    def place(self) -> str:
        """Such as `docs/glue.md:17`."""
        return f"{self.page}:{self.line}"

    @property
    def first_command(self) -> str:
        """The first line that is no comment, to recognise the block by."""
        lines = [line for line in self.text.splitlines() if line.strip() and not line.startswith("#")]
        return lines[0].strip() if lines else ""


@dataclass(frozen=True)
class Outcome:
    """What became of a block; `code` None is one that was left out, -1 one that took too long."""

    block: Block
    code: int | None
    elapsed_s: float
    output: str


def blocks_of(text: str, page: str) -> list[Block]:
    """The bash and python blocks of a page in their order."""
    found: list[Block] = []
    lines = text.splitlines()
    start, language = None, ""
    for number, line in enumerate(lines):
        if start is None and line.startswith("```"):
            start, language = number, line[3:].strip()
        elif start is not None and line.rstrip() == "```":
            marker = _SKIP.fullmatch(lines[start - 1].strip()) if start else None
            if language in LANGUAGES:
                body = "\n".join(lines[start + 1 : number]) + "\n"
                found.append(Block(page, start + 1, language, body, marker[1] if marker else None))
            start = None
    return found


def example_block(path: Path, page: str) -> Block:
    """A script of examples/ as a block that runs it without arguments."""
    marker = _SKIP.search(path.read_text(encoding="utf-8"))
    return Block(page, 1, "bash", f"bash {page}\n", marker[1] if marker else None)


def all_pages(root: Path) -> list[str]:
    """README, the pages in the order of its table, those that it does not name, and the scripts of examples/."""
    readme = (root / "README.md").read_text(encoding="utf-8")
    named = ["README.md", *_PAGE_LINK.findall(readme)]
    other = [p.relative_to(root).as_posix() for p in sorted([*root.glob("*.md"), *(root / "docs").glob("*.md")])]
    scripts = [p.relative_to(root).as_posix() for p in sorted((root / "examples").glob("*.sh"))]
    return [*named, *(page for page in other if page not in named), *scripts]


def page_blocks(root: Path, page: str) -> list[Block]:
    """The blocks of a page or script.

    Raises:
        ConfigError: there is no such page.
    """
    path = root / page
    if not path.is_file():
        raise ConfigError(f"--pages {page} is not a file of {root}; give names such as README.md or docs/glue.md")
    return [example_block(path, page)] if path.suffix == ".sh" else blocks_of(path.read_text(encoding="utf-8"), page)


def script_of(block: Block, scratch: Path, variables: Path) -> str:
    """The bash script that runs a block as somebody would who has activated the environment in the checkout."""
    body = block.text
    if block.language == "python":
        body = f"python - <<'END_OF_BLOCK'\n{block.text}END_OF_BLOCK\n"
    # A name before a command is set for that command alone, and not kept.
    kept = shlex.quote(str(variables))
    keep = "".join(f"declare -p {name} >>{kept} 2>/dev/null || :\n" for name in _ASSIGNED.findall(block.text))
    return (
        "set -e -o pipefail\n"
        f"export PATH={shlex.quote(str(Path(sys.prefix) / 'bin'))}:$PATH\n"
        f"export PYTHONPATH={shlex.quote(f'{scratch}:{scratch}/kernels')}\n"
        f"cd {shlex.quote(str(scratch))}\n"
        f"[ ! -e {shlex.quote(str(variables))} ] || . {shlex.quote(str(variables))}\n"
        f"{body}{keep}"
    )


def run_block(block: Block, scratch: Path, variables: Path, *, limit_s: float) -> Outcome:
    """Run one block, and end whatever it leaves running."""
    if block.skip is not None:
        return Outcome(block, None, 0.0, "")
    started = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            ["bash", "-c", script_of(block, scratch, variables)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = -1
        finally:
            _end_session(process)
        output.seek(0)
        return Outcome(block, code, time.monotonic() - started, output.read())


def _end_session(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # Nothing of it runs any more.
    process.wait()


def copy_checkout(root: Path, scratch: Path) -> None:
    """A copy of the checkout without what it made, with this environment as its `.venv`."""
    shutil.copytree(root, scratch, ignore=_LEFT_OUT)
    (scratch / ".venv").symlink_to(sys.prefix)
    (scratch / "out").mkdir()


def run_pages(root: Path, pages: Sequence[str], scratch: Path, *, limit_s: float) -> list[Outcome]:
    """Run the blocks of the pages in their order, and print each as it ends."""
    blocks = [block for page in pages for block in page_blocks(root, page)]
    outcomes = []
    for number, block in enumerate(blocks, start=1):
        variables = scratch.parent / f"variables-{block.page.replace('/', '-')}"
        if block.skip is None:
            print(f"[{number}/{len(blocks)}] {block.place}  {block.first_command[:80]}", flush=True)
        outcome = run_block(block, scratch, variables, limit_s=limit_s)
        if outcome.code:
            print("\n".join(f"    {line}" for line in outcome.output.splitlines()[-_TAIL_LINES:]), flush=True)
        outcomes.append(outcome)
    return outcomes


def verdict(outcome: Outcome, *, limit_s: float) -> str:
    """One line of the table."""
    block = outcome.block
    what = {None: f"left out: {block.skip}", 0: "ok", -1: f"FAILED: over {limit_s:g} s"}.get(
        outcome.code, f"FAILED with exit code {outcome.code}"
    )
    seconds = f"{outcome.elapsed_s:6.1f} s" if outcome.code is not None else " " * 8
    return f"{block.place:28} {seconds}  {what}"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = ToolParser(description="Run the commands of the documentation.")
    p.add_argument("--pages", nargs="+", metavar="FILE", help="default: README.md, docs/*.md and examples/*.sh")
    p.add_argument("--limit-s", type=float, default=600.0, metavar="S", help="longest time of a block (default 600)")
    p.add_argument("--list", action="store_true", help="run nothing; print what would run and what is left out")
    return p


def main(arguments: Sequence[str]) -> int:
    """Run what is asked for, print the table, and return how many blocks failed."""
    options = parser().parse_args(arguments)
    if options.limit_s <= 0:
        raise ConfigError(f"--limit-s {options.limit_s:g} leaves no time; use a positive number, such as 600")
    pages = options.pages or all_pages(ROOT)
    if options.list:
        for block in (block for page in pages for block in page_blocks(ROOT, page)):
            print(f"{block.place:28} {f'left out: {block.skip}' if block.skip else block.first_command[:80]}")
        return 0
    with tempfile.TemporaryDirectory(prefix="check_docs_") as folder:
        scratch = Path(folder) / "checkout"
        copy_checkout(ROOT, scratch)
        outcomes = run_pages(ROOT, pages, scratch, limit_s=options.limit_s)
    print("\n" + "\n".join(verdict(outcome, limit_s=options.limit_s) for outcome in outcomes))
    failed = sum(bool(outcome.code) for outcome in outcomes)
    ran = sum(outcome.code is not None for outcome in outcomes)
    print(f"{ran} blocks ran, {failed} failed, {len(outcomes) - ran} were left out")
    return failed


def _command() -> None:
    if main(sys.argv[1:]):
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(run_command(_command))
