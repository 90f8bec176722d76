"""The glossary names what exists: its files, and the names of code beside them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROWS = [line for line in (ROOT / "docs" / "glossary.md").read_text().splitlines() if line.startswith("| ")]


def test_every_file_of_the_glossary_exists_and_defines_the_names_beside_it() -> None:
    package = ROOT / "megatron3d"
    num_names = 0
    for row in ROWS:
        where = row.split("|")[3]
        files = [package / name for name in re.findall(r"`([a-z_0-9/]+(?:\.py|/))`", where)]
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
