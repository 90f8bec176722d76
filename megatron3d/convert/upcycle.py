"""A dense model as a mixture of experts that computes the same function, to train on from.

The MLP of a layer, y = D a(U x + u) + d with inner width F, is cut along F into G pieces (the granularity), MLPs of
width F / G, and each piece is copied E / G times. Expert e has piece g = e mod G and belongs to the virtual group that
begins with expert e - g:

    its up projection       U_g, u_g, as they are; of a gated MLP the same rows of both halves
    its down projection     (G / s) D_g, and the bias d / s
    its row of the router   that of expert e - g

where s is the sum of a token's weights: 1, or --moe-router-topk-scaling-factor. The G experts of a virtual group have
equal logits, so a token that chooses K experts, a multiple of G, chooses whole groups c, in which all have one weight
w_c, and G sum_c w_c = s. What they give it is

    sum_c w_c sum_g ((G / s) D_g a(U_g x + u_g) + d / s)  =  D a(U x + u) + d

for every x and every router, as long as the weights do add up to s: those of a softmax over all experts do not.

Source: Komatsuzaki et al. 2022 (arXiv:2212.05055) for upcycling; He et al. 2024 (arXiv:2410.07524), section 3, for
granularity and virtual groups. Their scale is the cube root of G for each matrix of a gated MLP, which is not exact.

Shapes: F inner width of the dense MLP, H hidden, E experts of a layer, K chosen, G granularity.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron3d.checkpoint.index import read_index
from megatron3d.checkpoint.load import assemble, read_document
from megatron3d.config.check import model_problems
from megatron3d.config.sections.model import ModelConfig
from megatron3d.config.sections.train import TrainConfig
from megatron3d.config.serialize import from_dict
from megatron3d.config.tokenizer_copy import TOKENIZER_FOLDER, beside_checkpoint
from megatron3d.convert.hf import HF_DOCUMENT, require_unused, save_weights
from megatron3d.convert.tokenizer_files import files_of, named_in, write_files
from megatron3d.errors import CheckpointError, ConfigError
from megatron3d.models.counts import declared_specs
from megatron3d.models.stage import whole_stage
from megatron3d.models.zoo import architecture_of
from megatron3d.params.init import initial_full
from megatron3d.params.module import declared_states

GRANULARITY = "--moe-upcycling-granularity"


@dataclass(frozen=True)
class Upcycled:
    """What was written: the checkpoint's directory, and the model in it."""

    directory: Path
    model: ModelConfig


def upcycled_model(dense: ModelConfig, experts: Mapping[str, Any], granularity: int) -> ModelConfig:
    """The mixture of experts that a dense model becomes.

    Args:
        dense: the model.
        experts: values of the options of experts, by name.
        granularity: pieces that each MLP is cut into, G.

    Raises:
        ConfigError: no such mixture computes what the dense model does, with all reasons.
    """
    if dense.has_experts:
        raise ConfigError(
            f"the checkpoint has a model of {dense.num_experts} experts already; upcycling starts from a dense one"
        )
    if granularity < 1:
        raise ConfigError(f"{GRANULARITY} {granularity} counts pieces of an MLP; use 1 or more")
    width = dense.ffn_hidden_size // granularity or 1
    model = replace(dense, **experts, moe_ffn_hidden_size=width)
    if not model.has_experts:
        raise ConfigError(f"--num-experts {model.num_experts} makes no mixture of experts; use 2 or more")
    problems = list(_inexact(dense, model, granularity)) or model_problems(model)
    if problems:
        raise ConfigError("\n".join(problems))
    return model


