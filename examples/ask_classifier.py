"""Ask a served classifier about sentences whose labels are known, and print how it did; the standard library is enough.

    python tools/serve_classifier.py --model sst2.onnx &
    python examples/ask_classifier.py examples/tricky_sentences.jsonl --url http://127.0.0.1:8000

FILE has one JSON object a line: "kind", "text", "label" (what is right) and, for a model of pairs, "pair".
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any


def main() -> None:
    """Read the sentences, ask about each, print a Markdown table and how many answers are right."""
    parser = argparse.ArgumentParser(
        description="Ask a served classifier about sentences whose labels are known, and print how it did."
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="such as examples/tricky_sentences.jsonl")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="default http://127.0.0.1:8000")
    args = parser.parse_args()
    sentences = read(args.file)
    print("\n".join(table(sentences, [ask(args.url, sentence) for sentence in sentences])))


def read(path: Path) -> list[dict[str, str]]:
    """The objects of a file; ends the program with a sentence where a line is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"error: {path} cannot be read ({error})") from error
    found = []
    for number, line in enumerate(lines, 1):
        try:
            sentence = json.loads(line)
            found.append({key: str(sentence[key]) for key in ("kind", "text", "label", "pair") if key in sentence})
            missing = {"kind", "text", "label"} - found[-1].keys()
        except (ValueError, TypeError) as error:
            raise SystemExit(f"error: {path} line {number} is not a JSON object ({error})") from error
        if missing:
            raise SystemExit(f"error: {path} line {number} has no {' and no '.join(sorted(missing))}")
    if not found:
        raise SystemExit(f"error: {path} has no lines")
    return found


def ask(url: str, sentence: dict[str, str]) -> dict[str, Any]:
    """The answer to one sentence: its label and the score of each label."""
    body = json.dumps({key: sentence[key] for key in ("text", "pair") if key in sentence}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url.rstrip('/')}/classify", data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        raise SystemExit(f"error: {sentence['text']!r} was refused ({error.code}): {error.read().decode()}") from error
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {url} does not answer ({error}); start tools/serve_classifier.py first") from error
    if "label" not in answer:
        raise SystemExit(f"error: {url} gives values and no labels ({answer}); serve a model that classifies")
    return answer


def table(sentences: list[dict[str, str]], answers: list[dict[str, Any]]) -> list[str]:
    """The lines of the table; wrong answers are marked, and the last line counts the right ones."""
    lines = ["| kind | sentence | answer | score | expected | |", "|---|---|---|---:|---|---|"]
    num_right = 0
    for sentence, answer in zip(sentences, answers, strict=True):
        label, expected = answer["label"], sentence["label"]
        num_right += label == expected
        text = " / ".join(sentence[key] for key in ("text", "pair") if key in sentence)
        mark = "" if label == expected else "wrong"
        lines.append(f"| {sentence['kind']} | {text} | {label} | {answer['scores'][label]:.3f} | {expected} | {mark} |")
    return [*lines, "", f"{num_right} of {len(sentences)} right"]


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        sys.exit(1)
