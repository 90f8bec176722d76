"""This project: the parts and the step that pretrain_gpt.py uses, from the same command line, on given tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from datetime import timedelta

import torch

from megatron3d.comm.join import join
from megatron3d.comm.launch import read_launch
from megatron3d.comm.mesh import Mesh, make_mesh
from megatron3d.comm.meter import wire_bytes
from megatron3d.config.check import resolve
from megatron3d.config.cli import parse_args
from megatron3d.data.batch import GPTBatch, Samples
from megatron3d.models.gpt import build_gpt_stage
from megatron3d.models.stage import Stage
from megatron3d.planner.layout import layout_of
from megatron3d.train.matmul import with_matmul
from megatron3d.train.setup import build_parts
from megatron3d.train.step import Rates, train_step
from tools.bench.peers.megatron3d_flags import flags_of
from tools.bench.peers.trainee import Trainee, own_sequences
from tools.bench.peers.work import LEARNING_RATE, WEIGHT_DECAY, Work

DEVICE = torch.device("cpu")


def build(work: Work) -> Trainee:
    """The model of this rank with its optimizer."""
    tokens_BS, labels_BS = own_sequences(work)
    batch = GPTBatch(tokens_BS, labels_BS, torch.ones(labels_BS.shape))
    return trainee_of(work, flags_of(work), "gpt", build_gpt_stage, batch)


def trainee_of(
    work: Work, flags: list[str], architecture: str, build_stage: Callable[..., Stage], batch: Samples
) -> Trainee:
    """What the command line with these flags trains, and its step on the batch."""
    join(read_launch(), DEVICE, timeout=timedelta(minutes=5))
    given = parse_args(flags, program="compare", description="", architecture=architecture)
    config = resolve(given, work.ranks)
    mesh = make_mesh(layout_of(config.parallel))
    parts = build_parts(with_matmul(config, mesh, DEVICE), mesh, DEVICE, build_stage)
    rates, numbers = Rates(LEARNING_RATE, WEIGHT_DECAY), itertools.count()

    def step() -> float:
        mesh.meter.reset()
        return train_step(parts, batch, rates, step=next(numbers)).loss

    num_parameters = sum(p.numel() for stage in parts.model.stages.values() for p in stage.parameters())
    return Trainee(step, num_parameters, lambda: _sent_bytes(mesh))


def _sent_bytes(mesh: Mesh) -> dict[str, float]:
    """By the ring's formula, of the axes that have other ranks."""
    counts = mesh.meter.read().items()
    sent = {(axis, name): wire_bytes(name, payload, mesh.axis(axis).size) for (axis, name), (_, payload) in counts}
    return {f"{axis} {name.replace('_', '-')}": count for (axis, name), count in sent.items() if count}
