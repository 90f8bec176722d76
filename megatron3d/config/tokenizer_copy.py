"""Where the files of a run's tokenizer are now: some runs keep a copy beside their checkpoints, and both may move."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron3d.config.sections.data import DataConfig

TOKENIZER_FOLDER = "tokenizer"  # in the --save directory, where the copied files of the tokenizer are
TOKENIZER_FILES = ("vocab_file", "merge_file", "tokenizer_model")  # the options that name files of a tokenizer


def beside_checkpoint(data: DataConfig, checkpoint: Path) -> DataConfig:
    """The options with the tokenizer's files that were copied beside the checkpoints.

    All of them may have moved together, to another place or another machine: a copy beside the checkpoints counts
    before the path that the run names, other files count only where the named ones are gone.
    """
    folder = checkpoint.parent / TOKENIZER_FOLDER

    def found(value: str | None) -> str | None:
        if value is None:
            return None
        path = Path(value)
        beside = folder if path.name == TOKENIZER_FOLDER else folder / path.name
        was_copied = TOKENIZER_FOLDER in (path.name, path.parent.name)
        return str(beside) if beside.exists() and (was_copied or not path.exists()) else value

    return replace(data, **{name: found(vars(data)[name]) for name in TOKENIZER_FILES})
