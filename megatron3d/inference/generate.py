"""Generation: prompts in, the tokens that follow out, at any layout.

The last stage computes the next tokens; one rank chooses, and all ranks of the model replica get its choice, so no
rank can go another way. Prompts are divided among the data-parallel replicas, unless these share
experts.

Dims: B sequences, T places (see `forward.py`), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron3d.comm.collectives import broadcast, gather_values
from megatron3d.comm.mesh import Axis, Mesh
from megatron3d.config.run import RunConfig
from megatron3d.config.sections.model import ModelConfig
from megatron3d.errors import ConfigError, NumericsError
from megatron3d.inference.forward import GrowingBatch
from megatron3d.inference.load import without_sequence_parallelism
from megatron3d.inference.sampling import SamplingOptions, choose_tokens, uniform_draw
from megatron3d.train.setup import Model


@dataclass(frozen=True)
class _Request:
    """One prompt, its number among all, and how many tokens may follow it."""

    number: int
    prompt: Sequence[int]
    limit: int


def generate(
    model: Model,
    config: RunConfig,
    prompts: Sequence[Sequence[int]],
    options: SamplingOptions,
    eod: int | Collection[int] | None,
    *,
    batch_size: int = 16,
    use_cache: bool = True,
) -> list[list[int]]:
    """The tokens that follow each prompt, the same on every rank; all ranks call this with the same arguments.

    A sequence ends after `options.max_new_tokens`, with a token of `eod` (which is then its last), or where
    a model with learned positions has no more of them.

    Args:
        model: this rank's stages; its weights are used where they are, a model in training too.
        config: the resolved run that `model` was built from.
        prompts: token ids, at least one each.
        options: how to choose, and when to stop.
        eod: the end-of-document token, or all tokens that end a text; None stops at lengths alone.
        batch_size: prompts that are worked on together by one data-parallel replica.
        use_cache: False recomputes everything for every token; slow, and the reference for the cache.

    Raises:
        ConfigError: a prompt is empty, has an id outside the vocabulary, or leaves no position for a new token.
        NumericsError: the model gives logits that are not finite.
    """
    limits = new_token_limits(prompts, config.model, options)
    requests = [_Request(number, *pair) for number, pair in enumerate(zip(prompts, limits, strict=True))]
    model, config = without_sequence_parallelism(model, config)
    readers = _readers(model.mesh)
    own = requests[readers.rank :: readers.size]
    ends = frozenset((eod,) if isinstance(eod, int) else eod or ())
    done: dict[int, list[int]] = {}
    for first in range(0, len(own), batch_size):
        batch = _Batch(model, config.model, own[first : first + batch_size], use_cache=use_cache)
        done |= batch.complete(options, frozenset() if options.ignore_eod else ends)
    by_number = {number: tokens for part in gather_values(done, readers) for number, tokens in part.items()}
    return [by_number[number] for number in range(len(prompts))]


def _readers(mesh: Mesh) -> Axis:
    """The ranks among which prompts are divided: not replicas of the model that share experts, which exchange rows in
    every layer and so must compute as often as each other."""
    holders = {*mesh.expert.ranks, *mesh.expert_tp.ranks}
    return mesh.batch if holders <= {*mesh.tp.ranks} else mesh.alone


def new_token_limits(prompts: Sequence[Sequence[int]], config: ModelConfig, options: SamplingOptions) -> list[int]:
    """How many tokens may follow each prompt; needs no model, so that a prompt can be refused before one is loaded.

    Raises:
        ConfigError: a prompt is empty, has an id outside the vocabulary, or leaves no position for a new token.
    """
    return [_limit(number, prompt, config, options) for number, prompt in enumerate(prompts)]


def position_limit(config: ModelConfig) -> int | None:
    """How many tokens a sequence can have in all; None where there are no positions.

    Rotary ones could be computed for any length, but beyond the one that the model is meant for its text is of no use.
    """
    return None if config.position_embedding_type == "none" else config.max_position_embeddings


def _limit(number: int, prompt: Sequence[int], config: ModelConfig, options: SamplingOptions) -> int:
    if not prompt:
        raise ConfigError(f"prompt {number} is empty: there is nothing to go on from; give it at least one token")
    outside = [token for token in prompt if not 0 <= token < config.vocab_size]
    if outside:
        raise ConfigError(
            f"prompt {number} has the token id {outside[0]}, but the model has ids from 0 to {config.vocab_size - 1}; "
            "use the tokenizer it was trained with"
        )
    positions = position_limit(config)
    if positions is None:
        return options.max_new_tokens
    if len(prompt) >= positions:
        raise ConfigError(
            f"prompt {number} has {len(prompt)} tokens and --max-position-embeddings of the model is {positions}, so "
            f"no token can follow; shorten it to at most {positions - 1}"
        )
    return min(options.max_new_tokens, positions - len(prompt))


class _Batch:
    """Some prompts side by side, aligned at the right, and what was generated so far."""

    def __init__(self, model: Model, config: ModelConfig, requests: Sequence[_Request], *, use_cache: bool) -> None:
        self.model, self.requests = model, requests
        lengths = [len(request.prompt) for request in requests]
        self.width = max(lengths)
        self.capacity = self.width + max(request.limit for request in requests)
        rows = [[0] * (self.width - length) + list(r.prompt) for length, r in zip(lengths, requests, strict=True)]
        self.tokens_BT = torch.zeros(len(rows), self.capacity, dtype=torch.int64, device=model.device)
        self.tokens_BT[:, : self.width] = torch.tensor(rows)
        padding_B = torch.tensor([self.width - length for length in lengths], device=model.device)
        self.sequences = GrowingBatch(model, config, padding_B, self.capacity, use_cache=use_cache)

    def complete(self, options: SamplingOptions, ends: Collection[int]) -> dict[int, list[int]]:
        """Generate until every sequence has ended; returns the new tokens by the number of the prompt."""
        new: list[list[int]] = [[] for _ in self.requests]
        is_open = [True] * len(new)
        for stop in range(self.width, self.capacity):
            next_B = self._next_tokens(self.sequences.read(self.tokens_BT, stop), options, step=stop - self.width)
            self.tokens_BT[:, stop] = next_B
            for row, token in enumerate(next_B.tolist()):
                if is_open[row]:
                    new[row].append(token)
                    is_open[row] = token not in ends and len(new[row]) < self.requests[row].limit
            if not any(is_open):
                break
        return {request.number: tokens for request, tokens in zip(self.requests, new, strict=True)}

    def _next_tokens(self, logits_BV: Tensor | None, options: SamplingOptions, *, step: int) -> Tensor:
        """The next token of every sequence, int64 [B], the same on all ranks that work on it."""
        mesh, device = self.model.mesh, self.model.device
        next_B = torch.zeros(len(self.requests), dtype=torch.int64, device=device)
        if logits_BV is not None:
            if not bool(logits_BV.isfinite().all()):
                raise NumericsError(f"logits of new token {step} are not finite: the weights are of no use")
            draws = [uniform_draw(options.seed, r.number, len(r.prompt) + step) for r in self.requests]
            next_B = choose_tokens(logits_BV, options, torch.tensor(draws, dtype=torch.float64, device=device))
            # Sums of probabilities may differ in the last digit from device to device: one rank's choice counts.
            next_B = broadcast(broadcast(next_B, mesh.tp), mesh.cp)
        next_B = broadcast(next_B, mesh.pp, source=self.model.rows.plan.stage_to_rank[-1])
        return next_B if _readers(mesh).size == mesh.batch.size else broadcast(next_B, mesh.batch)
