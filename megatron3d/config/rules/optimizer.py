"""What must hold between the options of the optimizer. Each rule yields sentences, as in `rules/run.py`."""

from __future__ import annotations

from collections.abc import Iterator

from megatron3d.config.sections.optim import GivenOptim
from megatron3d.config.update_rules import optimizers_with

_ADAM = ("adam", "adamw")


def decoupling_rule(optim: GivenOptim) -> Iterator[str]:
    """Only Adam has two ways of decaying weights, and AdamW is one of them."""
    if not optim.decoupled_weight_decay and optim.optimizer != "adam":
        yield (
            f"--no-decoupled-weight-decay adds the decay to the gradient of Adam, and --optimizer {optim.optimizer} "
            "does not; use --optimizer adam, or drop it."
        )


def moments_rule(optim: GivenOptim) -> Iterator[str]:
    """A moment that is to be kept in bf16 exists, and whoever keeps it can."""
    scalar = optim.muon_scalar_optimizer if optim.optimizer == "muon" else optim.optimizer
    for flag, dtype, owners in (
        ("--exp-avg-dtype", optim.exp_avg_dtype, optimizers_with("exp_avg")),
        ("--exp-avg-sq-dtype", optim.exp_avg_sq_dtype, optimizers_with("exp_avg_sq")),
    ):
        if dtype != "fp32" and scalar not in owners:
            yield (
                f"{flag} {dtype} concerns a moment that --optimizer {optim.optimizer} does not keep; use one of "
                f"{', '.join(owners)}, or drop it."
            )
        if dtype != "fp32" and optim.optimizer_implementation == "apex":
            yield (
                f"{flag} {dtype} is not for apex, whose moments are fp32; use --optimizer-implementation torch or "
                "transformer-engine, or drop it."
            )


def implementation_rule(optim: GivenOptim, device: str | None) -> Iterator[str]:
    """Other implementations exist for Adam, and on GPUs."""
    if optim.optimizer_implementation == "torch":
        return
    chosen = f"--optimizer-implementation {optim.optimizer_implementation}"
    if optim.optimizer not in _ADAM:
        yield f"{chosen} is an Adam, and --optimizer is {optim.optimizer}; use torch, or --optimizer adam."
    if device == "cpu":
        yield f"{chosen} runs on GPUs only, and --device is cpu; use torch, or --device cuda."
