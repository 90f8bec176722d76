"""The sentences that docs/troubleshooting.md quotes are those of the code, between the values that `…` stands for."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/troubleshooting.md"
ELLIPSIS = "…"


def texts_of(path: Path) -> list[str]:
    """Every string of a file, with an ellipsis for each value that it formats."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(p.value if isinstance(p, ast.Constant) else ELLIPSIS for p in node.values))
    return found


def quoted(page: str) -> list[str]:
    """The quoted sentences of a page, each a paragraph of lines that begin with `> `."""
    return [line.removeprefix("> ").strip() for line in page.splitlines() if line.startswith("> ")]


def has_sentence(text: str, sentence: str) -> bool:
    """Whether `text` has the fixed parts of `sentence` in their order."""
    at = 0
    for part in sentence.split(ELLIPSIS):
        at = text.find(part.strip(), at)
        if at < 0:
            return False
        at += len(part.strip())
    return True


def missing_sentences(page: str, texts: list[str]) -> list[str]:
    """Quoted sentences that no text of the code has."""
    return [s for s in quoted(page) if not any(has_sentence(text, s) for text in texts)]


def test_every_quoted_sentence_is_one_of_the_code() -> None:
    page = PAGE.read_text(encoding="utf-8")
    texts = [t for folder in ("megatron3d", "tools") for p in (ROOT / folder).rglob("*.py") for t in texts_of(p)]
    assert len(quoted(page)) > 10
    assert missing_sentences(page, texts) == []


def test_every_sentence_has_a_remedy() -> None:
    sections = PAGE.read_text(encoding="utf-8").split("\n> ")[1:]
    assert [s.splitlines()[0] for s in sections if "**Remedy.**" not in s] == []


def test_a_sentence_that_changed_is_found() -> None:
    texts = ["--save … is in use by another run (…); stop it"]
    page = "> --save … is in use by another run (…);\n\n> --save … is held by another run\n"
    assert missing_sentences(page, texts) == ["--save … is held by another run"]
