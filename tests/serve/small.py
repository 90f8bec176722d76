"""Classifiers that are small and know nothing, written by any layout: what the tests of serving export and serve.

Every value of a parameter follows from its name, so that all layouts write the same model; biases and norms are not
what they are at the start of a training, lest an export that forgets one go unnoticed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.config.check import checked
from megatron3d.config.cli import parse_args
from megatron3d.models.bert_classifier import build_bert_classifier_stage
from megatron3d.tasks.glue import weights
from megatron3d.tasks.glue.tasks import find_task
from megatron3d.train.setup import build_parts
from megatron3d.train.vocabulary import open_vocabulary

POSITIONS, MAX_LENGTH = 24, 20
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_PIECES = """
a and bad but dull film fine for good great hours in is it its like long me my no not of one plot poor quite
she story that the this to two very was well why with worth would . , ! ? ##s ##ly ##ing
"""
WORDS = _PIECES.split()
_SHAPE = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --train-iters 1 --lr 1e-3 --micro-batch-size 1 "
    f"--make-vocab-size-divisible-by 4 --device cpu --mock-data --seq-length {POSITIONS} "
    "--tokenizer-type BertWordPieceLowerCase"
)


@dataclass(frozen=True)
class Kind:
    """A classifier: the task it is of, and options of its model."""

    task: str
    options: str


KINDS = {
    "single": Kind("sst-2", "--norm-position post --norm-epsilon 1e-12"),
    "pairs": Kind("mnli", "--norm-position pre"),
    "regression": Kind(
        "sts-b",
        "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear --ffn-hidden-size 64 "
        "--bert-no-binary-head --num-token-types 0",
    ),
}


def write_vocabulary(folder: Path) -> Path:
    """The vocabulary, where a fine-tuning copies it to; returns its file."""
    path = folder / "tokenizer" / "vocab.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join((*SPECIAL, *WORDS)) + "\n")
    return path


def write_checkpoint(rank: int, world_size: int, kind: Kind, layout: Layout, folder: Path) -> None:
    """Write a classifier's checkpoint at a layout into `folder`, which has its vocabulary; a body for a pool."""
    task, vocabulary = find_task(kind.task), folder / "tokenizer" / "vocab.txt"
    degrees = f"--tensor-model-parallel-size {layout.tp} --pipeline-model-parallel-size {layout.pp}"
    argv = [*f"{_SHAPE} {kind.options} {degrees} --zero-stage 1".split(), "--vocab-file", str(vocabulary)]
    words = parse_args(argv, program="test", description="test", architecture="bert")
    config, _ = open_vocabulary(checked(words, world_size))
    builder = partial(build_bert_classifier_stage, num_outputs=task.num_outputs)
    parts = build_parts(config, make_mesh(layout), torch.device("cpu"), builder)
    with parts.engine.states_opened(parts.optimizer, writes=True):
        for name, view in parts.engine.weight_views().items():
            whole = value_of(name, view.full_shape)
            for box, tensor in view.box_tensors():
                tensor.copy_(whole[box.slices()])
    parts.engine.publish()
    document = weights.task_document(task, max_length=MAX_LENGTH, metrics={})
    weights.save(parts, folder, 7, document)


def value_of(name: str, shape: tuple[int, ...]) -> Tensor:
    """The value of a parameter: scales of norms around 1, all others around 0; outputs of the model are around 1."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(sum(map(ord, name))))
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.1 * noise
    if name == "head.classifier.bias" and shape == (2,):
        return torch.tensor([-1.75, 1.75]) + 0.5 * noise  # with these the two labels come about equally often
    return (0.5 if name.startswith(("embedding", "head")) else 0.2) * noise
