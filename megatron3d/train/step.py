"""One optimizer step: forwards and backwards of a global batch, reduction, clipping, update.

Losses and counts travel as sums. The model declares its losses (`nn/loss_sink.py`): a GPT has one, that of its tokens;
a BERT with the sentence head a second, that of its pairs. The objective is the weighted sum of their means, each its
sum over its global count. Counts are known before the first forward, so the gradient of each sum is simply
weight / count (times the loss scale) and nothing is averaged twice, whatever the layout and however counts differ
between micro-batches.

Shapes: K losses of the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron3d.comm.collectives import all_reduce
from megatron3d.comm.device import sent
from megatron3d.data.batch import GroupedSamples, Samples
from megatron3d.data.shorten import with_shape_of_step
from megatron3d.errors import NumericsError
from megatron3d.models.stage import MicroBatch
from megatron3d.nn.documents import Rectangles, document_rectangles
from megatron3d.nn.dropout import step_seed
from megatron3d.nn.loss_sink import LossSink, LossSpec
from megatron3d.optim.build import set_grad_scale, set_rates
from megatron3d.optim.clip import clip_factor
from megatron3d.pipeline.run import Backward, Recorder, run
from megatron3d.train.context import ContextCutter, cutter_of
from megatron3d.train.dropout import first_samples, with_dropout
from megatron3d.train.expert_load import expert_loads, expert_shares
from megatron3d.train.random_ltd import with_token_dropping
from megatron3d.train.setup import TrainingSetup


@dataclass(frozen=True)
class Rates:
    """Learning rate and weight decay of one step."""

    lr: float
    weight_decay: float


@dataclass(frozen=True)
class StepResult:
    """What one step gave, the same on every rank.

    Attributes:
        loss: the objective, the weighted sum of `losses`.
        losses: each loss of the model by name, the mean over what it counts in the global batch.
        grad_norm: global norm before clipping.
        skipped: whether the update was left out because gradients were not finite (fp16).
        stop_votes: how many ranks asked to stop.
        expert_loads: how tokens were spread over experts, by name (`train/expert_load.py`); empty in a dense model, and
            where the update was left out.
    """

    loss: float
    losses: Mapping[str, float]
    grad_norm: float
    skipped: bool
    stop_votes: int
    expert_loads: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_finite(self) -> bool:
        """Whether the step shows that the weights it began with are good to train from."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def train_step(
    parts: TrainingSetup,
    batch: Samples | GroupedSamples,
    rates: Rates,
    *,
    step: int,
    consumed_samples: int = 0,
    wants_stop: bool = False,
    recorder: Recorder | None = None,
) -> StepResult:
    """Make one optimizer step with this rank's part of the global batch.

    Args:
        parts: the rank's model and optimizer.
        batch: all samples of this data-parallel rank, whole and on the CPU.
        rates: of this step.
        step: number of the step from 0, for the dropout streams and the length of the samples.
        consumed_samples: of the run before the step, for what is chosen by the number of a sample.
        wants_stop: this rank's vote to stop after the step.
        recorder: records what the pipeline does and when.

    Raises:
        NumericsError: loss or gradients are not finite and the run is not one that skips such steps.
    """
    batch = with_shape_of_step(batch, parts.config.train, step)
    counts = global_counts(parts, batch)
    loss_sums = forward_backward(parts, batch, counts, step=step, consumed_samples=consumed_samples, recorder=recorder)
    parts.engine.finish_reduce()  # also joins the thread of a delayed update, which owned the optimizer until here
    parts.states.reduce_totals()
    # The one read of the host in a step, and all that it waits for.
    votes = torch.full((1,), float(wants_stop), dtype=torch.float64, device=loss_sums.device)
    sums = torch.cat([votes, parts.engine.squared_norm().reshape(1), loss_sums, expert_shares(parts)])
    votes, squared_norm, *more = all_reduce(sums, parts.mesh.world).tolist()
    losses = {name: total / counts[name] for name, total in zip(counts, more)}
    loss = objective(parts.model.losses, losses)
    grad_norm = math.sqrt(squared_norm) / parts.scaler.scale
    loads: Mapping[str, float] = {}
    skipped = not _finite_or_raise(parts, losses, loss, grad_norm)
    if not skipped:
        set_rates(parts.optimizer, lr=rates.lr, weight_decay=rates.weight_decay)
        grad_scale = clip_factor(grad_norm, parts.config.optim.clip_grad) / parts.scaler.scale
        if not set_grad_scale(parts.optimizer, grad_scale):
            parts.engine.scale_grads(grad_scale)
        parts.engine.step(parts.optimizer, writes_copies=parts.writes_copies)
        parts.states.update()
        loads = expert_loads(parts.config.model, more[len(losses) :])
    parts.scaler.update(not skipped)
    parts.engine.clear_grads()
    return StepResult(loss, losses, grad_norm, skipped, int(votes), loads)


