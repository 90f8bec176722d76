"""Where a fine-tuning starts: the weights of a checkpoint or of a Hugging Face directory, and a new head.

What a checkpoint has, it gives, whatever layout wrote it; the classifier is new unless the checkpoint is one of the
same task, and so is the pooler of a model that was pretrained without one. New weights depend on the seed and on their
names alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from megatron3d.checkpoint.directory import find_checkpoint, was_saved_to
from megatron3d.checkpoint.index import read_index
from megatron3d.checkpoint.load import load_tensors, tensor_shapes
from megatron3d.checkpoint.ranks import on_every_rank
from megatron3d.checkpoint.save import save_checkpoint
from megatron3d.comm.mesh import Mesh
from megatron3d.config.architectures import named
from megatron3d.config.sections.data import DataConfig
from megatron3d.config.sections.model import ModelConfig
from megatron3d.config.serialize import to_dict
from megatron3d.config.tokenizer_copy import TOKENIZER_FOLDER
from megatron3d.convert.hf import fill_views, read_model
from megatron3d.convert.task_document import read_task_document
from megatron3d.convert.tokenizer_files import files_of, named_in, write_files
from megatron3d.data.content import Content, tokenizer_content
from megatron3d.data.hf_description import companion_files, tokenizer_files
from megatron3d.errors import DataError, MisfitError
from megatron3d.models.zoo import architecture_of
from megatron3d.tasks.glue.tasks import Task
from megatron3d.train.compare import CONTENT_DOCUMENT, read_saved_run
from megatron3d.train.setup import TrainingSetup
from megatron3d.zero.replicas import require_equal_replicas

_CLASSIFIER, _POOLER = "head.classifier.", "head.pooler."


@dataclass(frozen=True)
class InitialWeights:
    """The weights to start from, known by their shapes before a device is touched.

    Attributes:
        path: the checkpoint, or the Hugging Face directory.
        model: the shape of the model.
        names: the parameters that are there, by full name.
        data: the options of the data it was trained on, which name its tokenizer.
        task: what the checkpoint of a classifier says of its task (`task_document`), else None.
        keeps_classifier: whether the user says that its classifier is one of the task.
        num_outputs: outputs of its classifier; None if it has none.
        tensors: all weights by name, of a Hugging Face directory; None of a checkpoint, which is read when needed.
        content: what the checkpoint says of the tokenizer's content; None if it says nothing.
    """

    path: Path
    model: ModelConfig
    names: frozenset[str]
    data: DataConfig
    task: Mapping[str, Any] | None = None
    keeps_classifier: bool = False
    num_outputs: int | None = None
    tensors: Mapping[str, Tensor] | None = None
    content: Content | None = None

    def is_of(self, task: Task) -> bool:
        """Whether its classifier is one of this task."""
        if self.keeps_classifier:
            return True
        return self.task is not None and all(self.task.get(key) == value for key, value in task_identity(task).items())


def open_hf(directory: str, *, needs_tokenizer: bool = True) -> InitialWeights:
    """A Hugging Face directory as an origin.

    Args:
        directory: its path.
        needs_tokenizer: False where the options name a tokenizer of their own, so that one there may be unreadable.

    Raises:
        CheckpointError: it is damaged, or holds no BERT.
        DataError: the description of its tokenizer cannot be taken, and it is needed.
    """
    try:
        found = read_model(Path(directory))
    except DataError:
        if needs_tokenizer:
            raise
        found = read_model(Path(directory), with_tokenizer=False)
    _require_bert(f"--hf {directory}", found.model)
    classifier = found.tensors.get(f"{_CLASSIFIER}weight")
    return InitialWeights(
        found.directory,
        found.model,
        frozenset(found.tensors),
        found.data,
        num_outputs=None if classifier is None else classifier.shape[0],
        tensors=found.tensors,
    )


def open_checkpoint(load: str, step: int | None) -> InitialWeights:
    """A megatron3d checkpoint as an origin.

    Raises:
        CheckpointError: there is none, or it holds no BERT.
    """
    directory = find_checkpoint(Path(load), step)
    saved = read_saved_run(directory)
    stored = saved.config
    _require_bert(f"--load {directory}", stored.model)
    shapes = {name.removeprefix("model/"): shape for name, shape in tensor_shapes(directory).items()}
    task = read_task_document(directory, read_index(directory))
    num_outputs = shapes.get(f"{_CLASSIFIER}weight", (None,))[0]
    return InitialWeights(
        directory,
        stored.model,
        frozenset(shapes),
        stored.data,
        task,
        num_outputs=num_outputs,
        content=saved.content,
    )


def _require_bert(source: str, model: ModelConfig) -> None:
    if architecture_of(model).build_classifier is None:
        raise MisfitError(
            f"{source} holds {named(model.architecture)}, and the tasks are learned by a BERT; give a checkpoint of "
            "pretrain_bert.py with --load, or a Hugging Face directory of a BERT with --hf"
        )


def new_prefixes(origin: InitialWeights, task: Task) -> tuple[str, ...]:
    """What the names of the parameters that start anew begin with."""
    classifier = () if origin.is_of(task) else (_CLASSIFIER,)
    return classifier if f"{_POOLER}weight" in origin.names else (*classifier, _POOLER)


def fill(parts: TrainingSetup, origin: InitialWeights, task: Task) -> None:
    """Put the origin's weights into the model; collective over all ranks.

    Raises:
        CheckpointError: the origin is damaged, lacks weights of the encoder, or its shapes are not those of its model.
    """
    fresh = new_prefixes(origin, task)
    with parts.engine.states_opened(parts.optimizer, writes=True):
        views = parts.model_views()
        old = {name: view for name, view in views.items() if not (fresh and name.startswith(fresh))}
        if origin.tensors is None:
            load_tensors(
                origin.path,
                {f"model/{n}": v for n, v in old.items()},
                group=parts.mesh.world.group,
                may_be_left=lambda name: not name.startswith("model/") or name.startswith("model/head."),
            )
        elif missing := fill_views(old, origin.tensors):
            raise MisfitError(f"--hf {origin.path} has no weights for {missing[0]}; give a directory that has them")
    parts.engine.publish()


def remember(parts: TrainingSetup) -> dict[str, Tensor]:
    """A copy of this rank's master weights and of the state of its modules."""
    with parts.engine.states_opened(parts.optimizer, writes=False):
        return {name: view.data.clone() for name, view in parts.model_views().items()}


