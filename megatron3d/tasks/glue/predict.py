"""What a classifier says of every sample of a file, at any layout, and the files in which the leaderboard wants it.

Shapes: N samples, C outputs of the model (classes, or 1 value in a regression).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron3d.comm.collectives import all_reduce
from megatron3d.models.bert_classifier import sample_losses
from megatron3d.pipeline.run import run
from megatron3d.storage.atomic import write_text_atomically
from megatron3d.storage.refusals import storage_errors
from megatron3d.tasks.glue.encode import Encoded
from megatron3d.tasks.glue.metrics import measure
from megatron3d.tasks.glue.order import PlannedBatch, evaluation_batches
from megatron3d.tasks.glue.pace import Pace
from megatron3d.tasks.glue.tasks import Task
from megatron3d.train.setup import TrainingSetup
from megatron3d.train.step import micro_batches


def scores(
    parts: TrainingSetup,
    samples: Encoded,
    *,
    num_outputs: int,
    multiple: int,
    pace: Pace,
    before_batch: Callable[[], None],
) -> Tensor:
    """The model's outputs for all samples, fp32 [N, C] on the CPU, the same on every rank; collective over all.

    Args:
        parts: the rank's model.
        samples: of one file.
        num_outputs: C.
        multiple: batches are padded to a multiple of this.
        pace: counts every batch.
        before_batch: called before each on all ranks; may raise to give up, as nothing is under way then.
    """
    mesh, device = parts.mesh, parts.model.device
    found_NC = torch.zeros(len(samples), num_outputs, device=device)
    size = parts.config.train.global_batch_size
    for batch in evaluation_batches(samples.lengths_N, batch_size=size, multiple=multiple):
        before_batch()
        part = batch.part(mesh.batch.rank, mesh.batch.size)
        outputs = _outputs(parts, samples, part)
        if outputs is not None:
            counts = torch.from_numpy(part.weights_R > 0)
            found_NC[torch.from_numpy(part.indices_R)[counts].to(device)] = outputs[counts.to(device)].float()
        pace.done(batch.num_samples, tokens=int(batch.length * batch.num_samples))
    # Each row was filled in by one rank of all; the others hold zeros.
    return all_reduce(found_NC, mesh.world).cpu()


def _outputs(parts: TrainingSetup, samples: Encoded, part: PlannedBatch) -> Tensor | None:
    """The scores of one rank's rows, where this rank is the one to report them."""
    model, size = parts.model, parts.config.train.micro_batch_size
    asked = samples.without_labels().batch(part.indices_R, part.weights_R, part.length)
    micros = micro_batches(asked, size, device=model.device)
    row = model.rows.forward_only(len(micros))
    wire = model.wire(parts.config.model, parts.config.parallel, micros)
    outputs = run(row.schedule, row.actions, model.stages, micros, wire=wire)
    return torch.cat(outputs) if outputs and parts.mesh.reports_samples else None


def mean_loss(scores_NC: Tensor, labels_N: NDArray[np.generic]) -> float:
    """The objective over all samples of a file."""
    return float(sample_losses(scores_NC, torch.from_numpy(labels_N)).double().mean())


def answers(scores_NC: Tensor, task: Task) -> NDArray[np.generic]:
    """The most probable class of each sample, int64 [N]; in a regression the value within the task's range, fp32."""
    if not task.is_regression:
        return scores_NC.argmax(1).numpy()
    values_N = scores_NC[:, 0].numpy()
    return values_N if task.value_range is None else values_N.clip(*task.value_range)


def metrics_of(scores_NC: Tensor, labels_N: NDArray[np.generic], task: Task) -> dict[str, float]:
    """The official metrics of a task on one labelled file."""
    return measure(task.metrics, answers(scores_NC, task), labels_N, num_classes=task.num_outputs)


def prediction_lines(scores_NC: Tensor, task: Task) -> list[str]:
    """The lines of a predictions file: a header, then the number of each row and its label as the data writes it."""
    found = answers(scores_NC, task)
    if task.is_regression:
        digits = ".6g" if task.value_range is None else ".3f"
        words = [format(value, digits) for value in found]
    else:
        words = [task.labels[number] for number in found]
    return ["index\tprediction", *(f"{number}\t{word}" for number, word in enumerate(words))]


def write_predictions(path: Path, scores_NC: Tensor, task: Task) -> None:
    """Write a predictions file as the GLUE leaderboard takes it, under its name once it is whole.

    Raises:
        StorageError: the file system refused.
    """
    with storage_errors("write the predictions (--predict)", path, way_out="give another directory"):
        write_text_atomically(path, "\n".join(prediction_lines(scores_NC, task)) + "\n")
