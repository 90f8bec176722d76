"""What training needs and other uses of a run do not: tokens, a length and a learning rate."""

from __future__ import annotations

from dataclasses import replace

from megatron3d.config.derive import complete, derive
from megatron3d.config.run import GivenRun, RunConfig
from megatron3d.config.sections.data import DataConfig
from megatron3d.config.sections.model import ModelConfig
from megatron3d.config.sections.optim import GivenOptim
from megatron3d.config.sections.train import GivenTrain


def with_placeholders(run: GivenRun) -> GivenRun:
    """The run with any tokens, length and learning rate where it has none, so that it can be resolved."""
    data, train, optim = run.data, run.train, run.optim
    has_data = data.data_path or data.train_data_path or data.mock_data
    has_length = (train.train_iters, train.train_samples, train.train_tokens) != (None, None, None)
    return replace(
        run,
        data=data if has_data else replace(data, mock_data=True),
        train=train if has_length else replace(train, train_iters=1),
        optim=optim if optim.lr is not None else replace(optim, lr=1e-4),
    )


def untrained_run(model: ModelConfig, data: DataConfig | None = None) -> RunConfig:
    """A run on one rank of a model that is not trained by it, such as one that is imported."""
    given = GivenRun(
        model=model, data=data or DataConfig(), train=GivenTrain(micro_batch_size=1), optim=GivenOptim(lr=0.0)
    )
    return complete(derive(given, 1))