def global_counts(parts: TrainingSetup, batch: Samples | GroupedSamples) -> dict[str, int]:
    """What each loss counts in the global batch (at least 1, so that a batch without any has a loss of 0).

    The host counts and the host asks, so this waits for nothing that is queued on the device.
    """
    totals = all_reduce(counts_of(parts.model.losses, batch), parts.mesh.host_batch).tolist()
    return {spec.name: max(1, total) for spec, total in zip(parts.model.losses, totals, strict=True)}


def counts_of(losses: Sequence[LossSpec], batch: Samples | GroupedSamples) -> Tensor:
    """What each loss counts in a batch, int64 [K].

    Raises: ValueError if the batch does not have the count of one of the losses.
    """
    counts = batch.counts()
    for spec in losses:
        if spec.counted not in counts:
            raise ValueError(
                f"the loss {spec.name!r} is a mean over {spec.counted!r}, which a {type(batch).__name__} does not "
                f"count; it counts {', '.join(counts)}"
            )
    return torch.stack([counts[spec.counted] for spec in losses])


def objective(losses: Sequence[LossSpec], means: Mapping[str, float]) -> float:
    """The weighted sum of the means, which are given by the name of the loss."""
    return sum(spec.weight * means[spec.name] for spec in losses)


def forward_backward(
    parts: TrainingSetup,
    batch: Samples | GroupedSamples,
    counts: Mapping[str, int],
    *,
    step: int,
    consumed_samples: int = 0,
    recorder: Recorder | None = None,
) -> Tensor:
    """Run the training schedule, leaving the gradients of the objective, times the loss scale, in the engine.

    Returns:
        This rank's share of the summed losses, fp64 [K]: shares add up over all ranks.
    """
    config, model = parts.config, parts.model
    gradients = {spec.name: parts.scaler.scale * spec.weight / counts[spec.name] for spec in model.losses}
    losses = LossSink(model.losses, tp_rank=parts.mesh.tp.rank, device=model.device, gradients=gradients)
    cutter = cutter_of(config.model, config.parallel, parts.mesh.cp)
    micros = micro_batches(batch, config.train.micro_batch_size, device=model.device, losses=losses, cutter=cutter)
    numbers = first_samples(batch, config.train.micro_batch_size, parts.mesh.batch)
    micros = with_dropout(micros, config.model, seed=step_seed(config.data.seed, step), first_samples=numbers)
    of_run = [consumed_samples + number for number in numbers]
    micros = with_token_dropping(micros, parts.random_ltd, step=step, first_samples=of_run)
    row = model.rows.training(len(micros))
    parts.engine.begin_step(len(micros))
    parts.states.clear_totals()
    with model.unchanged_weights():
        run(
            row.schedule,
            row.actions,
            model.stages,
            micros,
            wire=model.wire(config.model, config.parallel, micros),
            backward=Backward(
                model.sink,
                parts.engine.reduce_stage,
                before=parts.engine.before_backward,
                after=parts.engine.after_backward,
            ),
            recorder=recorder,
        )
    return losses.sums()


def micro_batches(
    batch: Samples | GroupedSamples,
    size: int,
    *,
    device: torch.device,
    losses: LossSink | None = None,
    cutter: ContextCutter | None = None,
) -> list[MicroBatch]:
    """Cut a rank's batch, on the host, into micro-batches on the device, without dropout; `losses` takes those of all
    of them, and `cutter` gives this rank's part of their samples."""
    micros = []
    for micro in batch.split(size):
        part, inputs = (micro, {}) if cutter is None else cutter.cut(micro, device)
        index_P, rectangles = part.label_index(), _rectangles(part)  # before it moves: nothing waits for a device
        inputs |= {
            "label_index_P": None if index_P is None else sent(index_P, device),
            "rectangles": rectangles,
        }
        on_device = part.moved(lambda tensor: sent(tensor, device))
        micros.append(MicroBatch(**on_device.model_inputs() | inputs, losses=losses))
    return micros


def _rectangles(part: Samples) -> Rectangles | None:
    """What attends to what in samples of packed documents, where these are whole."""
    documents_BS = part.documents()
    return None if documents_BS is None else document_rectangles(documents_BS)


def _finite_or_raise(parts: TrainingSetup, losses: Mapping[str, float], loss: float, grad_norm: float) -> bool:
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return True
    optim = parts.config.optim
    if optim.precision == "fp16":
        return math.isfinite(grad_norm)
    if optim.check_for_nan_in_loss_and_grad:
        terms = f" ({', '.join(f'{name} {mean}' for name, mean in losses.items())})" if len(losses) > 1 else ""
        raise NumericsError(
            f"loss {loss}{terms} or gradient norm {grad_norm} is not finite; lower --lr (now {optim.lr}), look at this "
            "step's data (--iterations-to-skip leaves it out), or go on regardless with "
            "--no-check-for-nan-in-loss-and-grad"
        )
    return True
