"""Random layerwise token dropping: which layers see how many positions of each sample, and when."""

from __future__ import annotations

from dataclasses import dataclass

from megatron3d.config.fields import option, options, switch


@dataclass(frozen=True)
class GivenRandomLtd:
    """The options of random-LTD; docs/data_efficiency.md has what they mean, `config/random_ltd.py` reads them."""

    random_ltd: bool = switch(
        "--random-ltd", "Let the middle layers see a random part of each sample's positions (docs/data_efficiency.md)."
    )
    random_ltd_min: int | None = option(
        None, "--random-ltd-min", "Positions that these layers see at first, a multiple of 16.", unit="tokens"
    )
    random_ltd_max: int | None = option(
        None, "--random-ltd-max", "Positions that they see at last; default --seq-length.", unit="tokens"
    )
    random_ltd_steps: int | None = option(
        None, "--random-ltd-steps", "Steps in which their number grows linearly from the first to the last."
    )
    random_ltd_step_size: int = option(
        16, "--random-ltd-step-size", "Their number is a multiple of this on the way, itself one of 16.", unit="tokens"
    )
    random_ltd_layers: tuple[str, ...] = options(
        "--random-ltd-layers", "Layers that drop tokens, from 0, such as 1 2 5 or 1:-1; default all but first and last."
    )
    random_ltd_router: str | None = option(
        None,
        "--random-ltd-router",
        "FILE.py:FUNCTION of your own from (step, layer, sample) to the kept positions, instead of the random choice.",
        takes_code=True,
    )