def restore(parts: TrainingSetup, weights: Mapping[str, Tensor]) -> None:
    """Put remembered weights into the model, by name, and leave those that have none; collective over all ranks."""
    with parts.engine.states_opened(parts.optimizer, writes=True):
        views = parts.model_views()
        for name, values in weights.items():
            views[name].data.copy_(values)
    parts.engine.publish()


def task_identity(task: Task) -> dict[str, Any]:
    """What makes two classifiers ones of the same task."""
    return {"task": task.name, "labels": list(task.labels), "num_outputs": task.num_outputs}


def task_document(
    task: Task,
    *,
    max_length: int,
    metrics: Mapping[str, float],
    dev_digests: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """`task.json` of a classifier's checkpoint: all that is needed to use it, beside the run.

    `labels` are the classes in the order of the outputs (none in a regression), `num_texts` is 2 for pairs, and
    `max_seq_length` the tokens that a sample was cut to, special ones included. `dev_digests` tell which rows the
    metrics were measured on.
    """
    return task_identity(task) | {
        "is_regression": task.is_regression,
        "value_range": None if task.value_range is None else list(task.value_range),
        "num_texts": len(task.texts),
        "max_seq_length": max_length,
        "metrics": dict(metrics),
        "dev_digests": dict(dev_digests),
    }


def save(parts: TrainingSetup, root: Path, step: int, document: Mapping[str, Any]) -> Path:
    """Write the classifier without its optimizer, and keep it alone in `root`; collective over all ranks.

    Raises:
        NumericsError: the weights are not finite, or ranks that must hold the same ones do not.
        StorageError: the file system refused; the checkpoint before is untouched.
    """
    mesh, config = parts.mesh, parts.config
    content = Content({}, tokenizer_content(config.data, vocab_size=config.model.vocab_size))
    with parts.engine.states_opened(parts.optimizer, writes=False):
        held = {f"model/{name}": view for name, view in parts.engine.weight_views().items()}
        require_equal_replicas(parts.engine.units, held, mesh, step=step, others=parts.states.replicated())
        views = parts.model_views(with_copies=False)
        return save_checkpoint(
            root,
            step,
            {f"model/{name}": view for name, view in views.items()},
            documents={"run": to_dict(config), "task": dict(document), CONTENT_DOCUMENT: content.to_json()},
            keep_last=1,
            group=mesh.world.group,
            rank=mesh.rank,
            world_size=mesh.world.size,
        )


def keep_tokenizer(data: DataConfig, model: ModelConfig, save: Path, mesh: Mesh) -> DataConfig:
    """Copy the tokenizer's files beside the checkpoints, and name these instead; collective over all ranks.

    Raises:
        StorageError: the file system refused.
        MisfitError: checkpoints are there whose tokenizer is another one.
    """
    files = files_of(data, model)
    folder = save / TOKENIZER_FOLDER

    def copy() -> None:
        if mesh.rank == 0:
            _require_no_other_tokenizer(save, files)
            write_files(folder, files)

    on_every_rank(copy, mesh.world.group)
    return named_in(data, folder)


def _require_no_other_tokenizer(save: Path, files: Mapping[str, bytes]) -> None:
    folder = save / TOKENIZER_FOLDER
    there = companion_files(folder) | tokenizer_files(folder)
    other = [name for name, content in there.items() if content != files.get(name)]
    if other and was_saved_to(save):
        raise MisfitError(
            f"--save {save} holds checkpoints with another tokenizer ({folder / other[0]}) than this fine-tuning's; "
            "give another --save"
        )