def _inexact(dense: ModelConfig, model: ModelConfig, granularity: int) -> Iterator[str]:
    """Why tokens would not get the dense model's output."""
    experts, chosen = model.num_experts or 0, model.moe_router_topk
    for option, value in (
        ("--ffn-hidden-size", dense.ffn_hidden_size),
        ("--num-experts", experts),
        ("--moe-router-topk", chosen),
    ):
        if value % granularity:
            yield (
                f"{GRANULARITY} {granularity} does not divide {option} {value}: each MLP becomes that many pieces, and "
                "a token passes all of them or none; use a divisor of it."
            )
    if model.moe_router_pre_softmax:
        yield (
            "--moe-router-pre-softmax gives a token weights that do not add up to 1, so the experts would not compute "
            "what the dense model does; leave it out."
        )
    if chosen == 1:
        yield (
            "--moe-router-topk 1 has a weight that is always 1, with which the router would never learn, or one that "
            "does not add up to 1, with which the experts would not compute what the dense model does; use 2 or more."
        )
    groups = model.moe_router_num_groups
    if groups and experts % groups == 0 and (experts // groups) % granularity:
        yield (
            f"--moe-router-num-groups {groups} makes groups of {experts // groups} experts, which {GRANULARITY} "
            f"{granularity} does not divide, so pieces of one MLP would lie in two; use a number of groups that fits."
        )


def upcycle(checkpoint: Path, save: Path, *, experts: Mapping[str, Any], granularity: int, seed: int) -> Upcycled:
    """Write the mixture of experts that a checkpoint's dense model becomes: its weights, for `--finetune`.

    Args:
        checkpoint: of any layout; its optimizer state is not read.
        save: where the new one goes, with the tokenizer that lies beside the old one.
        experts: values of the options of experts, by name.
        granularity: pieces that each MLP is cut into, G.
        seed: of the router's weights.

    Raises:
        CheckpointError: the checkpoint is damaged, or is not that of its `run.json`.
        ConfigError: no such mixture computes what the dense model does, or `save` holds checkpoints already.
        StorageError: the file system refused.
    """
    require_unused(save)
    run = from_dict(read_document(checkpoint, "run"))
    model = upcycled_model(run.model, experts, granularity)
    tensors = _tensors(checkpoint, model, granularity, seed)
    data, folder = beside_checkpoint(run.data, checkpoint), save / TOKENIZER_FOLDER
    if (checkpoint.parent / TOKENIZER_FOLDER).is_dir():
        write_files(folder, files_of(data, model))
        data = named_in(data, folder)
    has_settings = f"{HF_DOCUMENT}.json" in read_index(checkpoint).documents
    settings = {HF_DOCUMENT: read_document(checkpoint, HF_DOCUMENT)} if has_settings else {}
    return Upcycled(save_weights(save, model, data, tensors, settings), model)


def _tensors(checkpoint: Path, model: ModelConfig, granularity: int, seed: int) -> dict[str, Tensor]:
    """All weights and states of the mixture by name; copies of a piece are one tensor."""
    parts: dict[str, tuple[Tensor, ...]] = {}
    tensors: dict[str, Tensor] = {}
    for spec in declared_specs(model):
        layer, _, rest = spec.name.partition(".mlp.")
        if rest.startswith("experts."):
            number, part = rest.removeprefix("experts.").split(".", 1)
            dense = f"{layer}.mlp.{part}"
            if dense not in parts:
                parts[dense] = _parts_of(dense, assemble(checkpoint, f"model/{dense}"), model, granularity)
            tensors[spec.name] = parts[dense][int(number) % granularity]
        elif rest == "router.weight":
            rows_EH = initial_full(spec, seed=seed)
            tensors[spec.name] = rows_EH[::granularity].repeat_interleave(granularity, 0)
        else:
            tensors[spec.name] = assemble(checkpoint, f"model/{spec.name}")
        if tensors[spec.name].shape != spec.shape:
            raise CheckpointError(
                f"checkpoint {checkpoint} gives {spec.name} the shape {tuple(tensors[spec.name].shape)}, and its "
                f"run.json makes it {spec.shape}; give a checkpoint that its run.json describes"
            )
    train = TrainConfig(micro_batch_size=1, global_batch_size=1)  # on which no state depends
    stage = whole_stage(model, train, architecture_of(model).build_stage)
    for name, state in declared_states([stage]).items():
        tensors[name] = initial_full(state.spec.cut.named(name), seed=seed).to(state.spec.dtype)
    return tensors


def _parts_of(name: str, full: Tensor, model: ModelConfig, granularity: int) -> tuple[Tensor, ...]:
    """The parameter of a dense MLP as those of the experts of a virtual group."""
    if ".up." in name:
        halves = full.chunk(2) if model.is_gated else (full,)
        return tuple(torch.cat(part) for part in zip(*(half.chunk(granularity) for half in halves), strict=True))
    sum_of_weights = model.moe_router_topk_scaling_factor or 1.0
    if name.endswith(".bias"):
        return (_scaled(full, 1 / sum_of_weights),) * granularity
    scaled = _scaled(full, granularity / sum_of_weights)
    return tuple(part.contiguous() for part in scaled.chunk(granularity, dim=1))


def _scaled(values: Tensor, factor: float) -> Tensor:
    """Products, in fp32 where those of 16 bits would be rounded: not by a power of two."""
    is_exact = math.frexp(factor)[0] == 0.5
    return (values if is_exact else values.to(torch.promote_types(values.dtype, torch.float32))) * factor
