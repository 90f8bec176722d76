"""The classifier that an earlier fine-tuning left in --save: it stays unless this one is at least as good.

Only the same metrics, measured on the same rows, can be compared, so a directory of anything else is refused at the
start. Of a classifier whose `task.json` does not tell the rows, as earlier versions wrote it, they are taken to be the
same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron3d.checkpoint.directory import find_checkpoint, was_saved_to
from megatron3d.checkpoint.index import read_index
from megatron3d.checkpoint.load import read_document
from megatron3d.checkpoint.ranks import ProcessGroup, from_first
from megatron3d.errors import MisfitError
from megatron3d.tasks.glue.metrics import mean_of
from megatron3d.tasks.glue.tasks import Task
from megatron3d.tasks.glue.weights import task_identity


@dataclass(frozen=True)
class ExistingClassifier:
    """A classifier of the same task, and the mean of its metrics on the dev files it was measured with."""

    directory: Path
    score: float


def find_existing(
    save: Path, task: Task, metrics: Iterable[str], dev_digests: Mapping[str, str], *, group: ProcessGroup | None
) -> ExistingClassifier | None:
    """What --save holds, as rank 0 sees it; None if nothing was ever saved there. Collective over `group`.

    Args:
        save: the --save directory.
        task: what is learned now.
        metrics: names of what it is measured by.
        dev_digests: of the rows it is measured on, by the ending of their metrics.
        group: all ranks.

    Raises:
        MisfitError: it holds something else than a classifier of this task, measured by the same metrics on the same
            rows.
        CheckpointError: what `latest` names there is gone or damaged.
    """
    names = set(metrics)

    def look() -> ExistingClassifier | None:
        if not was_saved_to(save):
            return None
        directory = find_checkpoint(save)
        document = read_document(directory, "task") if "task.json" in read_index(directory).documents else {}
        same_task = all(document.get(key) == value for key, value in task_identity(task).items())
        if not same_task or set(document["metrics"]) != names:
            held = f"a classifier of {document['task']}" if document else "no classifier"
            by = f" measured by {', '.join(document['metrics'])}" if document else ""
            raise MisfitError(
                f"--save {save} is in use: {directory} holds {held}{by}, which cannot be compared with one of "
                f"{task.name} measured by {', '.join(sorted(names))}; give another --save"
            )
        if document.get("dev_digests") not in (None, {}, dict(dev_digests)):
            raise MisfitError(
                f"--save {save} is in use: {directory} holds a classifier of {task.name} measured on other dev files, "
                "so that it is unknown which of the two is better; give another --save"
            )
        return ExistingClassifier(directory, mean_of(document["metrics"]))

    return from_first(look, group)
