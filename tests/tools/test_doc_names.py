"""What the documentation names in backticks exists: files, functions, classes; and so do the pages it links to."""

from __future__ import annotations

import io
import re
import subprocess
import tokenize
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Names of other programs and libraries, and of files that a user has.
OTHERS = {
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "DeviceMesh",
    "GopherQualityFilter",
    "GraceTime",
    "LambdaFilter",
    "LanguageFilter",
    "MoEAuxLossAutoScaler",
    "NAME_loss",
    "NCCL_DEBUG",
    "NCCL_IB_HCA",
    "NCCL_SOCKET_IFNAME",
    "O_TMPFILE",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "SignalException",
    "TORCHINDUCTOR_CACHE_DIR",
    "TORCH_FR_BUFFER_SIZE",
    "file.py",
    "merges.txt",
    "path/to/file.py",
    "save_to_disk",
    "terminationGracePeriodSeconds",
    "torch.linalg.vector_norm",
    "vector_norm",
    "vocab.txt",
}


@cache
def project_files() -> frozenset[str]:
    """Every file that belongs to the project."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    return frozenset(name for name in listed if (ROOT / name).is_file())


@cache
def names_in_code() -> frozenset[str]:
    """Every name that code or a script uses, and words of short strings, such as keys of files."""
    scripts = [file for file in project_files() if file.endswith(".sh")]
    names = {name for file in scripts for name in re.findall(r"\w+", (ROOT / file).read_text())}
    for file in project_files() - {"tests/tools/test_doc_names.py"}:
        if not file.endswith(".py"):
            continue
        for token in tokenize.generate_tokens(io.StringIO((ROOT / file).read_text()).readline):
            if token.type == tokenize.NAME:
                names.add(token.string)
            elif token.type == tokenize.STRING and len(token.string) < 80:
                names |= set(re.findall(r"\w+", token.string))
    return frozenset(names)


def unknown_names(text: str, page: str) -> list[str]:
    """What a page names in backticks outside of its blocks and is neither here nor one of `OTHERS`."""
    made_here = set(re.findall(r"New file `([\w./]+)`", text))  # by a recipe
    found = []
    for words in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if file := re.fullmatch(r"([\w./-]+\.(?:py|toml|sh|md|txt))(?::\w+)?", words):
            is_known = any(f"/{known}".endswith(f"/{file[1]}") for known in project_files() | made_here)
            name = file[1]
        elif code := re.fullmatch(r"([A-Za-z_][\w.]*)(?:\(.*\))?", words):
            name = code[1]
            looks_like_code = "_" in name or "(" in words or re.search("[a-z][A-Z]", name) is not None
            is_known = not looks_like_code or name.rstrip(".").split(".")[-1] in names_in_code()
        else:
            continue
        if not is_known and name not in OTHERS:
            found.append(words)
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text)
    return found + [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]


@pytest.mark.parametrize("page", sorted(file for file in project_files() if file.endswith(".md")))
def test_every_file_function_and_page_that_a_page_names_exists(page: str) -> None:
    assert unknown_names((ROOT / page).read_text(), page) == []


def test_names_that_are_gone_are_seen() -> None:
    text = (
        "`zero/gone.py`, `zero/unit.py`, `FlatUnit`, `GoneUnit`, `reduce_gone()`, [page](gone.md), `a word`, `--flag`"
    )
    assert unknown_names(text, "docs/tour.md") == ["zero/gone.py", "GoneUnit", "reduce_gone()", "gone.md"]
