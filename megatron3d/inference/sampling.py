"""From logits to the next token: greedy, or drawn with temperature, top-k and top-p.

Every draw is a pure function of the seed, the number of the prompt and the position, so the same text comes out
whatever else is in the batch and whatever the layout.

Source: Fan et al. 2018, section 5.1 (top-k); Holtzman et al. 2020, section 3.1 (top-p, the nucleus).

Dims: B sequences, V vocabulary (without padding).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron3d.errors import ConfigError
from megatron3d.params.streams import stream_seed


@dataclass(frozen=True)
class SamplingOptions:
    """How to go on from a prompt, and when to stop.

    Attributes:
        max_new_tokens: stop after this many tokens.
        greedy: take the most probable token each time; the other options of drawing then have no meaning.
        temperature: logits are divided by it; below 1 the probable becomes more probable.
        top_k: draw from this many most probable tokens; 0 is all.
        top_p: draw from the fewest most probable tokens that together reach this probability; 1 is all. With
            `top_k`, of what that leaves.
        seed: of the draws.
        ignore_eod: go on after the end-of-document token.

    Raises:
        ConfigError: values out of range, all of them in one message.
    """

    max_new_tokens: int
    greedy: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1234
    ignore_eod: bool = False

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise ConfigError("\n".join(problems))

    def _problems(self) -> Iterator[str]:
        if self.max_new_tokens < 1:
            yield f"--max-new-tokens {self.max_new_tokens} asks for no text; use at least 1."
        if not 0.0 < self.temperature < math.inf:
            yield f"--temperature {self.temperature:g} is not above 0; use a small one such as 0.1, or --greedy."
        if self.top_k < 0:
            yield f"--top-k {self.top_k} is negative; use 0 for all tokens, or at least 1."
        if not 0.0 < self.top_p <= 1.0:
            yield f"--top-p {self.top_p:g} is not a probability above 0; use 1 for all tokens, or less."


def uniform_draw(seed: int, prompt_number: int, position: int) -> float:
    """A number from [0, 1) that belongs to one position of one prompt."""
    return (stream_seed(seed, "generation", prompt_number, position) >> 10) / 2.0**53


def choose_tokens(logits_BV: Tensor, options: SamplingOptions, draws_B: Tensor) -> Tensor:
    """The next token of every sequence, int64 [B].

    Args:
        logits_BV: of the true vocabulary, any float dtype.
        options: how to choose.
        draws_B: a number from [0, 1) for each sequence, fp64; not used when greedy.
    """
    if options.greedy:
        return logits_BV.argmax(-1)
    # fp64, so that the sum of a large vocabulary's probabilities is 1 to more digits than a draw can tell apart.
    ranked_BV, ids_BV = (logits_BV.double() / options.temperature).sort(dim=-1, descending=True, stable=True)
    if options.top_k:
        ranked_BV = ranked_BV[:, : options.top_k]
    probability_BV = ranked_BV.softmax(-1)
    before_BV = probability_BV.cumsum(-1) - probability_BV
    in_nucleus_BV = before_BV < options.top_p
    in_nucleus_BV[:, 0] = True
    cumulative_BV = probability_BV.where(in_nucleus_BV, 0.0).cumsum(-1)
    target_B1 = draws_B.unsqueeze(-1) * cumulative_BV[:, -1:]
    place_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)
    last_B1 = in_nucleus_BV.sum(-1, keepdim=True) - 1
    return ids_BV.gather(-1, torch.minimum(place_B1, last_B1)).squeeze(-1)
