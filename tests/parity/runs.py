"""Short training runs whose losses, gradient norms and first gradients are compared between layouts."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import Mesh, make_mesh
from megatron3d.config.check import resolve
from megatron3d.config.cli import parse_args
from megatron3d.config.run import RunConfig
from megatron3d.data.build import BertData, GPTData, build_data
from megatron3d.data.loader import GlobalBatches
from megatron3d.models.zoo import architecture_of
from megatron3d.params.boxes import Box
from megatron3d.train.setup import TrainingSetup, build_parts
from megatron3d.train.step import Rates, train_step
from tests.parity.penalised import build_penalised_stage

VOCAB_SIZE = 101  # not a multiple of any degree: every layout pads differently
NUM_STEPS = 20  # of the promise
BRIEF_STEPS = 4
RATES = Rates(lr=2e-3, weight_decay=0.1)

SHAPE = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 16 "
    "--global-batch-size 8 --train-iters 20 --lr 2e-3 --mock-data --hidden-dropout 0 "
    "--attention-dropout 0 --make-vocab-size-divisible-by 4 --num-workers 0 --device cpu --clip-grad 0.5 "
    f"--vocab-size {VOCAB_SIZE}"
)
DROPOUT = "--hidden-dropout 0.1 --attention-dropout 0.1"
MODELS = {
    "gpt2": "",
    "gpt2-deep": "--num-layers 8",
    "gpt2-untied": "--untie-embeddings-and-output-weights",
    "gpt2-1p": "--apply-layernorm-1p",
    # With rotary positions: without them no score depends on the bias of the keys' norm, and its gradient is noise.
    "gpt2-1p-heads": "--apply-layernorm-1p --qk-layernorm --position-embedding-type rope",
    "gpt2-words": "--vocab-size 1029",  # whose table stage 3 of ZeRO cuts into blocks of rows
    "gpt2-mqa": "--group-query-attention",
    "llama": (
        "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
        "--untie-embeddings-and-output-weights --ffn-hidden-size 64"
    ),
    "llama-tied": (
        "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
        "--ffn-hidden-size 64 --qk-layernorm"
    ),
    "gpt2-drops": DROPOUT,
    "llama-drops": (
        f"--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear {DROPOUT} "
        "--ffn-hidden-size 64 --group-query-attention --num-query-groups 2"
    ),
    "llama-gqa": (
        "--position-embedding-type yarn --rotary-original-max-position-embeddings 4 --normalization RMSNorm --swiglu "
        "--disable-bias-linear --add-qkv-bias --ffn-hidden-size 64 --qk-layernorm --num-query-groups 2"
    ),
}
# Frozen: the beginning of the model, so that no gradient goes through it; and parameters here and there in each block.
FROZEN = {
    "gpt2-begun": "--freeze-params embedding.* layers.0.* layers.1.*",
    "gpt2-mixed": "--freeze-params *.attention.* *.mlp.up.weight *.mlp_norm.bias embedding.position.*",
}
# Mixtures of experts: gated experts whose weights add up to one; and, with biases, all that a router may do.
EXPERTS = {
    "experts": (
        "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear --ffn-hidden-size 64 "
        "--untie-embeddings-and-output-weights --num-experts 4 --moe-z-loss-coeff 1e-3"
    ),
    "experts-many": (
        "--ffn-hidden-size 32 --num-experts 8 --moe-router-topk 4 --moe-layer-freq ([0]*1+[1]*3) "
        "--moe-ffn-hidden-size 48 --moe-router-score-function sigmoid --moe-router-enable-expert-bias "
        "--moe-router-bias-update-rate 0.01 --moe-router-num-groups 4 --moe-router-group-topk 2 "
        "--moe-router-topk-scaling-factor 1.5 --moe-shared-expert-intermediate-size 16 --moe-shared-expert-gate "
        "--moe-input-jitter-eps 0.01 --moe-router-load-balancing-type seq_aux_loss global_aux_loss "
        "--moe-aux-loss-coeff 0.01 0.02 "
        "--moe-expert-capacity-factor 1 --moe-token-drop-policy random"
    ),
    "experts-pyramid": (  # and residual
        "--ffn-hidden-size 32 --num-experts 2 4 4 --moe-layer-freq 1::1 --mlp-type residual "
        "--moe-router-topk 1 --moe-router-pre-softmax"
    ),
}
BUILT_BY_TESTS = {"penalised": build_penalised_stage}  # GPTs with something that no model of the project has
# Half of the samples are short, so that micro-batches differ in how many of their tokens are masked. With this seed
# the first sentence labels are 1 and 0 in unequal numbers: else the head's gradients cancel to almost nothing.
_BERT_SAMPLES = "--seed 10 --short-seq-prob 0.5 --mask-prob 0.3"
BERTS = {
    "bert": _BERT_SAMPLES,
    "bert-post": f"{_BERT_SAMPLES} --norm-position post --norm-epsilon 1e-12",
    "bert-masked": f"{_BERT_SAMPLES} --bert-no-binary-head",
    "bert-drops": f"{_BERT_SAMPLES} {DROPOUT}",
    "bert-untied": f"{_BERT_SAMPLES} --untie-embeddings-and-output-weights --bert-sentence-task next",
}


@dataclass(frozen=True)
class Case:
    """A model, a layout, and the options that must not change a result; and how many steps show that."""

    model: str
    layout: Layout
    options: str = ""
    num_steps: int = NUM_STEPS

    def __str__(self) -> str:
        return f"{self.model:12s} {self.layout!s:18s} {self.options}"


@dataclass(frozen=True)
class Trace:
    """What a run gave: loss and gradient norm of each step, and the first step's gradients as (box, values)."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, list[tuple[Box, Tensor]]]


