"""One optimizer step: forwards and backwards of a global batch, reduction, clipping, update.

Losses and counts travel as sums. The objective is, for each loss of the model, its sum over the global count of its
labels (a GPT has one loss, that of its tokens; a BERT with the sentence head a second, that of its samples). Counts
are known before the first forward, so the gradient of each sum is simply 1 / count (times the loss scale) and nothing
is averaged twice, whatever the layout and however counts differ between micro-batches.

Shapes: K losses of the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron3d.comm.collectives import all_reduce
from megatron3d.data.batch import GroupedSamples, Samples
from megatron3d.errors import NumericsError
from megatron3d.models.stage import MicroBatch
from megatron3d.nn.dropout import step_seed
from megatron3d.optim.build import set_rates
from megatron3d.optim.clip import clip_factor
from megatron3d.pipeline.run import Backward, Recorder, run
from megatron3d.train.dropout import first_samples, with_dropout
from megatron3d.train.parts import Parts


@dataclass(frozen=True)
class Rates:
    """Learning rate and weight decay of one step."""

    lr: float
    weight_decay: float


@dataclass(frozen=True)
class StepResult:
    """What one step gave, the same on every rank.

    Attributes:
        loss: the objective, the sum of `losses`.
        losses: each loss of the model by name, the mean over its labels in the global batch.
        grad_norm: global norm before clipping.
        skipped: whether the update was left out because gradients were not finite (fp16).
        stop_votes: how many ranks asked to stop.
    """

    loss: float
    losses: Mapping[str, float]
    grad_norm: float
    skipped: bool
    stop_votes: int

    @property
    def is_finite(self) -> bool:
        """Whether the step shows that the weights it began with are good to train from."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def train_step(
    parts: Parts,
    batch: Samples | GroupedSamples,
    rates: Rates,
    *,
    step: int,
    wants_stop: bool = False,
    recorder: Recorder | None = None,
) -> StepResult:
    """Make one optimizer step with this rank's part of the global batch.

    Args:
        parts: the rank's model and optimizer.
        batch: all samples of this data-parallel rank, on the CPU.
        rates: of this step.
        step: number of the step from 0, for the dropout streams.
        wants_stop: this rank's vote to stop after the step.
        recorder: told what the pipeline does and when.

    Raises:
        NumericsError: loss or gradients are not finite and the run is not one that skips such steps.
    """
    counts = global_counts(parts, batch)
    loss_sums = forward_backward(parts, batch, counts, step=step, recorder=recorder)
    parts.engine.finish_reduce()  # also ends the thread of a delayed update, whose the optimizer was until here
    votes = torch.tensor(float(wants_stop), dtype=torch.float64, device=loss_sums.device)
    sums = torch.stack([*loss_sums, parts.engine.squared_norm(), votes])
    *totals, squared_norm, votes = all_reduce(sums, parts.mesh.world).tolist()
    losses = {name: total / counts[name] for name, total in zip(counts, totals, strict=True)}
    loss = math.fsum(losses.values())
    grad_norm = math.sqrt(squared_norm) / parts.scaler.scale
    skipped = not _finite_or_raise(parts, loss, grad_norm)
    if not skipped:
        set_rates(parts.optimizer, lr=rates.lr, weight_decay=rates.weight_decay)
        parts.engine.scale_grads(clip_factor(grad_norm, parts.config.optim.clip_grad) / parts.scaler.scale)
        parts.engine.step(parts.optimizer)
        parts.states.update()
    parts.scaler.update(not skipped)
    parts.engine.clear_grads()
    return StepResult(loss, losses, grad_norm, skipped, int(votes))


def global_counts(parts: Parts, batch: Samples | GroupedSamples) -> dict[str, int]:
    """Labels of the global batch that each loss counts (at least 1, so that a batch without any has a loss of 0)."""
    counts = batch.loss_counts()
    totals = all_reduce(torch.stack([*counts.values()]).to(parts.model.device), parts.mesh.batch).tolist()
    return {name: max(1, total) for name, total in zip(counts, totals)}


def forward_backward(
    parts: Parts,
    batch: Samples | GroupedSamples,
    counts: Mapping[str, int],
    *,
    step: int,
    recorder: Recorder | None = None,
) -> Tensor:
    """Run the training schedule, leaving the gradients of sum / count, added up over the losses, in the engine.

    Returns:
        This rank's share of the summed losses, fp64 [K]: shares add up over all ranks.
    """
    config, model = parts.config, parts.model
    micros = micro_batches(batch, config.train.micro_batch_size, device=model.device)
    numbers = first_samples(batch, config.train.micro_batch_size, parts.mesh.batch)
    micros = with_dropout(micros, config.model, seed=step_seed(config.data.seed, step), first_samples=numbers)
    row = model.rows.training(len(micros))
    parts.engine.begin_step(len(micros))
    parts.states.clear_totals()
    gradient = torch.tensor([parts.scaler.scale / count for count in counts.values()], device=model.device)
    losses = run(
        row.schedule,
        row.actions,
        model.stages,
        micros,
        wire=model.wire(config, micros),
        backward=Backward(
            gradient,
            model.sink,
            parts.engine.reduce_stage,
            before=parts.engine.before_backward,
            after=parts.engine.after_backward,
        ),
        recorder=recorder,
    )
    return share_of_sums(parts, losses, len(counts))


def share_of_sums(parts: Parts, outputs: Sequence[Tensor], num_sums: int) -> Tensor:
    """What a rank's last stage gave, added up over the micro-batches: fp64 [num_sums].

    All 0 where there is no last stage, or where another rank of the model replica reports the same sums.
    """
    if not outputs or parts.mesh.tp.rank > 0:
        return torch.zeros(num_sums, dtype=torch.float64, device=parts.model.device)
    return torch.stack([torch.stack(terms).double().sum() for terms in zip(*outputs, strict=True)])


def micro_batches(
    batch: Samples | GroupedSamples, size: int, *, device: torch.device, counts_hits: bool = False
) -> list[MicroBatch]:
    """Cut a rank's batch into micro-batches on the device, without dropout."""
    return [MicroBatch(**part.model_inputs(), counts_hits=counts_hits) for part in batch.to(device).split(size)]


def _finite_or_raise(parts: Parts, loss: float, grad_norm: float) -> bool:
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return True
    optim = parts.config.optim
    if optim.precision == "fp16":
        return math.isfinite(grad_norm)
    if optim.check_for_nan_in_loss_and_grad:
        raise NumericsError(
            f"loss {loss} or gradient norm {grad_norm} is not finite; lower --lr (now {optim.lr}), look at this "
            "step's data (--iterations-to-skip leaves it out), or go on regardless with "
            "--no-check-for-nan-in-loss-and-grad"
        )
    return True
