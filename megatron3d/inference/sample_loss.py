"""The loss of each sample under a checkpoint, in one process: a metric of tools/analyze_data.py.

Shapes: B rows, S inputs of each, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from megatron3d.checkpoint.directory import find_checkpoint
from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.config.architectures import named
from megatron3d.config.sections.parallel import GivenParallel
from megatron3d.errors import ConfigError
from megatron3d.inference.load import generation_config, load_model
from megatron3d.models.stage import MicroBatch
from megatron3d.pipeline.run import run
from megatron3d.train.compare import read_saved_run

_TOKENS_AT_ONCE = 4096


class SampleLoss:
    """A model that is loaded once from `directory` and gives the mean loss of rows of tokens."""

    def __init__(self, load: str, *, step: int | None = None, device: str = "cpu", seq_length: int) -> None:
        """Load the weights.

        Args:
            load: directory of checkpoints, or one of them.
            step: which checkpoint, default the latest.
            device: "cpu" or "cuda".
            seq_length: S of the rows.

        Raises:
            CheckpointError: there is no such checkpoint, or it is damaged.
            ConfigError: it is no GPT, or has too few positions.
        """
        self.directory = directory = find_checkpoint(Path(load), step)
        stored = read_saved_run(directory).config
        if stored.model.traits.samples != "tokens":
            raise ConfigError(
                f"--load {load} holds {named(stored.model.architecture)}, which does not predict the next token; give "
                "the checkpoint of a GPT."
            )
        limit = stored.model.max_position_embeddings
        if stored.model.position_embedding_type != "none" and seq_length > limit:
            raise ConfigError(
                f"--load {load} has {limit} positions, fewer than --seq-length {seq_length}; give a checkpoint with "
                "enough of them."
            )
        self._config = generation_config(stored, GivenParallel(device=device), world_size=1, bf16=False)
        self._model = load_model(self._config, make_mesh(Layout()), torch.device(device), directory)

    def __call__(self, rows_BS1: NDArray[np.int64]) -> NDArray[np.float64]:
        """The mean loss of each row of S + 1 tokens, float64 [B].

        Raises: ConfigError for ids outside the vocabulary.
        """
        vocab_size = self._config.model.vocab_size
        outside = (rows_BS1 < 0) | (rows_BS1 >= vocab_size)
        if outside.any():
            raise ConfigError(
                f"the data has the token id {rows_BS1[outside][0]}, but the model of --load has ids from 0 to "
                f"{vocab_size - 1}; give a checkpoint that was trained with this tokenizer."
            )
        at_once = max(1, _TOKENS_AT_ONCE // rows_BS1.shape[1])
        parts = [self._losses(rows_BS1[first : first + at_once]) for first in range(0, len(rows_BS1), at_once)]
        return np.concatenate(parts)

    def _losses(self, rows_BS1: NDArray[np.int64]) -> NDArray[np.float64]:
        model, config = self._model, self._config
        tokens_BS1 = torch.from_numpy(rows_BS1).to(model.device)
        row = model.rows.forward_only(1)
        micros = [MicroBatch(tokens_BS=tokens_BS1[:, :-1].contiguous())]
        wire = model.wire(config.model, config.parallel, micros)
        with torch.no_grad():
            logits_SBV: Tensor = run(row.schedule, row.actions, model.stages, micros, wire=wire)[0]
            # Columns from the vocabulary's size on are padding: they belong to no token.
            logits_BVS = logits_SBV[..., : config.model.vocab_size].permute(1, 2, 0).float()
            losses_BS = F.cross_entropy(logits_BVS, tokens_BS1[:, 1:], reduction="none")
        return losses_BS.double().mean(1).cpu().numpy()
