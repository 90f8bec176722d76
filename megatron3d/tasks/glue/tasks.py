"""The tasks as data: which columns hold texts and labels, which labels there are, which metrics count.

Nine tasks are those of GLUE with the columns of the official TSV files; `custom_task` describes files of one's own.

Source: Wang et al. 2018 (arXiv:1804.07461), table 1 for the metrics; https://gluebenchmark.com/tasks for the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import MappingProxyType

from megatron3d.errors import ConfigError

METRICS = ("accuracy", "f1", "matthews", "pearson", "spearman")
REGRESSION_METRICS = ("pearson", "spearman")
CUSTOM = "tsv"


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: as `--task` takes it.
        folder: folder of the official download.
        texts: the columns of the first text and, for pairs, of the second.
        label: the column of the label.
        labels: the classes as the files write them, in the order of the model's outputs; none in a regression.
        metrics: the official ones; the best checkpoint is the one with the highest mean of them.
        train: the file to train on.
        dev: labelled files to measure on, by the ending of their metrics' names ("" where there is only one).
        test: unlabelled files, by the name of the predictions that the leaderboard takes.
        headless_columns: names of the columns of train and dev files that have no header line.
        value_range: the values of a regression.
    """

    name: str
    folder: str
    texts: tuple[str, ...]
    label: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    train: str = "train.tsv"
    dev: Mapping[str, str] = field(default_factory=lambda: {"": "dev.tsv"})
    test: Mapping[str, str] = field(default_factory=dict)
    headless_columns: tuple[str, ...] = ()
    value_range: tuple[float, float] | None = None

    @property
    def is_regression(self) -> bool:
        """Whether the model gives a value instead of the scores of classes."""
        return not self.labels

    @property
    def num_outputs(self) -> int:
        """Outputs of the model."""
        return len(self.labels) or 1


_BINARY = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")

_GLUE = (
    Task(
        name="cola",
        folder="CoLA",
        texts=("sentence",),
        label="label",
        labels=_BINARY,
        metrics=("matthews",),
        test={"CoLA": "test.tsv"},
        headless_columns=("source", "label", "original_mark", "sentence"),
    ),
    Task(
        name="sst-2",
        folder="SST-2",
        texts=("sentence",),
        label="label",
        labels=_BINARY,
        metrics=("accuracy",),
        test={"SST-2": "test.tsv"},
    ),
    Task(
        name="mrpc",
        folder="MRPC",
        texts=("#1 String", "#2 String"),
        label="Quality",
        labels=_BINARY,
        metrics=("f1", "accuracy"),
        test={"MRPC": "test.tsv"},
    ),
    Task(
        name="sts-b",
        folder="STS-B",
        texts=("sentence1", "sentence2"),
        label="score",
        labels=(),
        metrics=("pearson", "spearman"),
        test={"STS-B": "test.tsv"},
        value_range=(0.0, 5.0),
    ),
    Task(
        name="qqp",
        folder="QQP",
        texts=("question1", "question2"),
        label="is_duplicate",
        labels=_BINARY,
        metrics=("f1", "accuracy"),
        test={"QQP": "test.tsv"},
    ),
    Task(
        name="mnli",
        folder="MNLI",
        texts=("sentence1", "sentence2"),
        label="gold_label",
        labels=("entailment", "neutral", "contradiction"),
        metrics=("accuracy",),
        dev={"_m": "dev_matched.tsv", "_mm": "dev_mismatched.tsv"},
        test={"MNLI-m": "test_matched.tsv", "MNLI-mm": "test_mismatched.tsv", "AX": "../diagnostic/diagnostic.tsv"},
    ),
    Task(
        name="qnli",
        folder="QNLI",
        texts=("question", "sentence"),
        label="label",
        labels=_ENTAILMENT,
        metrics=("accuracy",),
        test={"QNLI": "test.tsv"},
    ),
    Task(
        name="rte",
        folder="RTE",
        texts=("sentence1", "sentence2"),
        label="label",
        labels=_ENTAILMENT,
        metrics=("accuracy",),
        test={"RTE": "test.tsv"},
    ),
    Task(
        name="wnli",
        folder="WNLI",
        texts=("sentence1", "sentence2"),
        label="label",
        labels=_BINARY,
        metrics=("accuracy",),
        test={"WNLI": "test.tsv"},
    ),
)
GLUE_TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _GLUE})


def find_task(name: str) -> Task:
    """The GLUE task of that name, however its letters and hyphens are written.

    Raises:
        ConfigError: there is none; the sentence names the nearest one.
    """

    def plain(text: str) -> str:
        return text.lower().replace("-", "").replace("_", "").replace(" ", "")

    by_plain_name = {plain(task): GLUE_TASKS[task] for task in GLUE_TASKS}
    found = by_plain_name.get(plain(name))
    if found is not None:
        return found
    nearest = get_close_matches(plain(name), [*by_plain_name, CUSTOM], n=1)
    near = CUSTOM if nearest == [CUSTOM] else by_plain_name[nearest[0]].name if nearest else None
    hint = f"did you mean {near}? " if near else ""
    raise ConfigError(
        f"--task {name} is not known; {hint}The tasks are {', '.join(GLUE_TASKS)}, and {CUSTOM} for files of your own."
    )


@dataclass(frozen=True)
class CustomColumns:
    """What the options say of a user's own files: `labels` may be empty, then they are read from the training file."""

    texts: tuple[str, ...]
    label: str
    labels: tuple[str, ...]
    is_regression: bool
    metrics: tuple[str, ...]


def custom_task(columns: CustomColumns, *, train: str | None, dev: str, test: str | None) -> Task:
    """A task of a user's own TSV files; classes that are still unknown are to be put into `labels`.

    Raises:
        ConfigError: a metric that is not known or does not go with the kind of label.
    """
    metrics = columns.metrics or (REGRESSION_METRICS if columns.is_regression else ("accuracy",))
    fitting = REGRESSION_METRICS if columns.is_regression else tuple(m for m in METRICS if m not in REGRESSION_METRICS)
    wrong = [metric for metric in metrics if metric not in fitting]
    if wrong:
        kind = "values (--regression)" if columns.is_regression else "classes"
        raise ConfigError(f"--metric {wrong[0]} does not measure {kind}; use one of: {', '.join(fitting)}.")
    if columns.is_regression and columns.labels:
        raise ConfigError(
            f"--labels {' '.join(columns.labels)} names classes, but --regression learns values; give only one of them."
        )
    return Task(
        name=CUSTOM,
        folder="",
        texts=columns.texts,
        label=columns.label,
        labels=columns.labels,
        metrics=metrics,
        train=train or "",
        dev={"": dev},
        test={} if test is None else {"predictions": test},
    )
