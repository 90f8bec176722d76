"""Two tiny models that have learned a few texts by heart, so that what they must generate is known beforehand.

Letters alone do not say which letter follows, so a mistake in positions, masks, cache or layout gives another text;
and logits of learned texts are far apart, so rounding does not.
"""

from __future__ import annotations

from pathlib import Path

import torch

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.config.check import checked
from megatron3d.config.cli import parse_args
from megatron3d.config.run import RunConfig
from megatron3d.data.batch import GPTBatch
from megatron3d.data.tokenizer import ByteTokenizer
from megatron3d.models.gpt import build_gpt_stage
from megatron3d.optim.schedule import settings_from_config
from megatron3d.train import state
from megatron3d.train.setup import build_parts
from megatron3d.train.step import Rates, train_step
from megatron3d.train.vocabulary import open_vocabulary

EOD = 256
VOCAB_SIZE = 257
POSITIONS = 48
TEXTS = (
    "the ship left the harbour at dawn.",
    "the sheep left the hills and came home.",
    "she sells sea shells by the shore.",
    "a stitch in time saves nine.",
    "time and tide wait for no man.",
    "all that glitters is not gold, they said.",
)
# Loss at which every text comes out letter by letter. It cannot be 0: some texts begin alike.
LEARNED_LOSS = 0.03
MAX_STEPS = 300

MODELS = {
    "gpt2": "",
    "llama": (
        "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
        "--untie-embeddings-and-output-weights --ffn-hidden-size 64 --group-query-attention --num-query-groups 2"
    ),
}
EXPERTS = {"experts": "--ffn-hidden-size 32 --num-experts 4 --moe-aux-loss-coeff 0"}


def config_of(model: str, *options: str, world_size: int = 1) -> RunConfig:
    """The resolved run of one of the models."""
    argv = (
        "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --micro-batch-size 6 --train-iters 400 --lr 1e-2 "
        "--hidden-dropout 0 --attention-dropout 0 --make-vocab-size-divisible-by 8 --mock-data --device cpu "
        f"--tokenizer-type ByteTokenizer --seq-length {POSITIONS} {(MODELS | EXPERTS)[model]}"
    ).split()
    config = checked(parse_args([*argv, *options], program="test", description="test"), world_size)
    return open_vocabulary(config)[0]


def texts_as_batch() -> GPTBatch:
    """The texts, each from its first letter to the end of its document; what is behind that does not count."""
    rows = [[*ids(text), EOD] for text in TEXTS]
    tokens = torch.full((len(rows), POSITIONS + 1), EOD)
    mask = torch.zeros(len(rows), POSITIONS)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row) - 1] = 1.0
    return GPTBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), mask)


def ids(text: str) -> list[int]:
    """Token ids of a text."""
    return ByteTokenizer().encode(text)


def train_and_save(model: str, save: Path) -> Path:
    """Learn the texts and write a checkpoint; returns its directory."""
    parts = build_parts(
        config_of(model, "--save", str(save)), make_mesh(Layout()), torch.device("cpu"), build_gpt_stage
    )
    batch, progress, loss = texts_as_batch(), state.Progress(), float("inf")
    while loss > LEARNED_LOSS and progress.step < MAX_STEPS:
        loss = train_step(parts, batch, Rates(lr=1e-2, weight_decay=0.0), step=progress.step).loss
        progress = progress.after(len(TEXTS), tokens=batch.tokens_BS.numel(), skipped=False)
    assert loss <= LEARNED_LOSS, f"{model} has not learned its texts in {MAX_STEPS} steps: loss {loss}"
    return state.save(parts, progress, settings_from_config(parts.config.optim, parts.config.train))
