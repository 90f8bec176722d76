"""What must hold between lengths that are counted in tokens, or batches in accumulation steps, and their counterparts.

Each rule yields sentences, as in `rules/run.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron3d.config.derive import model_parallel_size
from megatron3d.config.sections.optim import GivenOptim
from megatron3d.config.sections.parallel import ParallelConfig
from megatron3d.config.sections.train import GivenTrain


def tokens_rule(train: GivenTrain, optim: GivenOptim, seq_length: int | None) -> Iterator[str]:
    """Tokens are samples of --seq-length: they go with a run in samples, and set what samples set."""
    for name, tokens in (("decay", optim.lr_decay_tokens), ("warmup", optim.lr_warmup_tokens)):
        if tokens is not None and train.train_iters is not None:
            yield (
                f"--lr-{name}-tokens {tokens} counts tokens, but the run is given by --train-iters; use "
                f"--lr-{name}-iters, or --train-tokens."
            )
    if not seq_length:
        return
    for name, tokens, samples in (
        ("decay", optim.lr_decay_tokens, optim.lr_decay_samples),
        ("warmup", optim.lr_warmup_tokens, optim.lr_warmup_samples),
    ):
        if tokens is not None and samples and samples != max(1, round(tokens / seq_length)):
            yield (
                f"--lr-{name}-tokens {tokens} and --lr-{name}-samples {samples} (of {seq_length} tokens) differ; give "
                "only one of them."
            )


def accumulation_rule(train: GivenTrain, parallel: ParallelConfig) -> Iterator[str]:
    """Accumulation steps set the global batch, which is not given otherwise."""
    dp = parallel.data_parallel_size
    steps, micro, batch = train.gradient_accumulation_steps, train.micro_batch_size, train.global_batch_size
    if steps is None:
        return
    # Ranks that do not factor have no data-parallel size, but some whole size would have to fit.
    if parallel.world_size % model_parallel_size(parallel) and micro and batch:
        dp = max(1, batch // (micro * steps))
    if train.rampup_batch_size or train.step_batch_size_schedule:
        yield (
            f"--gradient-accumulation-steps {steps} is the same in every step, but the batch grows; leave it out, or "
            "the options of a growing batch."
        )
    elif micro and batch and batch != micro * dp * steps:
        yield (
            f"--global-batch-size {batch} is not micro-batch {micro} x data-parallel {dp} x "
            f"--gradient-accumulation-steps {steps} = {micro * dp * steps}; give only one of the two options."
        )
