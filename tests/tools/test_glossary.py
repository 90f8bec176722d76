"""The glossary names what exists, files and the names of code beside them, and words it replaced do not return."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROWS = [line for line in (ROOT / "docs" / "glossary.md").read_text().splitlines() if line.startswith("| ")]


def test_every_file_of_the_glossary_exists_and_defines_the_names_beside_it() -> None:
    package = ROOT / "megatron3d"
    num_names = 0
    for row in ROWS:
        where = row.split("|")[3]
        named = re.findall(r"`([a-z_0-9/]+(?:\.py|/))`", where)
        files = [package / name if (package / name).exists() else ROOT / name for name in named]
        assert all(file.exists() for file in files), row
        for name in re.findall(r"`([A-Za-z.]+)`", where):
            if name.endswith(".py"):
                continue
            texts = [file.read_text() for file in files if file.is_file()] or [
                file.read_text() for file in package.rglob("*.py")
            ]
            last = name.split(".")[-1]
            assert any(re.search(rf"^\s*((class|def) {last}\b|{last}\b.*[:=])", text, re.M) for text in texts), row
            num_names += 1
    assert num_names > 15
    terms = [row.split("|")[1].strip() for row in ROWS]
    assert len(terms) == len({*terms}) + terms.count("term") - 1, "a term has one meaning"


# Words that stood for a term of the field; the term is beside each.
REPLACED = {
    r"lend|lends|lent|lender|lending|borrow|borrows|borrowed|borrowing": "gather, release",
    r"(give|gives|gave|given|giving) back": "release, free, return",
    r"(put|puts) (them |it )?aside": "defer",
    r"(share|shares|shared|sharing) (\w+ ){0,3}out|dealt out": "shard, assign",
    r"desk|desks": "owner",
    r"wish|wishes|wished": "option",
    r"told|tells": "log, report, print, name",
    r"goes on from|the next start": "resume, the next run",
}
# As names in code; in prose these are ordinary words.
REPLACED_NAMES = {
    "home": "backing, store",
    "visit": "for_each",
    "say": "log",
    "told": "describe",
    "everywhere": "what is everywhere",
    "whole": "full, gathered",
    "piece": "what it is: box, span, flat parameter, component, chunk",
}
# Where a name is a term of the field: a word piece, and a sentence or what is left of a long one once cut.
ROOMS_OF_NAMES = {"piece": ("data/", "convert/sentencepiece_json.py")}
MAY_BE_NAMED = {"tests/tools/test_glossary.py"}


def project_texts() -> dict[str, str]:
    """Every text that people write, by its path."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py", "*.md", "*.sh", "*.toml"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    return {name: (ROOT / name).read_text() for name in listed if name not in MAY_BE_NAMED and (ROOT / name).is_file()}


def test_words_that_the_glossary_replaced_do_not_return() -> None:
    texts = project_texts()
    assert len(texts) > 300
    found = [
        f"{name}: {match[0]!r}; write {instead}"
        for words, instead in REPLACED.items()
        for name, text in texts.items()
        for match in re.finditer(rf"\b({words})\b", text, re.IGNORECASE)
    ]
    assert found == []


def test_names_that_the_glossary_replaced_do_not_return() -> None:
    found = []
    for path in sorted((ROOT / "megatron3d").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            name = _name_of(node)
            word, room = name.strip("_").lower().removesuffix("s"), path.relative_to(ROOT / "megatron3d").as_posix()
            found += [
                f"{room}: {name}; write {instead}"
                for part in re.findall(r"[A-Z]?[a-z]+", name)
                for words, instead in REPLACED.items()
                if re.fullmatch(words, part, re.IGNORECASE)
            ]
            if word in REPLACED_NAMES and not room.startswith(ROOMS_OF_NAMES.get(word, ())):
                found.append(f"{room}: {name}; write {REPLACED_NAMES[word]}")
    assert found == []


def _name_of(node: ast.AST) -> str:
    """The name that a node defines, or nothing."""
    match node:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
            return name
        case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
            return name
    return ""
