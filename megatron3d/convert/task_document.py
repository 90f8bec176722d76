"""What a fine-tuning records of its classifier, `task.json` of a checkpoint, for everyone who uses the classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron3d.checkpoint.index import Index
from megatron3d.checkpoint.load import read_document
from megatron3d.errors import CheckpointError
from megatron3d.files.fields import Fields

_DOCUMENT = "task"
_SHORTEST = 3  # tokens of a sample: [CLS], one of its own, [SEP]


def read_task_document(directory: Path, index: Index) -> dict[str, Any] | None:
    """The document of the checkpoint in `directory`, or None if it has none.

    Raises:
        CheckpointError: it is damaged, or a field of it is missing or cannot be what it stands for.
    """
    if f"{_DOCUMENT}.json" not in index.documents:
        return None
    document = read_document(directory, _DOCUMENT)
    try:
        _check(Fields(document, f"{_DOCUMENT}.json"))
    except ValueError as error:
        raise CheckpointError(f"checkpoint {directory}: {error}; fine-tune again") from error
    return document


def _check(task: Fields) -> None:
    """Raises: ValueError for the first field that is wrong."""
    task.text("task")
    task.interval("value_range")
    labels, outputs = task.texts("labels"), task.integer("num_outputs", least=1)
    if outputs != (len(labels) or 1) or task.flag("is_regression") is bool(labels):
        raise ValueError(f"task.json has {len(labels)} labels for {outputs} outputs, and says is_regression beside it")
    if task.integer("num_texts") not in (1, 2):
        raise ValueError(f"task.json has num_texts {task.get('num_texts')}, which must be 1 or 2")
    task.integer("max_seq_length", least=_SHORTEST)
