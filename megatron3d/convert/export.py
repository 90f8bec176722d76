"""Checkpoints of any layout as directories that transformers loads, bit for bit.

The padding of the vocabulary exists in memory alone (see docs/decisions/0003) and so never leaves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megatron3d.checkpoint.index import Index, read_index
from megatron3d.checkpoint.load import assemble, read_document
from megatron3d.config.check import model_problems
from megatron3d.config.run import RunConfig
from megatron3d.config.sections.data import DataConfig
from megatron3d.config.sections.model import ModelConfig
from megatron3d.config.serialize import from_dict
from megatron3d.config.tokenizer_copy import TOKENIZER_FOLDER
from megatron3d.convert.directory import check_writable, write_directory
from megatron3d.convert.families import family_of
from megatron3d.convert.family import Family, HfConfig, check_num_layers
from megatron3d.convert.hf import HF_DOCUMENT
from megatron3d.convert.rows import TensorRule
from megatron3d.convert.task_document import read_task_document
from megatron3d.convert.tokenizer_choice import tokenizer_of
from megatron3d.convert.tokenizer_export import ExportedTokenizer, exported_tokenizer
from megatron3d.data.hf_description import GENERATION_CONFIG, MODEL_CONFIG, companion_files
from megatron3d.errors import CheckpointError, ConfigError
from megatron3d.files.json_text import parse_object

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
)
_REWRITTEN = ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path")


@dataclass(frozen=True)
class ExportOptions:
    """What an export may be given: a dtype instead of the stored one, names of the classes, where the tokenizer lies
    (None takes that of the run, and `with_tokenizer` says whether to take any), and an architecture of the user's own
    that the checkpoint may have."""

    dtype: torch.dtype | None = None
    labels: Sequence[str] = ()
    data: DataConfig | None = None
    with_tokenizer: bool = True
    architecture: str | None = None


@dataclass(frozen=True)
class Exported:
    """What was written: transformers' class, elements of all its tensors, the files of the tokenizer, and sentences
    about these for the user."""

    class_name: str
    num_parameters: int
    tokenizer_files: tuple[str, ...]
    notes: tuple[str, ...]


def export_model(checkpoint: Path, directory: Path, options: ExportOptions | None = None) -> Exported:
    """Write a checkpoint of any layout as a directory that transformers loads.

    The weights pass through memory whole.

    Raises:
        CheckpointError: the checkpoint is damaged, or its tensors do not fit its `run.json`.
        ConfigError: the model has no counterpart there, or `directory` exists.
        DataError: a file of the tokenizer is damaged, or no file there can hold what it says.
        StorageError: the file system refused.
    """
    options = options or ExportOptions()
    check_writable(directory)
    run = from_dict(read_document(checkpoint, "run"), architecture=options.architecture)
    if problems := model_problems(run.model):
        raise CheckpointError(f"{checkpoint / 'run.json'} describes a model that cannot be: {' '.join(problems)}")
    index = read_index(checkpoint)
    family = family_of(run.model, _document(checkpoint, HF_DOCUMENT, index).get("model_type"))
    rows = _rows_here(family, run.model, index, checkpoint)
    class_name = family.class_name(frozenset(row.component for row in rows))
    tensors = _tensors_there(checkpoint, rows, options.dtype, less_one=run.model.apply_layernorm_1p)
    tensors |= {copy: tensors[of] for copy, of in family.copies(run.model).items() if of in tensors}
    if class_name.endswith("Model") and not class_name.endswith("LMHeadModel"):
        tensors = {name.removeprefix(family.prefix): tensor for name, tensor in tensors.items()}
    data = options.data or run.data
    config = _config(checkpoint, replace(run, data=data), class_name, index, options.labels)
    config["torch_dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    files = companion_files(checkpoint.parent / TOKENIZER_FOLDER)
    tokenizer = exported_tokenizer(data, run.model) if options.with_tokenizer else ExportedTokenizer({})
    files |= tokenizer.files
    files.pop(MODEL_CONFIG, None)
    if GENERATION_CONFIG in files and not _is_as_imported(_document(checkpoint, HF_DOCUMENT, index)):
        files[GENERATION_CONFIG] = _with_ends(files[GENERATION_CONFIG], config)
    write_directory(directory, config, tensors, files)
    names = tuple(sorted(name for name in files if name != GENERATION_CONFIG))
    return Exported(class_name, sum(tensor.numel() for tensor in tensors.values()), names, tokenizer.notes)


def _config(checkpoint: Path, run: RunConfig, class_name: str, index: Index, labels: Sequence[str]) -> dict[str, Any]:
    """The `config.json`: what follows from the model, over what the model was imported with."""
    kept = _document(checkpoint, HF_DOCUMENT, index)
    family = family_of(run.model, kept.get("model_type"))
    return {
        **{name: value for name, value in kept.items() if name not in _REWRITTEN},
        **_special_ids(run.model, run.data, kept),
        **family.to_hf(run.model),
        **_classes(
            index,
            labels,
            HfConfig(checkpoint / f"{HF_DOCUMENT}.json", kept).labels(),
            read_task_document(checkpoint, index) or {},
        ),
        "architectures": [class_name],
        "model_type": family.model_type,
    }


def _document(checkpoint: Path, name: str, index: Index) -> dict[str, Any]:
    return read_document(checkpoint, name) if f"{name}.json" in index.documents else {}


def _num_classes_here(index: Index) -> int | None:
    stored = index.tensors.get("model/head.classifier.weight")
    return None if stored is None else stored.shape[0]


def _rows_here(family: Family, model: ModelConfig, index: Index, checkpoint: Path) -> list[TensorRule]:
    """The rows of the components that a checkpoint has, each whole; none of its weights may be left over."""
    stored = {n.removeprefix("model/"): t.shape for n, t in index.tensors.items() if n.startswith("model/")}
    stored = {n: shape for n, shape in stored.items() if not any(re.fullmatch(p, n) for p in family.for_training)}
    check_num_layers(model, len(stored), checkpoint / "run.json")
    rows = family.rows(model, _num_classes_here(index) or 2)
    components = {"trunk", *(row.component for row in rows if row.ours in stored)}
    rows = [row for row in rows if row.component in components]
    problems = [
        f"it has no tensor {row.ours}" if row.ours not in stored else f"{row.ours} has shape {stored[row.ours]}"
        for row in rows
        if row.ours is not None and stored.get(row.ours) != row.shape
    ]
    problems += [f"{name} has no place there" for name in sorted(stored.keys() - {row.ours for row in rows})]
    if problems:
        raise CheckpointError(
            f"checkpoint {checkpoint} cannot be written as {family.model_type} with the model of its run.json: "
            f"{'; '.join(problems[:3])}; export a checkpoint of a run that trained this model whole"
        )
    return rows


def _tensors_there(
    checkpoint: Path, rows: Iterable[TensorRule], dtype: torch.dtype | None, *, less_one: bool
) -> dict[str, Tensor]:
    """The tensors of the rows; `less_one` means that weights of norms are stored so, as they are nowhere else."""
    tensors: dict[str, Tensor] = {}
    zeros: list[TensorRule] = []
    for row in rows:
        if row.ours is None:
            zeros.append(row)
            continue
        tensor = assemble(checkpoint, f"model/{row.ours}")
        if less_one and row.ours.endswith("norm.weight"):
            tensor = tensor + 1
        tensors |= row.to_theirs(tensor if dtype is None else tensor.to(dtype))
    kind = next(iter(tensors.values())).dtype
    for row in zeros:
        tensors |= row.to_theirs(torch.zeros(row.shape, dtype=kind))
    return tensors


def _special_ids(model: ModelConfig, data: DataConfig, kept: Mapping[str, Any]) -> dict[str, Any]:
    """The end and the beginning of texts, stated outright: transformers' defaults are ids of other vocabularies.

    A text begins with the token that the tokenizer has for it, if it has one that is none of its ends.
    """
    if not model.is_causal or _is_as_imported(kept):
        return {}
    tokenizer = tokenizer_of(data, model.vocab_size)
    named = () if tokenizer is None else tokenizer.ends
    first = data.eod_token if data.eod_token is not None or tokenizer is None else tokenizer.eod
    ends = list(dict.fromkeys(id for id in (first, *named) if id is not None and id < model.vocab_size))
    bos = None if tokenizer is None or tokenizer.bos in ends else tokenizer.bos
    return {
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "bos_token_id": bos,
        "pad_token_id": None if tokenizer is None else tokenizer.pad,
    }


def _is_as_imported(kept: Mapping[str, Any]) -> bool:
    """Whether the ends of texts are those that the model was imported with, in all files alike."""
    return "eos_token_id" in kept


def _with_ends(content: bytes, config: Mapping[str, Any]) -> bytes:
    """A generation config that names ends: where it has none, transformers would not look into `config.json`."""
    try:
        values = parse_object(content)
    except ValueError as error:
        raise CheckpointError(
            f"{GENERATION_CONFIG} beside the checkpoint's tokenizer cannot be read as JSON ({error}); repair it"
        ) from error
    if values.get("eos_token_id") is None:
        values["eos_token_id"] = config.get("eos_token_id")
    return (json.dumps(values, indent=2) + "\n").encode()


def _classes(index: Index, labels: Sequence[str], before: Mapping[str, str], task: Mapping[str, Any]) -> dict[str, Any]:
    """Names of the classes: those given, those of the task that was learned, those of the import, or numbers."""
    number = _num_classes_here(index)
    if number is None:
        if labels:
            raise ConfigError(f"--labels {' '.join(labels)}: the checkpoint has no classifier; leave them out")
        return {}
    if labels and len(labels) != number:
        raise ConfigError(
            f"--labels {' '.join(labels)} names {len(labels)} classes and the checkpoint has {number}; name each once"
        )
    names = list(labels or task.get("labels") or [before.get(str(i), f"LABEL_{i}") for i in range(number)])
    kind = {"problem_type": "regression"} if task.get("is_regression") else {}
    return kind | {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
