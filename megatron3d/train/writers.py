"""Curves for TensorBoard and Weights & Biases: named scalars at a step, nothing else.

The names are free; the loop uses loss, lr, grad_norm, tokens_per_second, valid_loss, loss_scale, batch_size and the
like. One rank writes.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from megatron3d.config.train import TrainConfig
from megatron3d.errors import ConfigError, StorageError


class ScalarWriter(Protocol):
    """Something that draws curves."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add one point to each named curve."""

    def close(self) -> None:
        """Hand over what is buffered and end."""


class TensorBoardWriter:
    """Event files for TensorBoard in a directory."""

    def __init__(self, directory: str | Path, *, resumed_step: int = 0) -> None:
        """Points after `resumed_step` that an earlier, killed run left in the directory are hidden by TensorBoard.

        Raises: StorageError if the directory cannot be made or written.
        """
        self._directory = Path(directory)
        try:
            self._writer = SummaryWriter(str(directory), purge_step=resumed_step + 1 if resumed_step else None)
        except OSError as error:
            raise self._storage_error(error) from error

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add one point to each named curve. Raises: StorageError if the file system refuses."""
        try:
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, global_step=step)
        except OSError as error:
            raise self._storage_error(error) from error

    def close(self) -> None:
        """Write what is buffered. Raises: StorageError if the file system refuses."""
        try:
            self._writer.close()
        except OSError as error:
            raise self._storage_error(error) from error

    def _storage_error(self, error: OSError) -> StorageError:
        """The sentence for a write that failed."""
        return StorageError(
            f"--tensorboard-dir {self._directory} cannot be written: {error.strerror or error}; free space there or "
            "name another directory."
        )


class WandbWriter:
    """A Weights & Biases run. WANDB_MODE=offline, which wandb itself reads, keeps it on this machine."""

    def __init__(
        self, project: str, *, entity: str = "", name: str = "", directory: str = "", run: Mapping[str, Any]
    ) -> None:
        """`run` is the configuration shown beside the curves; `entity` the user or team that the project is of.

        Raises: ConfigError if the wandb package is not installed; StorageError if its directory cannot be written.
        """
        try:
            # Imported here because only this option needs it and most installations lack it.
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise ConfigError(
                f"--wandb-project {project} needs the wandb package, which cannot be imported ({error}); run "
                "`pip install wandb`, or leave the option out."
            ) from error
        try:
            if directory:
                Path(directory).mkdir(parents=True, exist_ok=True)
            self._run = wandb.init(
                project=project, entity=entity or None, name=name or None, dir=directory or None, config=dict(run)
            )
        except OSError as error:
            raise StorageError(
                f"--wandb-save-dir {directory} cannot be written: {error.strerror or error}; name another directory."
            ) from error

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add one point to each named curve."""
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        """Wait until everything is written or sent."""
        self._run.finish()


def open_writers(train: TrainConfig, *, run: Mapping[str, Any], resumed_step: int) -> list[ScalarWriter]:
    """The writers the flags ask for, possibly none.

    Raises: ConfigError or StorageError as the writers do.
    """
    writers: list[ScalarWriter] = []
    if train.tensorboard_dir:
        writers.append(TensorBoardWriter(train.tensorboard_dir, resumed_step=resumed_step))
    if train.wandb_project:
        writers.append(
            WandbWriter(
                train.wandb_project,
                entity=train.wandb_entity,
                name=train.wandb_exp_name,
                directory=train.wandb_save_dir,
                run=run,
            )
        )
    return writers
