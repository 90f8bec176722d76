"""This project: the parts and the step that pretrain_gpt.py uses, from the same command line, on given tokens."""

from __future__ import annotations

import itertools

import torch

from megatron3d.comm.mesh import make_mesh
from megatron3d.config.check import resolve
from megatron3d.config.cli import parse_args
from megatron3d.data.batch import GPTBatch
from megatron3d.models.gpt import build_gpt_stage
from megatron3d.planner.layout import layout_of
from megatron3d.train.setup import build_parts
from megatron3d.train.step import Rates, train_step
from tools.bench.peers.trainee import LEARNING_RATE, WEIGHT_DECAY, Trainee, tokens_and_labels
from tools.bench.peers.work import Work


def build(work: Work) -> Trainee:
    """The model of this rank with its optimizer."""
    config = resolve(parse_args(_flags(work), program="compare", description=""), work.ranks)
    mesh = make_mesh(layout_of(config.parallel))
    parts = build_parts(config, mesh, torch.device("cpu"), build_gpt_stage)
    tokens_NS, labels_NS = tokens_and_labels(work)
    batch = GPTBatch(tokens_NS, labels_NS, torch.ones(labels_NS.shape))
    rates, numbers = Rates(LEARNING_RATE, WEIGHT_DECAY), itertools.count()
    num_parameters = sum(p.numel() for stage in parts.model.stages.values() for p in stage.parameters())
    return Trainee(lambda: train_step(parts, batch, rates, step=next(numbers)).loss, num_parameters)


def _flags(work: Work) -> list[str]:
    flags = (
        f"--num-layers {work.num_layers} --hidden-size {work.hidden_size} --seq-length {work.seq_length} "
        f"--num-attention-heads {work.num_attention_heads} --vocab-size {work.vocab_size} --mock-data "
        f"--micro-batch-size {work.micro_batch} --global-batch-size {work.num_sequences} --train-iters 1 "
        f"--lr {LEARNING_RATE} --clip-grad 0 --hidden-dropout 0 --attention-dropout 0 --activation gelu --device cpu"
    )
    return flags.split() + (["--bf16"] if work.dtype == "bf16" else [])
