"""A trained classifier out of a checkpoint of any layout: one stage in one process, and what it says of itself.

Shapes: B samples, S sequence, C outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron3d.checkpoint.directory import find_checkpoint
from megatron3d.checkpoint.index import read_index
from megatron3d.checkpoint.load import read_document, tensor_shapes
from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.config.architectures import named
from megatron3d.config.run import RunConfig
from megatron3d.config.sections.data import DataConfig
from megatron3d.config.sections.parallel import GivenParallel
from megatron3d.config.tokenizer_copy import beside_checkpoint
from megatron3d.convert.family import HfConfig
from megatron3d.convert.hf import HF_DOCUMENT
from megatron3d.convert.task_document import read_task_document
from megatron3d.convert.tokenizer_choice import with_given
from megatron3d.data.content import require_same_tokenizer
from megatron3d.data.tokenizer import TokenizerSpec
from megatron3d.errors import CheckpointError, ConfigError
from megatron3d.inference.load import generation_config, load_model
from megatron3d.models.stage import MicroBatch, Stage
from megatron3d.models.zoo import architecture_of
from megatron3d.serve.description import ClassifierDescription
from megatron3d.serve.packed_tokenizer import PackedTokenizer, pack
from megatron3d.train.compare import SavedRun, read_saved_run

_CLASSIFIER = "model/head.classifier.weight"
# A file of ONNX is one protobuf message, which cannot be longer; the graph itself needs a few of these bytes.
MAX_WEIGHT_BYTES = (1 << 31) - (1 << 24)


@dataclass(frozen=True)
class ServeOverrides:
    """What the command line says about a checkpoint, where it says more than the checkpoint does: the names of the
    classes, the length, and the tokenizer's files, where they have moved; files of other content than those of the
    training are used only by `override_tokenizer`."""

    label_names: tuple[str, ...] = ()
    max_length: int | None = None
    vocab_file: str | None = None
    tokenizer_model: str | None = None
    override_tokenizer: bool = False


@dataclass(frozen=True)
class Trained:
    """A checkpoint of a classifier, read but for its weights; `classes` are the labels as its training data has them,
    which `description` may show under other names."""

    directory: Path
    config: RunConfig
    description: ClassifierDescription
    classes: tuple[str, ...]
    tokenizer: PackedTokenizer


class ExportedClassifier(nn.Module):
    """A classifier as a function of three tensors, as it is exported."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, input_ids_BS: Tensor, token_type_ids_BS: Tensor, attention_mask_BS: Tensor) -> Tensor:
        """Token ids, types and the mask of real tokens, all int64 [B, S], to the outputs, fp32 [B, C]."""
        micro = MicroBatch(
            tokens_BS=input_ids_BS,
            token_types_BS=token_type_ids_BS if self.stage.config.num_token_types else None,
            attention_mask_BST=attention_mask_BS.bool().unsqueeze(1),
        )
        return self.stage(None, micro)


def open_trained(root: Path, step: int | None, overrides: ServeOverrides) -> Trained:
    """Find a classifier and settle what it says of itself.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or it holds no classifier.
        ConfigError: it is too large for one ONNX file, or the overrides do not fit it.
        DataError: a file of its tokenizer is missing or damaged.
    """
    directory = find_checkpoint(root, step)
    saved = read_saved_run(directory)
    stored = saved.config
    shapes = {name: shape for name, shape in tensor_shapes(directory).items() if name.startswith("model/")}
    if architecture_of(stored.model).build_classifier is None or _CLASSIFIER not in shapes:
        raise CheckpointError(
            f"--load {directory} holds {named(stored.model.architecture)} without a classifier; fine-tune one with "
            "tools/finetune_glue.py, or import one with tools/convert_checkpoint.py"
        )
    size = 4 * sum(torch.Size(shape).numel() for shape in shapes.values())
    if size > MAX_WEIGHT_BYTES:
        raise ConfigError(
            f"--load {directory} has {size} bytes of fp32 weights, and one ONNX file holds {MAX_WEIGHT_BYTES}; "
            "export a smaller model"
        )
    config = generation_config(stored, GivenParallel(device="cpu"), world_size=1, bf16=False)
    found = _described(directory, config.model.max_position_embeddings, shapes[_CLASSIFIER][0])
    description = _with_overrides(found, overrides, config.model.max_position_embeddings)
    tokenizer = _tokenizer(saved, config.data, config.model.vocab_size, overrides)
    return Trained(directory, config, description, found.labels, tokenizer)


