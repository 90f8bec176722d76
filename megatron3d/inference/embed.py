"""Texts to vectors with a BERT: the encoder's outputs pooled to one vector a text, at any layout.

Texts of near-equal length go together, so that little padding is computed; padding is masked, so each text gets what
it would get alone. Data-parallel replicas read different batches.

Source: Reimers and Gurevych 2019 (arXiv:1908.10084), section 3, for the poolings; Devlin et al. 2018
(arXiv:1810.04805) for the pooler.

Shapes: N texts, B texts of a batch, S its length, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron3d.comm.collectives import all_reduce
from megatron3d.comm.mesh import Mesh
from megatron3d.config.architectures import named
from megatron3d.config.run import RunConfig
from megatron3d.convert.hf import fill_views
from megatron3d.errors import CheckpointError, ConfigError, NumericsError
from megatron3d.inference.load import allocate_model, load_model
from megatron3d.models.bert_encoder import EncoderHead
from megatron3d.models.stage import MicroBatch
from megatron3d.models.zoo import architecture_of
from megatron3d.pipeline.run import run
from megatron3d.train.setup import Model

POOLINGS = ("mean", "cls", "pooler")


@dataclass(frozen=True)
class EmbedOptions:
    """How texts become vectors.

    Attributes:
        pooling: the mean of all tokens, the output of the first token, or the pooler's output.
        normalize: whether vectors are scaled to length 1.
        batch_tokens: tokens, padding included, that are worked on at once.
        pad: the id that fills rows up.
    """

    pooling: str = "mean"
    normalize: bool = False
    batch_tokens: int = 8192
    pad: int = 0


def load_encoder(
    config: RunConfig, mesh: Mesh, device: torch.device, weights: Path | Mapping[str, Tensor], *, pooling: str
) -> Model:
    """This rank's stages of the encoder, with weights; collective over all ranks.

    Args:
        config: from `inference.load.generation_config`.
        mesh: the live layout.
        device: where the weights go.
        weights: a checkpoint, or full tensors by name (see `convert.hf.read_model`).
        pooling: one of POOLINGS; only "pooler" needs the pooler's weights.

    Raises:
        CheckpointError: weights are missing or damaged.
        ConfigError: the model gives no vectors.
    """
    build = architecture_of(config.model).build_encoder
    if build is None:
        raise ConfigError(f"{named(config.model.architecture)} gives no vectors; they come from a BERT")
    builder = partial(build, with_pooler=pooling == "pooler")
    if isinstance(weights, Path):
        return load_model(config, mesh, device, weights, builder=builder)
    model, views = allocate_model(config, mesh, device, builder)
    missing = fill_views(views, weights)
    if missing:
        raise CheckpointError(
            f"the weights lack {', '.join(missing[:3])} of the encoder; take a directory with the whole model"
        )
    return model


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Numbers of texts in batches whose padded size is at most `batch_tokens` (or of a single text), longest first."""
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    batches: list[list[int]] = []
    for number in order:
        longest = lengths[batches[-1][0]] if batches else 0
        if batches and longest * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches


def embed(model: Model, config: RunConfig, texts: Sequence[Sequence[int]], options: EmbedOptions) -> Tensor:
    """One vector a text, fp32 [N, H] on the CPU, the same on every rank; all ranks call this alike.

    Args:
        model: from `load_encoder`.
        config: the run it was built from.
        texts: token ids with those that begin and end a text, at least one each.
        options: how to pool.

    Raises:
        NumericsError: a vector is not finite.
    """
    mesh = model.mesh
    found_NH = torch.zeros(len(texts), config.model.hidden_size, device=model.device)
    batches = batches_by_length([len(ids) for ids in texts], options.batch_tokens)
    with torch.no_grad():
        for numbers in batches[mesh.batch.rank :: mesh.batch.size]:
            pooled_BH = _pooled(model, config, [texts[number] for number in numbers], options)
            if pooled_BH is not None and mesh.reports_samples:
                found_NH[numbers] = pooled_BH
    # Each row was filled in by one rank of all; the others hold zeros.
    found_NH = all_reduce(found_NH, mesh.world).cpu()
    if not bool(found_NH.isfinite().all()):
        row = int((~found_NH.isfinite()).any(1).nonzero()[0])
        raise NumericsError(f"the vector of text {row} is not finite: the weights are of no use")
    return F.normalize(found_NH, dim=1) if options.normalize else found_NH


def _pooled(model: Model, config: RunConfig, texts: list[Sequence[int]], options: EmbedOptions) -> Tensor | None:
    """Vectors [B, H] in fp32 of one batch, on the ranks of the last stage; None elsewhere."""
    device, width = model.device, max(map(len, texts))
    lengths_B = torch.tensor([len(ids) for ids in texts], device=device)
    tokens_BS = torch.tensor([[*ids, *[options.pad] * (width - len(ids))] for ids in texts], device=device)
    is_token_BS = torch.arange(width, device=device) < lengths_B.unsqueeze(1)
    mask_B1S = None if bool(is_token_BS.all()) else is_token_BS.unsqueeze(1)
    row = model.rows.forward_only(1)
    micros = [MicroBatch(tokens_BS=tokens_BS, attention_mask_BST=mask_B1S)]
    wire = model.wire(config.model, config.parallel, micros)
    outputs = run(row.schedule, row.actions, model.stages, micros, wire=wire)
    if not outputs:
        return None
    x_SBH = outputs[0]
    if options.pooling == "cls":
        return x_SBH[0].float()
    if options.pooling == "pooler":
        (head,) = (stage.head for stage in model.stages.values() if isinstance(stage.head, EncoderHead))
        return head.pooled(x_SBH).float()
    weights_SB1 = is_token_BS.t().unsqueeze(-1).float()
    return (x_SBH.float() * weights_SB1).sum(0) / lengths_B.unsqueeze(1)