def brief(case: Case) -> Case:
    """A case over few steps, where others show its layout, model and ZeRO stage over all; `--whole-parity` gives it all
    of them too.

    What is new in such a row (an order, another end of the model) shows in the first step's gradients, which are
    compared element by element, or in the updates and the gathers of the next few.
    """
    return replace(case, num_steps=BRIEF_STEPS)


def micro_batch_size(case: Case) -> int:
    """The reference takes the batch at once (`compare.reference`), a layout in smaller pieces: that must not matter.

    One process and tensor parallelism alone take four samples of a GPT at a time, as a run costs as much as it has
    calls and collectives; those of a BERT stay pairs on several ranks, which differ in how many tokens are masked.
    """
    layout = case.layout
    if layout.dp > 4:
        return 1
    if layout.world_size == 1:
        return 4
    return 4 if layout.world_size == layout.tp and case.model not in BERTS else 2


def batches(
    cases: Iterable[Case], *, short: Collection[Case] = (), slow: Collection[Case] = (), by_layout: bool = False
) -> list[Any]:
    """Parameters (world size, cases) of a test, for one start of the workers each.

    Args:
        cases: all of them.
        short: those of `cases` that a short run (`--fast`) takes too.
        slow: those that only `-m slow` takes: combinations of what other rows have in pairs.
        by_layout: one test for each layout, not only for each world size.
    """
    marks = {"": [], "-short": [pytest.mark.fast], "-slow": [pytest.mark.slow]}
    groups: dict[str, tuple[int, str, list[Case]]] = {}
    for case in cases:
        size, kind = case.layout.world_size, "-short" if case in short else "-slow" if case in slow else ""
        layout = f"-{case.layout}".replace(" ", "") if by_layout else ""
        groups.setdefault(f"world{size}{layout}{kind}", (size, kind, []))[2].append(case)
    missing = {*short, *slow} - set(itertools.chain.from_iterable(group for *_, group in groups.values()))
    assert not missing, f"{missing} are not among the cases"
    return [
        pytest.param(size, group, id=name, marks=marks[kind]) for name, (size, kind, group) in sorted(groups.items())
    ]


def config_of(case: Case) -> RunConfig:
    """The resolved config of a case."""
    layout = case.layout
    degrees = f"--tensor-model-parallel-size {layout.tp} --pipeline-model-parallel-size {layout.pp}"
    degrees += f" --expert-model-parallel-size {layout.ep} --context-parallel-size {layout.cp}"
    degrees += "" if layout.etp is None else f" --expert-tensor-parallel-size {layout.etp}"
    is_bert = case.model in BERTS
    model = BERTS[case.model] if is_bert else f"{(MODELS | FROZEN | EXPERTS).get(case.model, '')} --eod-mask-loss"
    argv = f"{SHAPE} {model} --micro-batch-size {micro_batch_size(case)} {degrees} {case.options}".split()
    words = parse_args(argv, program="test", description="test", architecture="bert" if is_bert else "gpt")
    return resolve(words, case.layout.world_size)


def parts_of(case: Case, mesh: Mesh) -> TrainingSetup:
    """The parts of a case on a live mesh."""
    config = config_of(case)
    builder = BUILT_BY_TESTS.get(case.model, architecture_of(config.model).build_stage)
    return build_parts(config, mesh, torch.device("cpu"), builder)


def data_of(config: RunConfig) -> GPTData | BertData:
    """The mock data of a case's model."""
    return build_data(config.data, config.model, tokenizer=None, eod_token=0)


def trace(parts: TrainingSetup, *, num_steps: int = NUM_STEPS, first_step: int = 0, rates: Rates = RATES) -> Trace:
    """Train for some steps on mock data at a constant rate."""
    config, engine, readers = parts.config, parts.engine, parts.mesh.batch
    data = data_of(config)
    losses, norms = [], []
    gradients: dict[str, list[tuple[Box, Tensor]]] = {}
    size = config.train.global_batch_size
    finish_reduce = engine.finish_reduce

    def finish_and_keep_first() -> None:
        finish_reduce()
        if not gradients:
            views = engine.grad_views()
            gradients.update(
                {n: [(box, tensor.clone()) for box, tensor in view.box_tensors()] for n, view in views.items()}
            )

    with (
        mock.patch.object(engine, "finish_reduce", finish_and_keep_first),
        GlobalBatches(data.reader(data.train), num_workers=config.data.num_workers) as batches,
    ):
        for step in range(first_step, first_step + num_steps):
            result = train_step(parts, batches.read(step * size, size, readers.rank, readers.size), rates, step=step)
            losses.append(result.loss)
            norms.append(result.grad_norm)
    return Trace(losses, norms, gradients)


def trace_cases(rank: int, world_size: int, cases: list[Case]) -> list[Trace]:
    """Body of a worker: the traces of several cases of one world size."""
    return [trace(parts_of(case, make_mesh(case.layout)), num_steps=case.num_steps) for case in cases]


def assemble(traces: list[Trace], shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Full gradients from the boxes of all ranks; elements that no rank holds stay NaN and so cannot compare equal."""
    full = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
    for one in traces:
        for name, pieces in one.gradients.items():
            for box, values in pieces:
                full[name][box.slices()] = values
    return full
