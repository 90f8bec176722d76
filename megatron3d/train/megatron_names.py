"""Megatron-LM's names for what a run draws, so that its dashboards and scripts read our runs; ours stand beside them.

Megatron-LM draws most curves twice: over iterations, and as "NAME vs samples" over the consumed samples. The second
kind goes to TensorBoard alone. Two of its curves are means over a log interval there and single steps here:
iteration-time (seconds) and throughput (TFLOP/s of a device). Of an iteration that is left out it draws nothing.

Source: Megatron-LM, megatron/training/training.py, training_log and evaluate_and_print_results; its pretrain_bert.py
for the two losses of a BERT. It draws the losses on the test split as "validation" too, over the last true ones; here
they have our names alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from megatron3d.train.metrics import StepRecord

_LOSSES = {"lm": "lm loss", "sentence": "sop loss"}
_WITHOUT_SAMPLES = ("iteration-time", "throughput", "samples vs steps")
_LARGEST_EXPONENT = 20.0  # of a perplexity, as in Megatron-LM


def step_scalars(record: StepRecord) -> dict[str, float]:
    """The curves of one training step by Megatron-LM's names; what the record lacks is left out."""
    if record.loss is None:
        return {}
    losses = {name.removesuffix("_loss"): value for name, value in record.losses.items()} or {"lm": record.loss}
    found = {
        **{_loss_name(name): value for name, value in losses.items()},
        "learning-rate": record.lr,
        "batch-size": record.batch_size,
        "grad-norm": record.grad_norm,
        "loss-scale": 1.0 if record.loss_scale is None else record.loss_scale,
        "iteration-time": record.step_time_s,
        "throughput": record.tflops_per_device,
        "samples vs steps": record.consumed_samples,
    }
    return {name: float(value) for name, value in found.items() if value is not None}


def evaluation_scalars(losses: Mapping[str, float]) -> dict[str, float]:
    """The curves of an evaluation on the validation split: each loss, and the perplexity of those that Megatron-LM has,
    which are cross-entropies."""
    found = {}
    for name, loss in losses.items():
        found[f"{_loss_name(name)} validation"] = loss
        if name in _LOSSES:
            found[f"{_loss_name(name)} validation ppl"] = math.exp(min(_LARGEST_EXPONENT, loss))
    return found


def over_samples(scalars: Mapping[str, float]) -> dict[str, float]:
    """Those of these curves that Megatron-LM draws over the consumed samples too, by the names they have there."""
    return {f"{name} vs samples": value for name, value in scalars.items() if name not in _WITHOUT_SAMPLES}


def _loss_name(name: str) -> str:
    return _LOSSES.get(name, f"{name} loss")
