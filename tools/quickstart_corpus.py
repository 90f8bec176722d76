"""Write a small corpus of real text that every Python installation carries, as loose JSON: no download.

One document is a source file of the standard library or a topic of `help()`, the language reference as plain text.
The order is by a hash of the name, so it is the same everywhere for the same Python version and a part of it, whether
cut by `--max-mb` or by the train/validation split, is a fair sample.

    python tools/quickstart_corpus.py --output corpus.jsonl --max-mb 8
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

from megatron3d.errors import ConfigError, DataError
from megatron3d.process.command import run_command

# Others' packages, tests and their data, wheels, and tables that a program wrote: none of it reads like Python. Nor do
# wrappers of Tk, half a megabyte of tk.call(self._w, ...): a small model repeats such lists of letters without end.
LEFT_OUT_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "ensurepip", "encodings", "pydoc_data"}
    | {"tkinter", "turtledemo"}
)
LEFT_OUT_FILES = frozenset({"html/entities.py", "stringprep.py", "lib2to3/pgen2/grammar.py", "turtle.py"})
SMALLEST_DOCUMENT_BYTES = 200  # Below that it is an empty __init__.py or a licence line.


@dataclass(frozen=True)
class Document:
    """One document: where it is from, such as `Lib/json/decoder.py` or `topic/lambda`, and its text."""

    source: str
    text: str

    @property
    def size_bytes(self) -> int:
        """Bytes of the text in UTF-8."""
        return len(self.text.encode())


def library_documents(library: Path) -> Iterator[Document]:
    """Every source file under `library` that a person wrote for others to use."""
    for path in library.rglob("*.py"):
        name = path.relative_to(library).as_posix()
        if LEFT_OUT_FOLDERS.isdisjoint(path.relative_to(library).parts) and name not in LEFT_OUT_FILES:
            if path.name.startswith("_sysconfigdata"):
                continue
            with tokenize.open(path) as file:  # It heeds the coding line of the file.
                yield Document(f"Lib/{name}", file.read())


def topic_documents() -> Iterator[Document]:
    """Every topic of `help()`."""
    return (Document(f"topic/{name}", text) for name, text in topics.items())


def build_corpus(library: Path, max_bytes: float) -> list[Document]:
    """The documents in their fixed order, as many as fit into `max_bytes` of text.

    Raises:
        DataError: nothing was found or nothing fits.
    """
    found = [d for d in (*library_documents(library), *topic_documents()) if d.size_bytes >= SMALLEST_DOCUMENT_BYTES]
    found.sort(key=lambda document: hashlib.sha256(document.source.encode()).hexdigest())
    chosen, total = [], 0
    for document in found:
        if total + document.size_bytes <= max_bytes:
            chosen.append(document)
            total += document.size_bytes
    if not chosen:
        raise DataError(
            f"none of the {len(found)} documents of {library} fits into {max_bytes:g} bytes; use a larger --max-mb"
        )
    return chosen


def main(arguments: list[str]) -> None:
    """Write the corpus and print what is in it."""
    parser = argparse.ArgumentParser(
        description="Write a small corpus of real text that every Python installation carries, as loose JSON."
    )
    parser.add_argument("--output", type=Path, required=True, help="the .jsonl file to write")
    parser.add_argument("--max-mb", type=float, default=8.0, help="most text in it, in 10^6 bytes; default 8")
    options = parser.parse_args(arguments)
    if options.max_mb <= 0:
        raise ConfigError(f"--max-mb {options.max_mb:g} leaves no text; use a positive number, such as 8")
    documents = build_corpus(Path(sysconfig.get_path("stdlib")), options.max_mb * 1e6)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps({"text": document.text, "source": document.source}) + "\n")
    size_mb = sum(d.size_bytes for d in documents) / 1e6
    print(f"{options.output}: {len(documents)} documents, {size_mb:.2f} MB of text")


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
