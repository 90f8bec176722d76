"""Evaluation: mean losses over the first global batches of a stream, by a forward-only schedule.

Every evaluation reads the same samples, so its numbers compare along a run and between runs. Where the model declares
accuracies, it also reports which share of its predictions is right; and beside the share of right tokens what the best
constant answer would reach on the same labels: the share of the most frequent one, the unigram baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron3d.comm.collectives import all_reduce
from megatron3d.data.batch import Batch
from megatron3d.nn.loss_sink import LossSink
from megatron3d.pipeline.run import run
from megatron3d.train.context import cutter_of
from megatron3d.train.setup import TrainingSetup
from megatron3d.train.step import counts_of, micro_batches, objective


class BatchReader(Protocol):
    """What gives one rank's part of a global batch: `GlobalBatches`, or something that stands before it."""

    def read(self, consumed_samples: int, global_batch_size: int, dp_rank: int, dp_size: int) -> Batch:
        """The samples of this rank of the global batch that follows `consumed_samples`."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found, the same on every rank.

    Attributes:
        loss: the objective, the weighted sum of the losses.
        losses: each loss of the model by name, the mean over what it counts.
        accuracies: the shares of hits, 0 to 1, by the names under which the model declares them.
        unigram_accuracy: share of the most frequent token among the labels, 0 to 1; None where not measured.
    """

    loss: float
    losses: Mapping[str, float]
    accuracies: Mapping[str, float]
    unigram_accuracy: float | None = None

    def scalars(self) -> dict[str, float]:
        """Everything by its name in reports, without the objective; what says no more than that is left out."""
        named = {f"{name}_loss": loss for name, loss in self.losses.items()} if len(self.losses) > 1 else {}
        named |= self.accuracies
        return named if self.unigram_accuracy is None else named | {"unigram_accuracy": self.unigram_accuracy}


def evaluate(
    parts: TrainingSetup,
    batches: BatchReader,
    *,
    num_batches: int,
    first_sample: int = 0,
    before_batch: Callable[[], None] | None = None,
) -> Evaluation:
    """Mean losses over the labels of `num_batches` (at least 1) global batches from `first_sample` on.

    With a delayed update these are those of the updated weights, which are what a checkpoint of this moment holds.
    `before_batch` is called before each batch on all ranks; it may save and raise to give up, as nothing is under way.
    """
    size = parts.config.train.global_batch_size
    with parts.engine.updated_weights():
        return _evaluate(parts, batches, range(first_sample, first_sample + num_batches * size, size), before_batch)


def _evaluate(
    parts: TrainingSetup, batches: BatchReader, firsts: Sequence[int], before_batch: Callable[[], None] | None
) -> Evaluation:
    readers, size, specs = parts.mesh.batch, parts.config.train.global_batch_size, parts.model.losses
    totals, histogram = torch.zeros(0), torch.zeros(0)
    for number, first in enumerate(firsts):
        if before_batch is not None:
            before_batch()
        batch = batches.read(first, size, readers.rank, readers.size)
        sums = _sums_hits_and_counts(parts, batch)
        totals = sums if number == 0 else totals + sums
        if any(spec.accuracy and spec.counted == "labels" for spec in specs):
            counted = _label_histogram(batch, parts.config.model.vocab_size)
            histogram = counted if number == 0 else histogram + counted
    sums, hits, counts = all_reduce(totals, parts.mesh.world).tolist()
    unigram = None
    if len(histogram):
        of_all = all_reduce(histogram.to(parts.model.device), parts.mesh.batch)
        unigram = float(of_all.max()) / max(1, int(of_all.sum()))
    losses = {spec.name: total / max(1.0, count) for spec, total, count in zip(specs, sums, counts, strict=True)}
    accuracies = {spec.accuracy: n / max(1.0, count) for spec, n, count in zip(specs, hits, counts) if spec.accuracy}
    return Evaluation(objective(specs, losses), losses, accuracies, unigram)


def _sums_hits_and_counts(parts: TrainingSetup, batch: Batch) -> Tensor:
    """This rank's share of the loss sums, of the hits (0 where not measured) and of the counts, fp64 [3, K]."""
    config, model = parts.config, parts.model
    counts_hits = any(spec.accuracy for spec in model.losses)
    losses = LossSink(model.losses, tp_rank=parts.mesh.tp.rank, device=model.device, counts_hits=counts_hits)
    cutter = cutter_of(config.model, config.parallel, parts.mesh.cp)
    micros = micro_batches(batch, config.train.micro_batch_size, device=model.device, losses=losses, cutter=cutter)
    row = model.rows.forward_only(len(micros))
    run(row.schedule, row.actions, model.stages, micros, wire=model.wire(config.model, config.parallel, micros))
    counts = counts_of(model.losses, batch).double().to(model.device)
    if not (model.holds_last_stage and parts.mesh.reports_samples):
        counts.zero_()
    return torch.stack([losses.sums(), losses.hits(), counts])


def _label_histogram(batch: Batch, vocab_size: int) -> Tensor:
    """How often each token is a label that counts, int64 [vocab_size]."""
    return torch.bincount(batch.labels_BS[batch.loss_mask_BS > 0], minlength=vocab_size)
