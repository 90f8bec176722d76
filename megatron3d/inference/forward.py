"""The forward of generation: sequences side by side that grow at their right end, token by token.

Sequences of different lengths are aligned at the right, so that all grow at the same place. The padding to the left
of the shorter ones is never attended to and has no position, so each sequence gets what it would get alone.

A forward is the forward-only schedule through the interpreter of training. With several stages the sequences pass as
several micro-batches where they divide, so that stages work at the same time. With context-parallel ranks these read
prompts together (`prefill.py`), and then go on alike.

Dims: B sequences, T places (padding included), S places read in one forward, H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from megatron3d.comm.collectives import all_gather
from megatron3d.config.sections.model import ModelConfig
from megatron3d.inference.kv_cache import StageCache
from megatron3d.inference.prefill import chunks, cut_chunk, plan_of_chunk
from megatron3d.models.stage import MicroBatch
from megatron3d.pipeline.run import Wire, run
from megatron3d.train.setup import Model

# The head gives logits for every place it reads; more tokens at once would need memory for no gain in speed.
MAX_TOKENS_READ_AT_ONCE = 2048


@dataclass(frozen=True)
class _Group:
    """The rows that pass through the pipeline as one micro-batch, and their cache."""

    rows: slice
    cache: StageCache | None


class GrowingBatch:
    """A batch of sequences and how far the model has read them."""

    def __init__(
        self, model: Model, config: ModelConfig, padding_B: Tensor, capacity: int, *, use_cache: bool = True
    ) -> None:
        """Prepare for sequences of at most `capacity` places.

        Args:
            model: this rank's stages, without sequence parallelism.
            config: the resolved model.
            padding_B: places of padding at the left of each sequence, int64 on the model's device.
            capacity: T, places for which the cache is allocated.
            use_cache: False reads everything again for every token; slow, and the reference for the cache.
        """
        self.model, self.config, self.padding_B, self.use_cache = model, config, padding_B, use_cache
        self.is_padded = bool((padding_B > 0).any())
        self.num_read = 0
        num_rows = padding_B.shape[0]
        num_groups = gcd(num_rows, model.mesh.pp.size)
        self.group_size = num_rows // num_groups
        starts = range(0, num_rows, self.group_size)
        self.groups = [_Group(slice(i, i + self.group_size), self._new_cache(capacity)) for i in starts]

    def _new_cache(self, capacity: int) -> StageCache | None:
        if not self.use_cache:
            return None
        mesh = self.model.mesh
        heads = self.config.num_query_groups * mesh.kv.size // mesh.tp.size
        layers = [layer for stage in self.model.stages.values() for layer in stage.part.layers]
        shape = (self.group_size, heads, capacity, self.config.kv_channels)
        return StageCache(layers, shape, dtype=self.model.dtype, device=self.model.device)

    def read(self, tokens_BT: Tensor, stop: int) -> Tensor | None:
        """Read the places up to `stop` and predict the token at `stop`; all ranks of a model replica call this alike.

        Args:
            tokens_BT: the sequences so far, int64; places from `stop` on are not looked at.
            stop: end of what is read now.

        Returns:
            Logits [B, V] in fp32 over the true vocabulary, on the ranks of the last stage; None elsewhere.
        """
        first = self.num_read if self.use_cache else 0
        at_once = max(1, MAX_TOKENS_READ_AT_ONCE // tokens_BT.shape[0]) if self.use_cache else stop
        outputs: list[Tensor] = []
        for places, is_cut in chunks(
            first, stop, at_once=at_once, num_ranks=self.model.mesh.cp.size if self.use_cache else 1
        ):
            outputs = self._forward(tokens_BT, places, is_cut=is_cut)
        self.num_read = stop
        if not outputs:
            return None
        local_BV = torch.cat([logits_SBV[-1] for logits_SBV in outputs])
        # Columns from the vocabulary's size on are padding: they belong to no token.
        return all_gather(local_BV, self.model.mesh.tp, dim=-1)[:, : self.config.vocab_size].float()

    def _forward(self, tokens_BT: Tensor, places: range, *, is_cut: bool) -> list[Tensor]:
        micros = self._cut_micros(tokens_BT, places) if is_cut else self._micros(tokens_BT, places)
        model = self.model
        row = model.rows.forward_only(len(micros))
        shapes = [(micros[0].tokens_BS.shape[1], self.group_size, self.config.hidden_size)] * len(micros)
        wire = Wire(model.mesh.pp, shapes, model.dtype, model.device)
        return run(row.schedule, row.actions, model.stages, micros, wire=wire)

    def _micros(self, tokens_BT: Tensor, places: range) -> list[MicroBatch]:
        start, stop = places.start, places.stop
        positions_BS, mask_BST = self._positions(start, stop), self._mask(start, stop)
        return [
            MicroBatch(
                tokens_BS=tokens_BT[group.rows, start:stop],
                position_ids_BS=positions_BS[group.rows],
                attention_mask_BST=None if mask_BST is None else mask_BST[group.rows],
                cache=group.cache,
            )
            for group in self.groups
        ]

    def _cut_micros(self, tokens_BT: Tensor, places: range) -> list[MicroBatch]:
        """Those of the places on which this context-parallel rank works."""
        shards = cut_chunk(places, self.model.mesh.cp, tokens_BT.device)
        (own_L,) = shards.positions_BL
        positions_BL = self._positions(places.start, places.stop)[:, own_L]
        tokens_BL = tokens_BT[:, places.start : places.stop][:, own_L]
        padding = self.padding_B.tolist()
        return [
            MicroBatch(
                tokens_BS=tokens_BL[group.rows],
                position_ids_BS=positions_BL[group.rows],
                rectangles=plan_of_chunk(shards, places, padding[group.rows]),
                cache=group.cache,
                shards=shards,
            )
            for group in self.groups
        ]

    def _positions(self, start: int, stop: int) -> Tensor:
        """Positions [B, S] of the places, counted from each sequence's first token."""
        places_S = torch.arange(start, stop, device=self.padding_B.device)
        positions_BS = (places_S - self.padding_B.unsqueeze(1)).clamp(min=0)
        if self.config.position_embedding_type == "learned_absolute":
            # A sequence that has ended at the last position stays in the batch; what it reads is thrown away.
            positions_BS = positions_BS.clamp(max=self.config.max_position_embeddings - 1)
        return positions_BS

    def _mask(self, start: int, stop: int) -> Tensor | None:
        """True where place S may attend to place T, [B, S, T]; None where plain causal attention says the same."""
        if not self.is_padded and (start == 0 or stop - start == 1):
            return None
        places_T = torch.arange(stop, device=self.padding_B.device)
        places_S1 = places_T[start:].unsqueeze(1)
        is_token_B1T = (places_T >= self.padding_B.unsqueeze(1)).unsqueeze(1)
        # Padding attends to itself: a row of the mask without any place would give values that are not numbers.
        return (places_T <= places_S1) & (is_token_B1T | (places_T == places_S1))
