"""From a command to a run whose files are there and whose vocabulary is known; no torch is needed for it."""

from __future__ import annotations

from pathlib import Path

from megatron3d.config.cli import Command, settle
from megatron3d.config.run import RunConfig
from megatron3d.config.sections.checkpoint import CheckpointConfig
from megatron3d.data.named_files import missing_files
from megatron3d.errors import CheckpointError, Megatron3dError
from megatron3d.train.vocabulary import Vocabulary, open_vocabulary


def settle_run(command: Command, world_size: int) -> tuple[RunConfig, Vocabulary]:
    """The resolved run on `world_size` ranks, and its vocabulary.

    Raises:
        ConfigError: with all problems, one a line, among them the files that are named and missing.
        DataError: files are missing and nothing else is wrong; or one of the tokenizer is damaged.
        CheckpointError: of all files the checkpoint alone is missing.
    """
    errors: list[Megatron3dError] = [*missing_files(command.run.data), *_missing_checkpoint(command.run.checkpoint)]
    config = settle(command, world_size, more=map(str, errors))
    if errors:
        raise type(errors[0])("\n".join(dict.fromkeys(map(str, errors))))
    return open_vocabulary(config)


def _missing_checkpoint(checkpoint: CheckpointConfig) -> list[CheckpointError]:
    """That --load names nothing, where the run could start from nothing else (see `source.py`)."""
    load, others = checkpoint.load, (checkpoint.save, checkpoint.pretrained_checkpoint)
    if load is None or Path(load).exists() or any(other is not None for other in others):
        return []
    return [CheckpointError(f"--load {load} is not a directory; give the directory that --save wrote")]
