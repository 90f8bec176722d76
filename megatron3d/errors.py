"""The errors a user can meet, each with the process exit code a job scheduler can act on.

Every message is a sentence that names the option or file, its value, the reason and what to do.
Programming mistakes are not here: they stay `assert` and the built-in exceptions.
"""

from __future__ import annotations

import sys
from pathlib import Path

_PROJECT = Path(__file__).resolve().parents[1]


class Megatron3dError(Exception):
    """Base of every error meant for the user; `exit_code` is what the process ends with."""

    exit_code = 1


class ConfigError(Megatron3dError):
    """An option, or a combination of options, that cannot work."""

    exit_code = 2


class ScheduleError(ConfigError):
    """A pipeline schedule that is incomplete, out of order or would deadlock."""


class DataError(Megatron3dError):
    """A data file that is missing, damaged or does not fit the run."""

    exit_code = 3


class CheckpointError(Megatron3dError):
    """A checkpoint that is missing, damaged or belongs to another model."""

    exit_code = 4


class MisfitError(CheckpointError):
    """A checkpoint that is whole but does not fit what the options ask for: an earlier one would not either."""


class NumericsError(Megatron3dError):
    """A loss or gradient that is not finite where the run cannot skip it, or weights that may not be saved: they are
    not finite, or replicas of them differ."""

    exit_code = 5


class PeerError(Megatron3dError):
    """Another rank failed, or a collective ran into its timeout."""

    exit_code = 6


class StorageError(Megatron3dError):
    """A write that the file system refused: full, read-only, or gone."""

    exit_code = 7


class TrackerError(StorageError):
    """A metrics file or a service for curves that cannot be written: ends a run at its start only.

    Attributes:
        may_pass: whether it may pass by itself, as a full disk does, so that the run need not wait for it.
        is_remote: whether it is a service that may be out of reach for a while.
    """

    def __init__(self, message: str, *, may_pass: bool = False, is_remote: bool = False) -> None:
        super().__init__(message)
        self.may_pass, self.is_remote = may_pass, is_remote


class InUseError(Megatron3dError):
    """A directory that another run holds."""

    exit_code = 8


class StopRequested(Megatron3dError):
    """The run was asked to stop, saved a checkpoint and can be started again."""

    exit_code = 75


class MemoryShortError(Megatron3dError):
    """The device or the host has less memory than the run needs."""

    exit_code = 9


def install_extra(extra: str) -> str:
    """The command that adds an optional part of this project to the environment that asks for it.

    No package index has this project, so the command names the checkout that runs and its pinned versions. Its paths
    are absolute, so it works from any directory.

    Args:
        extra: a key of `[project.optional-dependencies]` in pyproject.toml.
    """
    return f"{sys.executable} -m pip install -c {_PROJECT / 'constraints.txt'} -e '{_PROJECT}[{extra}]'"
