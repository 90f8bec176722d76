"""Samples cut over context-parallel ranks: which tokens of a micro-batch this rank works on.

All that has a value for each token (tokens, labels, their weights, positions, segments) is cut together, on the host,
and after labels exist: a label stays beside the token that it follows, so nothing is shifted over a cut. What the
losses count was counted before, of whole samples.

Shapes: B samples, S tokens of a sample, L = S/cp tokens of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron3d.comm.mesh import Axis
from megatron3d.config.sections.model import ModelConfig
from megatron3d.config.sections.parallel import ParallelConfig
from megatron3d.data.batch import BertBatch, GPTBatch, Samples
from megatron3d.nn.context.cut import ContextCut
from megatron3d.nn.context.shards import ContextShards, shards_of


@dataclass(frozen=True)
class ContextCutter:
    """Cuts the samples of micro-batches.

    Attributes:
        kind: of the cut.
        axis: the context-parallel ranks; one alone has whole samples.
        is_causal: whether tokens of the model attend to none behind them.
    """

    kind: str
    axis: Axis
    is_causal: bool

    def cut(self, samples: Samples, device: torch.device) -> tuple[Samples, dict[str, Any]]:
        """This rank's part of a micro-batch on the host; and, on `device`, what the model is given of it besides or
        instead of what such samples give it, by the names of `models.stage.MicroBatch`.

        Raises: ConfigError if samples of this length have no equal parts.
        """
        if self.axis.size == 1:
            return samples, {}
        cut = ContextCut(self.kind, samples.tokens_BS.shape[1], self.axis.size)
        shards = shards_of(cut, self.axis.rank, _documents(samples), is_causal=self.is_causal)
        part = replace(samples, **_at(samples, shards.positions_BL))
        if isinstance(part, GPTBatch):
            part = replace(part, document_ids_BS=None)  # the shards say who attends to whom
        return part, self._inputs(part, shards, device)

    def _inputs(self, part: Samples, shards: ContextShards, device: torch.device) -> dict[str, Any]:
        on_device = shards.sent_to(device)
        inputs: dict[str, Any] = {"shards": on_device, "attention_mask_BST": None}
        if not (isinstance(part, GPTBatch) and part.position_ids_BS is not None):
            inputs["position_ids_BS"] = on_device.positions_BL
        return inputs


def cutter_of(model: ModelConfig, parallel: ParallelConfig, axis: Axis) -> ContextCutter:
    """How a run cuts its samples over the context-parallel ranks."""
    return ContextCutter(parallel.context_cut, axis, model.is_causal)


def _documents(samples: Samples) -> Tensor | None:
    """The number of the document of each token, [B, S]; text and its padding are two documents."""
    return (~samples.padding_mask_BS).to(torch.int64) if isinstance(samples, BertBatch) else samples.documents()


def _at(samples: Samples, positions_BL: Tensor) -> dict[str, Tensor]:
    """Every field of samples that has a value for each token, at these positions of each sample."""
    rows, length = samples.tokens_BS.shape
    index_BL = positions_BL.expand(rows, -1)
    tensors = {name: value for name, value in vars(samples).items() if isinstance(value, Tensor)}
    return {name: value.gather(1, index_BL) for name, value in tensors.items() if value.shape == (rows, length)}
