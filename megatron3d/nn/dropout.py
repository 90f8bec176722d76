"""Dropout by place: what is dropped is a function of where an element stands in the run, not of who computes it.

    run and step        `DropoutStream.seed`
    sample              its number in the step's global batch
    site                the name of the place in the model, such as layers.3.mlp
    head                of attention probabilities, its number in the whole model
    position            in the whole sequence
    element             hidden element, or position of the key

So data-parallel ranks, micro-batches, shards of heads or of the sequence, stages and recomputation cut the same masks,
whatever the layout. The bits are those of `megatron3d_kernels/dropout.py`: each line above picks a key from the one
before it, and the last line picks 16 bits.

Shapes: S sequence (local under sequence parallelism), B micro-batch, H hidden, N heads of this rank, T keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron3d_kernels.dropout import RowDropout, child_keys
from megatron3d_kernels.registry import Registry
from torch import Tensor

from megatron3d.params.streams import stream_seed


@dataclass(frozen=True)
class DropoutStream:
    """The random numbers of one micro-batch.

    Attributes:
        seed: of the run and the step, 63 bits.
        first_sample: number of the micro-batch's first sample in the step's global batch; the others follow it.
    """

    seed: int
    first_sample: int

    def keys(self, site: str, num_samples: int, device: torch.device) -> Tensor:
        """The key of each sample at a site, int64 [B]."""
        samples_B = torch.arange(self.first_sample, self.first_sample + num_samples, device=device)
        return child_keys(stream_seed(self.seed, site), samples_B)


def step_seed(seed: int, step: int) -> int:
    """The seed of the dropout of one step of a run."""
    return stream_seed(seed, "dropout", step)


def hidden_dropout(
    x_SBH: Tensor,
    probability: float,
    stream: DropoutStream | None,
    *,
    site: str,
    positions_SB: Tensor,
    kernels: Registry,
) -> RowDropout | None:
    """Which elements of a tensor like [S, B, H] are dropped, whose row s of sample b stands at `positions_SB[s, b]`
    (int64, [S, B], or [S, 1] for all samples alike) of the sequence; without a stream, none."""
    if stream is None or probability == 0.0:
        return None
    key = stream_seed(stream.seed, site)
    return RowDropout(kernels.row_keys(x_SBH, key, stream.first_sample, positions_SB), probability)


def drop_hidden(
    x_SBH: Tensor,
    probability: float,
    stream: DropoutStream | None,
    *,
    site: str,
    positions_SB: Tensor,
    kernels: Registry,
) -> Tensor:
    """Dropout of [S, B, H] by `hidden_dropout`; without a stream, `x_SBH` as it is."""
    dropping = hidden_dropout(x_SBH, probability, stream, site=site, positions_SB=positions_SB, kernels=kernels)
    return x_SBH if dropping is None else kernels.dropout(x_SBH, dropping.keys, dropping.probability)


def drop_samples(
    x_BH: Tensor, probability: float, stream: DropoutStream | None, *, site: str, kernels: Registry
) -> Tensor:
    """Dropout of [B, H], a row for each sample; without a stream, `x_BH` as it is."""
    if stream is None or probability == 0.0:
        return x_BH
    return kernels.dropout(x_BH, stream.keys(site, len(x_BH), x_BH.device), probability)


def attention_keys(
    stream: DropoutStream, *, site: str, num_samples: int, heads_N: Tensor, positions_S: Tensor
) -> Tensor:
    """The keys of attention probabilities' rows, int64 [B, N, S]: of each sample, head and query position."""
    keys_B11 = stream.keys(site, num_samples, positions_S.device).view(-1, 1, 1)
    return child_keys(child_keys(keys_B11, heads_N.unsqueeze(1)), positions_S)
