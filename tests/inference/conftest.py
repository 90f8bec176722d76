"""The checkpoints of the trained models, made once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from megatron3d.checkpoint.directory import find_checkpoint
from tests.inference.trained import train_and_save
from tests.made_once import made_once


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint directory of a model by name; each is trained when first asked for, for all processes."""

    def get(model: str) -> Path:
        return find_checkpoint(made_once(tmp_path_factory, f"trained-{model}", partial(train_and_save, model)))

    return get
