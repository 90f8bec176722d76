"""What a checkout says of itself: its version, its licence, and the commands that add optional packages."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import megatron3d
from megatron3d.errors import install_extra

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CODE = [p for folder in ("megatron3d", "tools", "kernels") for p in (ROOT / folder).rglob("*.py")]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def test_the_version_stands_in_one_place_and_setuptools_reads_it_there() -> None:
    assert "version" not in PYPROJECT["project"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "megatron3d.__version__"}
    assert f"## {megatron3d.__version__} " in (ROOT / "CHANGELOG.md").read_text()
    printed = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "--version"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert printed.stdout.strip() == megatron3d.__version__, printed.stderr


def test_the_licence_file_is_the_licence_that_the_metadata_names() -> None:
    assert PYPROJECT["project"]["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text
    assert "the megatron3d authors" in text and "[name of copyright owner]" not in text


def test_every_remedy_names_an_extra_that_exists() -> None:
    named = {m for path in CODE for m in re.findall(r"""install_extra\(["'](\w+)["']\)""", path.read_text())}
    assert len(named) >= 5
    assert named <= PYPROJECT["project"]["optional-dependencies"].keys()


def test_nothing_says_to_install_this_project_from_an_index() -> None:
    wrong = re.compile(r"pip install [^\n`]*megatron3d\[")
    assert [str(p) for p in [*CODE, *PAGES] if wrong.search(p.read_text(encoding="utf-8"))] == []


def test_the_remedy_is_one_command_for_this_checkout_and_this_interpreter() -> None:
    words = shlex.split(install_extra("serve"))
    assert words == [sys.executable, "-m", "pip", "install", "-c", f"{ROOT}/constraints.txt", "-e", f"{ROOT}[serve]"]
    assert Path(words[5]).is_file()


def test_the_first_of_the_two_commands_installs_what_the_readme_uses() -> None:
    setup = (ROOT / "tools/setup_env.sh").read_text()
    assert 'run) extras="[glue,onnx,serve]"' in setup


def test_every_page_gives_the_same_time_for_the_two_commands() -> None:
    forms = {
        "README.md": r"first takes about (\d+) minutes on two cores.*?the second about (\d+)\.",
        "docs/benchmarks.md": r"quickstart\.sh` takes about (\d+) minutes.*?whole suite .*?about (\d+) minutes",
    }
    pairs = {page: re.search(form, (ROOT / page).read_text(), re.DOTALL) for page, form in forms.items()}
    assert all(pairs.values()), pairs
    ((first, second),) = {match.groups() for match in pairs.values() if match}
    assert f"about {first} minutes" in (ROOT / "tools/quickstart.sh").read_text()
    assert f"about {second} minutes" in (ROOT / "CONTRIBUTING.md").read_text()
    assert f"about {second} minutes" in (ROOT / "docs/testing.md").read_text()
