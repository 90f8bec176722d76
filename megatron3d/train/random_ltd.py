"""Random layerwise token dropping of a run: its layers, what chooses the positions, and what each micro-batch gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from megatron3d.comm.device import sent
from megatron3d.config.random_ltd import dropping_layers, positions_kept
from megatron3d.config.sections.model import ModelConfig
from megatron3d.config.sections.parallel import ParallelConfig
from megatron3d.config.sections.train import TrainConfig
from megatron3d.errors import ConfigError
from megatron3d.files.user_code import load_user_object
from megatron3d.models.stage import MicroBatch
from megatron3d.nn.token_dropping import PositionRouter, StratifiedRouter, TokenDropping, step_seed

_Chooser = Callable[[int, int, int], Sequence[int]]  # (step, layer, sample) -> kept positions
_FLAG = "--random-ltd-router"


@dataclass(frozen=True)
class RandomLtd:
    """What a run drops: the layers, in which every step has a router of its own."""

    layers: frozenset[int]
    router_at: Callable[[int], PositionRouter]

    def kept_at(self, step: int, length: int) -> Mapping[int, int]:
        """How many positions of a sample of this length each of the layers sees at a step, counted from 0."""
        router = self.router_at(step)
        return {layer: router.num_kept(layer, length) for layer in sorted(self.layers)}


def random_ltd_of(train: TrainConfig, model: ModelConfig, parallel: ParallelConfig, *, seed: int) -> RandomLtd | None:
    """Random-LTD as the options ask for it; None where they do not.

    Raises: ConfigError if the user's own router cannot be loaded.
    """
    if not train.random_ltd:
        return None
    layers = frozenset(dropping_layers(train.random_ltd_layers, model.num_layers))
    if train.random_ltd_router is not None:
        name = train.random_ltd_router
        choose = cast(_Chooser, load_user_object(_FLAG, name, "function", callable))
        shards = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
        return RandomLtd(layers, lambda step: OwnRouter(name, choose, step, shards))
    return RandomLtd(
        layers,
        lambda step: StratifiedRouter(step_seed(seed, step), positions_kept(train, step, model.seq_length)),
    )


def with_token_dropping(
    micros: Sequence[MicroBatch], dropping: RandomLtd | None, *, step: int, first_samples: Sequence[int]
) -> list[MicroBatch]:
    """Give each micro-batch what its layers see, if the run drops tokens.

    Args:
        micros: the micro-batches of a rank for one step.
        dropping: of the run.
        step: counted from 0.
        first_samples: number in the run of each micro-batch's first sample.
    """
    if dropping is None:
        return list(micros)
    router = dropping.router_at(step)
    return [
        replace(micro, dropping=TokenDropping(router, dropping.layers, first))
        for micro, first in zip(micros, first_samples, strict=True)
    ]


@dataclass(frozen=True)
class OwnRouter:
    """The user's own choice, checked; how many a layer keeps may differ between steps and layers, not samples.

    Attributes:
        name: of the function, for messages.
        choose: from (step, layer, sample) to the kept positions.
        step: counted from 0.
        shards: into which sequence parallelism cuts a sample, each of which must keep equally many.
    """

    name: str
    choose: _Chooser
    step: int
    shards: int

    def num_kept(self, layer: int, length: int) -> int:
        """As many as of sample 0.

        Raises: ConfigError as `kept`.
        """
        return len(self._checked(layer, 0, length))

    def kept(self, layer: int, samples: range, length: int, device: torch.device) -> Tensor:
        """What the function says of each of the samples, int64 [B, R].

        Raises: ConfigError if it fails, or what it says are no ascending positions, or not as many of each sample.
        """
        expected = self.num_kept(layer, length)
        rows = [self._checked(layer, sample, length) for sample in samples]
        for sample, row in zip(samples, rows, strict=True):
            if len(row) != expected:
                raise ConfigError(
                    f"{self._called(layer, sample)} keeps {len(row)} positions, and {expected} of sample 0; keep as "
                    "many of every sample in a layer and step."
                )
        return sent(torch.tensor(rows, dtype=torch.int64), device)

    def _checked(self, layer: int, sample: int, length: int) -> list[int]:
        """The positions of one sample."""
        called = self._called(layer, sample)
        try:
            row = torch.as_tensor(self.choose(self.step, layer, sample))
        except Exception as error:
            raise ConfigError(f"{called} failed ({type(error).__name__}: {error}); mend the function.") from error
        if row.dim() != 1 or not len(row) or row.is_floating_point() or row.dtype == torch.bool:
            raise ConfigError(
                f"{called} gave {row.dtype} values of shape {tuple(row.shape)}; give a list of at least one whole "
                "number, the kept positions."
            )
        if not bool((row.diff() > 0).all()) or row[0] < 0 or row[-1] >= length:
            raise ConfigError(
                f"{called} gave positions from {row.min()} to {row.max()}, and they must ascend, each once, within 0 "
                f"to {length - 1}."
            )
        if self.shards > 1:
            counts = torch.bincount(row * self.shards // length, minlength=self.shards)
            if int(counts.min()) != int(counts.max()):
                raise ConfigError(
                    f"{called} keeps {', '.join(map(str, counts.tolist()))} positions of the {self.shards} shards of "
                    "--sequence-parallel; keep equally many of each, or leave that out."
                )
        return [int(position) for position in row.tolist()]

    def _called(self, layer: int, sample: int) -> str:
        return f"{_FLAG} {self.name} at step {self.step}, layer {layer}, sample {sample}"
