"""How many samples of each split a run asks for, as Megatron-LM counts them: they decide its order of samples."""

from __future__ import annotations

from dataclasses import dataclass

from megatron3d.config.batch_size import iterations_for_samples, samples_for_iterations
from megatron3d.config.sections.data import DataConfig
from megatron3d.config.sections.train import TrainConfig


@dataclass(frozen=True)
class SampleCounts:
    """What --sample-order megatron must know of the length of a run.

    Attributes:
        train, valid, test: the samples that Megatron-LM would ask for.
        train_read: the samples of the training order that this run reads up to, counted from that order's beginning.
        valid_read: those of the validation order.
    """

    train: int
    valid: int
    test: int
    train_read: int
    valid_read: int

    @property
    def by_split(self) -> dict[str, int]:
        """The samples asked for, by the name of the split."""
        return {"train": self.train, "valid": self.valid, "test": self.test}


def sample_counts(data: DataConfig, train: TrainConfig, data_parallel_size: int) -> SampleCounts:
    """The counts of a run on so many data-parallel ranks.

    Source: `get_train_valid_test_num_samples` and `update_train_iters` of NVIDIA/Megatron-LM,
    megatron/training/training.py.
    """
    iterations, evaluated = _iterations(train, data_parallel_size), train.eval_iters * train.global_batch_size
    evaluations = iterations // train.eval_interval + 1
    own = train.train_samples
    if own is None:
        own = samples_for_iterations(train, iterations, data_parallel_size)
    return SampleCounts(
        train=train_samples_asked_for(data, train),
        valid=evaluations * evaluated,
        test=evaluated,
        train_read=data.sample_order_consumed + own,
        valid_read=evaluated,
    )


def train_samples_asked_for(data: DataConfig, train: TrainConfig) -> int:
    """The training samples that Megatron-LM would ask for: --sample-order-samples, else what --train-samples or
    --train-iters times --global-batch-size comes to, after those that were consumed before this run."""
    if data.sample_order_samples is not None:
        return data.sample_order_samples
    if train.train_samples is not None:
        return data.sample_order_consumed + train.train_samples
    assert train.train_iters is not None, "a run has a length"
    return data.sample_order_consumed + train.train_iters * train.global_batch_size


def _iterations(train: TrainConfig, data_parallel_size: int) -> int:
    """The optimizer steps of the run; with a schedule of batch sizes an incomplete last one counts, as there."""
    if train.train_iters is not None:
        return train.train_iters
    assert train.train_samples is not None, "a run has a length"
    full_steps = iterations_for_samples(train, train.train_samples, data_parallel_size)
    is_short = samples_for_iterations(train, full_steps, data_parallel_size) < train.train_samples
    return full_steps + (1 if train.batch_size_steps and is_short else 0)
