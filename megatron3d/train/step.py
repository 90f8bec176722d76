"""One optimizer step: forwards and backwards of a global batch, reduction, clipping, update.

Losses and counts travel as sums. The objective is the sum of all masked losses over the global count of masked
tokens; the count is known before the first forward, so each loss's gradient is simply 1 / count (times the loss
scale) and nothing is averaged twice, whatever the layout and however counts differ between micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron3d.comm.collectives import all_reduce
from megatron3d.config.model import ModelConfig
from megatron3d.data.batch import GPTBatch
from megatron3d.errors import NumericsError
from megatron3d.models.stage import MicroBatch
from megatron3d.optim.build import set_rates
from megatron3d.optim.clip import clip_factor
from megatron3d.params.streams import stream_seed
from megatron3d.pipeline.run import Backward, run
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
        loss: mean over the masked tokens of the global batch.
        grad_norm: global norm before clipping.
        skipped: whether the update was left out because gradients were not finite (fp16).
        stop_votes: how many ranks asked to stop.
    """

    loss: float
    grad_norm: float
    skipped: bool
    stop_votes: int


def train_step(parts: Parts, batch: GPTBatch, rates: Rates, *, step: int, wants_stop: bool = False) -> StepResult:
    """Make one optimizer step with this rank's part of the global batch.

    Args:
        parts: the rank's model and optimizer.
        batch: all samples of this data-parallel rank, on the CPU.
        rates: of this step.
        step: number of the step from 0, for the dropout streams.
        wants_stop: this rank's vote to stop after the step.

    Raises:
        NumericsError: loss or gradients are not finite and the run is not one that skips such steps.
    """
    count = global_count(parts, batch)
    loss_sum = forward_backward(parts, batch, count, step=step)
    parts.engine.finish_reduce()
    votes = torch.tensor(float(wants_stop), dtype=torch.float64, device=loss_sum.device)
    sums = torch.stack([loss_sum, parts.engine.squared_norm(), votes])
    loss_sum, squared_norm, votes = all_reduce(sums, parts.mesh.world).cpu()
    loss = float(loss_sum) / count
    grad_norm = math.sqrt(float(squared_norm)) / parts.scaler.scale
    skipped = not _finite_or_raise(parts, loss, grad_norm)
    if not skipped:
        set_rates(parts.optimizer, lr=rates.lr, weight_decay=rates.weight_decay)
        parts.engine.scale_grads(clip_factor(grad_norm, parts.config.optim.clip_grad) / parts.scaler.scale)
        parts.engine.step(parts.optimizer)
    parts.scaler.update(not skipped)
    parts.engine.clear_grads()
    return StepResult(loss, grad_norm, skipped, int(votes))


def global_count(parts: Parts, batch: GPTBatch) -> int:
    """Tokens of the global batch whose loss counts (at least 1, so that a batch without any gives a loss of 0)."""
    count = batch.loss_count().to(parts.model.device)
    return max(1, int(all_reduce(count.reshape(1), parts.mesh.dp)))


def forward_backward(parts: Parts, batch: GPTBatch, count: int, *, step: int) -> Tensor:
    """Run the training schedule, leaving gradients of sum / count in the engine.

    Returns:
        This rank's share of the summed loss, fp64: shares add up over all ranks.
    """
    config, model = parts.config, parts.model
    micros = micro_batches(batch, config.train.micro_batch_size, config.model, device=model.device)
    micros = with_dropout(micros, config.model, seed=config.data.seed, step=step, dp_rank=parts.mesh.dp.rank)
    row = model.rows.training(len(micros))
    parts.engine.begin_step(len(micros))
    gradient = torch.tensor(parts.scaler.scale / count, device=model.device)
    losses = run(
        row.schedule,
        row.actions,
        model.stages,
        micros,
        wire=model.wire(config, micro_batch_size=config.train.micro_batch_size),
        backward=Backward(
            gradient,
            model.sink,
            parts.engine.reduce_stage,
            before=parts.engine.before_backward,
            after=parts.engine.after_backward,
        ),
    )
    return share_of_sum(parts, losses)


def share_of_sum(parts: Parts, losses: Sequence[Tensor]) -> Tensor:
    """The sum of a rank's losses, fp64, or 0 where another rank of its model replica reports the same losses."""
    if not losses or parts.mesh.tp.rank > 0:
        return torch.zeros((), dtype=torch.float64, device=parts.model.device)
    return torch.stack(list(losses)).double().sum()


def micro_batches(batch: GPTBatch, size: int, model: ModelConfig, *, device: torch.device) -> list[MicroBatch]:
    """Cut a rank's batch into micro-batches on the device, without dropout."""
    return [
        MicroBatch(
            tokens_BS=part.tokens_BS,
            labels_BS=part.labels_BS,
            loss_mask_BS=part.loss_mask_BS,
            position_ids_BS=part.position_ids_BS,
            attention_mask_BST=_within_documents(part.document_ids_BS),
        )
        for part in batch.to(device).split(size)
    ]


def with_dropout(
    micros: list[MicroBatch], model: ModelConfig, *, seed: int, step: int, dp_rank: int
) -> list[MicroBatch]:
    """Give each micro-batch the dropout stream of its place in the run, if the model drops anything."""
    if model.hidden_dropout == 0.0 and model.attention_dropout == 0.0:
        return micros
    return [
        MicroBatch(**{**vars(micro), "dropout_seed": stream_seed(seed, "dropout", step, dp_rank, number)})
        for number, micro in enumerate(micros)
    ]


def _within_documents(document_ids_BS: Tensor | None) -> Tensor | None:
    """Causal attention within each document: [B, S, S], True where S may attend to T."""
    if document_ids_BS is None:
        return None
    length = document_ids_BS.shape[1]
    causal_ST = torch.ones(length, length, dtype=torch.bool, device=document_ids_BS.device).tril()
    return (document_ids_BS.unsqueeze(2) == document_ids_BS.unsqueeze(1)) & causal_ST


def _finite_or_raise(parts: Parts, loss: float, grad_norm: float) -> bool:
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return True
    optim = parts.config.optim
    if optim.precision == "fp16":
        return math.isfinite(grad_norm)
    if optim.check_for_nan_in_loss_and_grad:
        raise NumericsError(
            f"loss {loss} or gradient norm {grad_norm} is not finite; lower --lr (now {optim.lr}), look at this "
            "step's data, or go on regardless with --no-check-for-nan-in-loss-and-grad"
        )
    return True