def load_classifier(trained: Trained) -> ExportedClassifier:
    """The weights, merged from whatever layout wrote them; no gradients. Needs no process group.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    build = architecture_of(trained.config.model).build_classifier
    assert build is not None, "open_trained takes no other architecture"
    builder = partial(build, num_outputs=trained.description.num_outputs)
    model = load_model(trained.config, make_mesh(Layout()), torch.device("cpu"), trained.directory, builder=builder)
    return ExportedClassifier(model.stages[0]).eval()


def _described(directory: Path, num_positions: int, num_outputs: int) -> ClassifierDescription:
    """What `task.json` of a fine-tuning says; of an imported classifier, its `config.json`."""
    index = read_index(directory)
    task = read_task_document(directory, index)
    if task is not None:
        return _of_task(task)
    imported = read_document(directory, HF_DOCUMENT) if f"{HF_DOCUMENT}.json" in index.documents else {}
    named = HfConfig(directory / f"{HF_DOCUMENT}.json", imported).labels()
    labels = tuple(named.get(str(number), str(number)) for number in range(num_outputs))
    return ClassifierDescription(
        task="imported",
        labels=labels if num_outputs > 1 else (),
        is_regression=num_outputs == 1,
        value_range=None,
        num_texts=None,
        max_length=num_positions,
    )


def _of_task(document: dict[str, Any]) -> ClassifierDescription:
    bounds = document["value_range"]
    return ClassifierDescription(
        task=document["task"],
        labels=tuple(document["labels"]),
        is_regression=document["is_regression"],
        value_range=None if bounds is None else (bounds[0], bounds[1]),
        num_texts=document["num_texts"],
        max_length=document["max_seq_length"],
    )


def _with_overrides(
    description: ClassifierDescription, overrides: ServeOverrides, num_positions: int
) -> ClassifierDescription:
    names, length = overrides.label_names, overrides.max_length
    if names and (len(names) != len(description.labels) or len(set(names)) != len(names)):
        raise ConfigError(
            f"--label-names {' '.join(names)}: the model has {len(description.labels)} classes "
            f"({', '.join(description.labels) or 'it is a regression'}); give each of them one name, in this order"
        )
    if not names and len(set(description.labels)) != len(description.labels):
        raise ConfigError(
            f"the classes of the model are named {', '.join(description.labels)}, of which some are the same; name "
            "them with --label-names"
        )
    if length is not None and not 3 <= length <= num_positions:
        raise ConfigError(f"--max-length {length} must be from 3 to the model's {num_positions} positions")
    return replace(
        description, labels=names or description.labels, max_length=length or min(description.max_length, num_positions)
    )


def _tokenizer(saved: SavedRun, data: DataConfig, vocab_size: int, overrides: ServeOverrides) -> PackedTokenizer:
    directory = saved.directory
    given = {"vocab_file": overrides.vocab_file, "tokenizer_model": overrides.tokenizer_model}
    data = with_given(beside_checkpoint(data, directory), given)
    if data.tokenizer_type is None:
        raise CheckpointError(
            f"{directory / 'run.json'} names no tokenizer, and a service reads texts; fine-tune again"
        )
    packed = pack(TokenizerSpec(data.tokenizer_type, data.vocab_file, data.merge_file, data.tokenizer_model))
    tokenizer = packed.build()
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"--tokenizer-type {data.tokenizer_type} has {tokenizer.vocab_size} ids, but the model of {directory} has "
            f"{vocab_size}; give the files it was trained with (--vocab-file, --tokenizer-model)"
        )
    if not overrides.override_tokenizer:
        require_same_tokenizer(saved.content, data, vocab_size, source=directory)
    if None in (tokenizer.cls, tokenizer.sep, tokenizer.pad):
        raise ConfigError(
            f"--tokenizer-type {data.tokenizer_type} lacks [CLS], [SEP] or [PAD], which BERT's inputs are made of"
        )
    return packed
