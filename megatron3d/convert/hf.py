"""Models from Hugging Face's directories into our checkpoints, bit for bit; `export.py` is the way back.

    read_model      a directory -> model, tokenizer options, and tensors under our names
    save_model      ... -> a checkpoint that every layout loads
    fill_views      ... -> what any rank of any layout holds

Nothing of transformers is needed: the formats are JSON and safetensors, and what the names mean is in `maps/`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron3d.checkpoint.directory import list_checkpoints, step_of
from megatron3d.checkpoint.save import save_checkpoint
from megatron3d.config.check import model_problems
from megatron3d.config.derive import derive
from megatron3d.config.run import GivenRun
from megatron3d.config.sections.data import DataConfig
from megatron3d.config.sections.model import ModelConfig
from megatron3d.config.sections.train import GivenTrain
from megatron3d.config.serialize import to_dict
from megatron3d.config.tokenizer_copy import TOKENIZER_FOLDER
from megatron3d.convert.directory import CONFIG_NAME, StoredWeight, open_weights, read_config
from megatron3d.convert.families import FAMILIES
from megatron3d.convert.family import Family, HfConfig, check_num_layers
from megatron3d.convert.quantized import refuse_quantized
from megatron3d.convert.rows import Component, TensorRule
from megatron3d.convert.tokenizer_files import copy_tokenizer, data_of, named_in
from megatron3d.errors import CheckpointError, ConfigError
from megatron3d.params.boxes import Box, ShardView

HF_DOCUMENT = "hf_config"  # the config.json that a checkpoint was imported from


@dataclass(frozen=True)
class HfModel:
    """A model as it was found in a directory.

    Attributes:
        directory: where it was found.
        model: its shape; a BERT that has a pooler counts as one with a sentence head.
        data: its tokenizer, as options.
        tensors: full tensors by our names (without `model/`), on the CPU and in the dtype of the files.
        components: what of a model is there.
        left_out: names in the files that have no place in ours, such as heads for other tasks.
        settings: the values of `config.json`.
    """

    directory: Path
    model: ModelConfig
    data: DataConfig
    tensors: Mapping[str, Tensor]
    components: frozenset[Component]
    left_out: tuple[str, ...]
    settings: Mapping[str, Any]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes of its classifier, by number; empty if it has none."""
        if "classes" not in self.components:
            return ()
        labels = HfConfig(self.directory / CONFIG_NAME, self.settings).labels()
        number = self.tensors["head.classifier.weight"].shape[0]
        return tuple(labels.get(str(i), f"LABEL_{i}") for i in range(number))


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """A digest of names, shapes and some elements of each tensor, by which ranks tell that theirs are equal."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        elements = tensor.reshape(-1)
        sample = elements[:: max(1, elements.numel() // 1024)].to(torch.float64)
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        found.update(sample.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def read_model(directory: Path, *, with_tokenizer: bool = True) -> HfModel:
    """Read a directory that `save_pretrained` wrote, or that lies on a model hub; with or without its tokenizer.

    Raises:
        CheckpointError: a file is missing or damaged, the kind of model is not known, or a tensor is missing, has
            another shape than `config.json` says, or has no place in our model; `config.json` has values that
            cannot be or do not fit together; the weights are quantized.
        DataError: the description of the tokenizer cannot be taken, see `data/hf_tokenizer.py`.
    """
    config = read_config(directory)
    family = _family_there(config)
    model = family.to_model(config)
    _check_model(config, model)
    with open_weights(directory) as weights:
        refuse_quantized(config, weights, family.derived)
        check_num_layers(model, len(weights), config.path)
        names = _Names(weights, family.prefix)
        rows = _rows_there(family, model, _num_classes_there(config), names, directory)
        left_out = _left_out(family, rows, names)
        if not model.untie_embeddings_and_output_weights:
            _check_tied(family, names)
        tensors = {row.ours: row.to_ours(names.read) for row in rows if row.ours is not None}
    components: frozenset[Component] = frozenset(row.component for row in rows)
    if "bert_binary_head" in model.traits.own_options:
        model = replace(model, bert_binary_head="pooler" in components)
    data = data_of(directory, model, with_tokenizer=with_tokenizer)
    return HfModel(directory, model, data, tensors, components, left_out, config.values)


@dataclass(frozen=True)
class _Names:
    """The tensors of a directory under the names of the model with heads, however they are spelled there.

    A bare model leaves the prefix out, and files from before 2019 call a norm's weight gamma and its bias beta.
    """

    weights: Mapping[str, StoredWeight]
    prefix: str

    def spelled(self, name: str) -> str | None:
        """How the files spell a name, or None if they do not have it."""
        old = re.sub(r"(LayerNorm)\.weight$", r"\1.gamma", re.sub(r"(LayerNorm)\.bias$", r"\1.beta", name))
        candidates = (name, name.removeprefix(self.prefix), old, old.removeprefix(self.prefix))
        return next((one for one in candidates if one in self.weights), None)

    def stored(self, name: str) -> StoredWeight | None:
        """The tensor of that name, or None."""
        spelled = self.spelled(name)
        return None if spelled is None else self.weights[spelled]

    def read(self, name: str) -> Tensor:
        """The tensor of a name that is there."""
        return self.weights[self.spelled(name) or name].read()


def _family_there(config: HfConfig) -> Family:
    kind = config.values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise CheckpointError(
            f"{config.path} says model_type {kind!r:.60}, which cannot be converted; only {', '.join(FAMILIES)} can"
        )
    return FAMILIES[kind]


def _check_model(config: HfConfig, model: ModelConfig) -> None:
    """Refuse a shape that no model has, by the rules of the options it becomes. Raises: CheckpointError."""
    if problems := model_problems(model):
        raise CheckpointError(f"{config.path} describes a model that cannot be: {' '.join(problems)}")


def _num_classes_there(config: HfConfig) -> int:
    labels = config.labels()
    return len(labels) if labels else config.integer("num_labels", 2)


def _rows_there(
    family: Family, model: ModelConfig, num_classes: int, names: _Names, directory: Path
) -> list[TensorRule]:
    """The rows of the components that are there, each whole."""
    rows = family.rows(model, num_classes)
    found = {row: all(names.stored(name) is not None for name in row.theirs) for row in rows}
    components = {"trunk", *(row.component for row, is_there in found.items() if is_there)}
    problems = []
    for row in (row for row in rows if row.component in components):
        for name, shape in row.shapes_there().items():
            stored = names.stored(name)
            if stored is None:
                problems.append(f"{directory} has no tensor {name}")
            elif stored.shape != shape:
                problems.append(f"{stored.file}: {name} has shape {stored.shape}, and config.json makes it {shape}")
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{'; '.join(problems[:3])}{more}; put the config.json and the weights of one model into the directory"
        )
    return [row for row in rows if row.component in components]


def _left_out(family: Family, rows: Iterable[TensorRule], names: _Names) -> tuple[str, ...]:
    """Tensors of the files that no row takes. Those of the trunk would change results, so they are refused."""
    taken = {names.spelled(name) for row in rows for name in row.theirs}
    rest = [name for name in names.weights if name not in taken and not _matches(name, family.derived)]
    # A name of the trunk has the prefix, or in a bare model begins like one of the trunk's names without it.
    roots = {n.removeprefix(family.prefix).split(".")[0] for r in rows if r.component == "trunk" for n in r.theirs}
    inside = [name for name in rest if name.startswith(family.prefix) or name.split(".")[0] in roots]
    if inside:
        raise CheckpointError(
            f"{names.weights[inside[0]].file} has the tensor {inside[0]}, which a {family.model_type} of this "
            "config.json does not have; it belongs to another model, or to an addition (adapter) that must be merged"
        )
    return tuple(rest)


def _check_tied(family: Family, names: _Names) -> None:
    """Refuse a second table that is another than the one it is tied to, as transformers then keeps both.

    Raises: CheckpointError.
    """
    for copy, of in family.tied.items():
        if copy in names.weights and not _same(names.read(of), names.weights[copy].read()):
            raise CheckpointError(
                f"{names.weights[copy].file} has other values in {copy} than in {of}, and config.json ties them; set "
                f"tie_word_embeddings to false to keep both, or take {copy} out"
            )


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other.to(one.dtype))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def fill_views(views: Mapping[str, ShardView], tensors: Mapping[str, Tensor]) -> list[str]:
    """Copy full tensors into what a rank holds of them; values take the dtype of the buffers.

    Args:
        views: by our names; of any layout, such as `ZeroEngine.weight_views(with_copies=True)`.
        tensors: full tensors by the same names.

    Returns:
        The names of `views` that `tensors` does not have; their buffers are untouched.

    Raises:
        ConfigError: a tensor has another shape.
    """
    missing = []
    for name, view in views.items():
        if name not in tensors:
            missing.append(name)
            continue
        if tuple(tensors[name].shape) != view.full_shape:
            raise ConfigError(
                f"{name} has shape {tuple(tensors[name].shape)} there and {view.full_shape} in this model; give the "
                "options of the model that was imported"
            )
        for box, tensor in view.box_tensors():
            tensor.copy_(tensors[name][box.slices()])
    return missing


def save_model(found: HfModel, save: Path) -> Path:
    """Write the checkpoint of a model that was read, with its tokenizer beside it; returns its directory.

    Raises:
        ConfigError: `save` holds checkpoints already.
        StorageError: the file system refused.
    """
    require_unused(save)
    folder = save / TOKENIZER_FOLDER
    has_tokenizer = found.data.tokenizer_type is not None
    copy_tokenizer(found.directory, folder, with_tokenizer=has_tokenizer)
    data = named_in(found.data, folder) if has_tokenizer else found.data
    return save_weights(save, found.model, data, found.tensors, {HF_DOCUMENT: dict(found.settings)})


def require_unused(save: Path) -> None:
    """Refuse a directory for a new model that has checkpoints of another. Raises: ConfigError."""
    if steps := [step_of(path) for path in list_checkpoints(save)]:
        raise ConfigError(
            f"--save {save} holds checkpoints already (of steps {', '.join(map(str, steps))}); give a new directory"
        )


def save_weights(
    save: Path, model: ModelConfig, data: DataConfig, tensors: Mapping[str, Tensor], documents: Mapping[str, Any]
) -> Path:
    """Write a checkpoint of weights alone, of step 0, which training takes with `--finetune`; returns its directory.

    Args:
        save: where it goes.
        model: its shape.
        data: its tokenizer.
        tensors: full tensors by our names, on the CPU.
        documents: what lies beside the run's description.

    Raises:
        StorageError: the file system refused.
    """
    run = derive(GivenRun(model=model, data=data, train=GivenTrain(micro_batch_size=1)), 1)
    views = {
        f"model/{name}": ShardView(
            tuple(tensor.shape), (Box((0,) * tensor.dim(), tuple(tensor.shape)),), tensor.flatten()
        )
        for name, tensor in tensors.items()
    }
    return save_checkpoint(
        save,
        0,
        views,
        documents={"run": to_dict(run), "state": {"weights_only": True}, **documents},
        keep_last=None,
        group=None,
        rank=0,
        world_size=1,
    )
