"""What training needs and a prediction of memory does not: tokens, a length and a learning rate."""

from __future__ import annotations

from dataclasses import replace

from megatron3d.config.run import RunConfig


def with_placeholders(run: RunConfig) -> RunConfig:
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
