"""What our models say of a batch: bodies for one process or for the ranks of a pool."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron3d.checkpoint.load import read_document, tensor_shapes
from megatron3d.comm.collectives import all_gather
from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import Mesh, make_mesh
from megatron3d.config.run import RunConfig
from megatron3d.config.sections.parallel import GivenParallel
from megatron3d.config.serialize import from_dict
from megatron3d.inference.embed import EmbedOptions, embed, load_encoder
from megatron3d.inference.generate import generate
from megatron3d.inference.load import generation_config, load_model
from megatron3d.inference.sampling import SamplingOptions
from megatron3d.models.bert_classifier import build_bert_classifier_stage
from megatron3d.models.stage import MicroBatch
from megatron3d.models.zoo import architecture_of
from megatron3d.pipeline.run import Wire, run
from megatron3d.train.setup import Model


@dataclass(frozen=True)
class Batch:
    """Token ids, and for a BERT segments and which places are tokens."""

    tokens_BS: Tensor
    types_BS: Tensor | None = None
    real_BS: Tensor | None = None


@dataclass(frozen=True)
class Said:
    """Logits of tokens [B, S, V], of pairs [B, 2] and of classes [B, C], as far as the model has them."""

    tokens: Tensor | None = None
    pairs: Tensor | None = None
    classes: Tensor | None = None


def config_at(layout: Layout, checkpoint: Path) -> RunConfig:
    """The run of a checkpoint at a layout."""
    parallel = GivenParallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        device="cpu",
    )
    stored = from_dict(read_document(checkpoint, "run"))
    return generation_config(stored, parallel, world_size=layout.world_size, bf16=False)


def said(rank: int, world_size: int, checkpoint: Path, layout: Layout, batch: Batch) -> Said | None:
    """What the model of a checkpoint says of a batch, on the ranks of the last stage."""
    config, mesh = config_at(layout, checkpoint), make_mesh(layout)
    classes = tensor_shapes(checkpoint).get("model/head.classifier.weight")
    builder = architecture_of(config.model).build_stage
    if classes is not None:
        builder = partial(build_bert_classifier_stage, num_outputs=classes[0])
    with torch.no_grad():
        model = load_model(config, mesh, torch.device("cpu"), checkpoint, builder=builder)
        return _logits(model, config, mesh, batch, scores_classes=classes is not None)


def said_and_generated(
    rank: int, world_size: int, checkpoint: Path, layout: Layout, batch: Batch, num_tokens: int
) -> tuple[Said | None, Tensor]:
    """The same of a GPT, and the tokens that greedy generation adds to each row [B, num_tokens]."""
    config, mesh = config_at(layout, checkpoint), make_mesh(layout)
    with torch.no_grad():
        model = load_model(config, mesh, torch.device("cpu"), checkpoint)
        options = SamplingOptions(num_tokens, greedy=True)
        new = generate(model, config, batch.tokens_BS.tolist(), options, None, batch_size=1)
        return _logits(model, config, mesh, batch, scores_classes=False), torch.tensor(new)


def _logits(model: Model, config: RunConfig, mesh: Mesh, batch: Batch, *, scores_classes: bool) -> Said | None:
    mask_B1S = None if batch.real_BS is None else batch.real_BS.unsqueeze(1)
    micro = MicroBatch(batch.tokens_BS, attention_mask_BST=mask_B1S, token_types_BS=batch.types_BS)
    last = next((stage for stage in model.stages.values() if stage.part.is_last), None)
    normed: list[Tensor] = []
    scores_pairs = config.model.has_binary_head and not scores_classes
    if last is not None and scores_pairs:
        last.head.register_forward_pre_hook(lambda head, inputs: normed.append(head.normed(inputs[0])))
    row = model.rows.forward_only(1)
    num_samples, length = batch.tokens_BS.shape
    wire = Wire(mesh.pp, [(length, num_samples, config.model.hidden_size)], model.dtype, model.device)
    outputs = run(row.schedule, row.actions, model.stages, [micro], wire=wire)
    if last is None:
        return None
    if scores_classes:
        return Said(classes=outputs[0])
    logits_SBV = all_gather(outputs[0], mesh.tp, dim=-1)[..., : config.model.vocab_size]
    pairs = last.head.pair_logits(last.head.pooled(normed[0])) if scores_pairs else None
    return Said(tokens=logits_SBV.transpose(0, 1), pairs=pairs)


def vectors(
    rank: int, world_size: int, checkpoint: Path, layout: Layout, texts: list[list[int]], options: EmbedOptions
) -> Tensor:
    """The vectors of texts with the encoder of a checkpoint."""
    config = config_at(layout, checkpoint)
    model = load_encoder(config, make_mesh(layout), torch.device("cpu"), checkpoint, pooling=options.pooling)
    return embed(model, config, texts, options)
