"""A small BERT and small files in the official columns of the nine tasks: what the tests of fine-tuning run on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.runs.harness import ROOT, Ended, run, words

transformers = pytest.importorskip("transformers")

SCRIPT = ROOT / "tools" / "finetune_glue.py"
POSITIONS = 32
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
GOOD, BAD = ("good", "great", "fine", "charming"), ("bad", "dull", "poor", "boring")
OTHERS = 'a the is it this film story plot and very not one of with worth my hours life want back " , . ?'
VOCABULARY = [*SPECIAL, *GOOD, *BAD, *OTHERS.split(" ")]
QUIET = "--device cpu --hidden-dropout 0 --attention-dropout 0"
# One optimizer step is 8 samples; 3 epochs of 28 samples are 12 steps, the last of an epoch not full.
USUAL = f"--epochs 3 --lr 2e-3 --max-seq-length 24 --global-batch-size 8 --log-interval 1 {QUIET}"

_MNLI = (
    "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse "
    "sentence1 sentence2"
)
_STS = "index genre filename year old_index source1 source2 sentence1 sentence2"
# Task -> headers of its labelled files and of its test files, as the official download has them.
HEADERS: dict[str, dict[str, str]] = {
    "cola": {"train.tsv": "source label original_mark sentence", "test.tsv": "index sentence"},
    "sst-2": {"train.tsv": "sentence label", "test.tsv": "index sentence"},
    "mrpc": {
        "train.tsv": "Quality|#1 ID|#2 ID|#1 String|#2 String",
        "test.tsv": "index|#1 ID|#2 ID|#1 String|#2 String",
    },
    "sts-b": {"train.tsv": f"{_STS} score", "test.tsv": _STS},
    "qqp": {"train.tsv": "id qid1 qid2 question1 question2 is_duplicate", "test.tsv": "id question1 question2"},
    "mnli": {
        "train.tsv": f"{_MNLI} label1 gold_label",
        "dev_matched.tsv": f"{_MNLI} label1 label2 label3 label4 label5 gold_label",
        "dev_mismatched.tsv": f"{_MNLI} label1 label2 label3 label4 label5 gold_label",
        "test_matched.tsv": _MNLI,
        "test_mismatched.tsv": _MNLI,
        "../diagnostic/diagnostic.tsv": "index sentence1 sentence2",
    },
    "qnli": {"train.tsv": "index question sentence label", "test.tsv": "index question sentence"},
    "rte": {"train.tsv": "index sentence1 sentence2 label", "test.tsv": "index sentence1 sentence2"},
    "wnli": {"train.tsv": "index sentence1 sentence2 label", "test.tsv": "index sentence1 sentence2"},
}
LABELS = {
    "mnli": ("entailment", "neutral", "contradiction"),
    "qnli": ("entailment", "not_entailment"),
    "rte": ("entailment", "not_entailment"),
    "sts-b": ("0.000", "2.500", "5.000"),
}
_TEXTS = {"sentence", "sentence1", "sentence2", "#1 String", "#2 String", "question1", "question2", "question"}
_LABELS = {"label", "Quality", "score", "is_duplicate", "gold_label"}
COUNTS = {"train": 28, "dev": 10, "test": 5}


def sentence(number: int) -> str:
    """A text of 3 to 11 words whose feeling is that of an even or odd number; some have one quote."""
    feeling = (GOOD if number % 2 else BAD)[number // 2 % 4]
    fillers = OTHERS.split(" ")
    more = [fillers[(number * 7 + place * 5) % len(fillers)] for place in range(number * 3 % 9)]
    return " ".join(["the", feeling, *more, "film"])


def write_task(task: str, folder: Path, **changes: Any) -> Path:
    """The files of a task in its official columns; returns the folder that holds them.

    `changes` are the row numbers to be replaced: `train={3: "whole line"}`.
    """
    headers = dict(HEADERS[task])
    if "dev_matched.tsv" not in headers:
        headers["dev.tsv"] = headers["train.tsv"]
    for name, header in headers.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = path.name.split("_")[0].removesuffix(".tsv").replace("diagnostic", "test")
        columns = header.split("|" if "|" in header else " ")
        first = {"train": 0, "dev": 100, "test": 200}[kind]
        lines = [_line(task, columns, first, number) for number in range(COUNTS[kind])]
        for number, line in changes.get(kind, {}).items():
            lines[number] = line
        if not (task == "cola" and kind != "test"):
            lines.insert(0, "\t".join(columns))
        mark = "\ufeff" if task == "mrpc" else ""
        path.write_text(mark + "\n".join(lines) + "\n", encoding="utf-8")
    return folder


def _line(task: str, columns: Sequence[str], first: int, number: int) -> str:
    labels = LABELS.get(task, ("0", "1"))
    cells, texts = [], 0
    for column in columns:
        if column in _TEXTS:
            cells.append(sentence(first + number + 3 * texts))
            texts += 1
        elif column in _LABELS:
            cells.append(labels[number % len(labels)])
        else:
            cells.append(str(number))
    return "\t".join(cells)


def bert() -> nn.Module:
    """transformers' BERT of 4 layers, as random as it starts but with weights large enough to tell inputs apart."""
    return transformers.BertModel(_config())


def bert_classifier(num_labels: int) -> nn.Module:
    """The same with a classifier."""
    return transformers.BertForSequenceClassification(_config(num_labels=num_labels))


def _config(**more: Any) -> Any:
    torch.manual_seed(0)
    return transformers.BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=POSITIONS,
        initializer_range=0.15,
        hidden_dropout_prob=0.1,
        **more,
    )


def write_hf(folder: Path, model: nn.Module) -> Path:
    """A Hugging Face directory of the model with its vocabulary."""
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    return folder


def tool(*options: str | Path) -> Ended:
    """tools/finetune_glue.py in this process."""
    return run(words(*options), script=SCRIPT)


def tuned(*options: str | Path) -> dict[str, Any]:
    """The result of a run that must end well."""
    ended = tool(*options)
    assert ended.code == 0, ended.err
    return result(ended)


def result(ended: Ended) -> dict[str, Any]:
    """The last line of a run."""
    return json.loads(ended.out.splitlines()[-1])
