"""Which checkpoints stay: `--keep-last` and `--save-retain-interval`, applied once the newest has proved itself.

A checkpoint is finite when it is written, and may still be one from which no training goes on. So the earlier ones stay
until the step after it was finite, too. At the end of a run an evaluation stands for that step. A run that is stopped
leaves one checkpoint more than asked for, which goes when the next run has made its first step.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron3d.checkpoint import publish
from megatron3d.checkpoint.directory import list_checkpoints, step_of
from megatron3d.checkpoint.ranks import on_every_rank
from megatron3d.comm.mesh import Mesh
from megatron3d.config.sections.checkpoint import CheckpointConfig


class Retention:
    """The checkpoints of one run; all ranks make the same calls, and rank 0 removes."""

    def __init__(
        self, options: CheckpointConfig, mesh: Mesh, *, newest: Path | None, note: Callable[[str], None]
    ) -> None:
        """`newest` is the checkpoint that the run resumes from where it lies in its own --save; `note` takes lines
        about what cannot be removed."""
        self._mesh, self._unproved, self._note = mesh, newest, note
        self._noted: set[Path] = set()
        self._retain_interval = options.save_retain_interval
        self._keep_last = options.keep_last
        if self._keep_last is None and self._retain_interval is not None:
            self._keep_last = 1  # Megatron-LM's rule: each save replaces the one before, but for the multiples

    def saved(self, path: Path) -> None:
        """A checkpoint was published; what it replaces stays for now."""
        self._unproved = path

    @property
    def waits(self) -> bool:
        """Whether earlier checkpoints stay only until the newest has proved itself."""
        return self._unproved is not None and self._keep_last is not None

    def proved(self, step: int) -> None:
        """The weights after `step` gave a finite loss and gradient: prune behind a checkpoint of them or of earlier
        ones. Collective over all ranks where there is one."""
        newest = self._unproved
        if newest is None or self._keep_last is None or step_of(newest) > step:
            return
        self._unproved, keep_last = None, self._keep_last

        def prune() -> None:
            if self._mesh.rank == 0:
                problems = publish.prune(newest, keep_last, retain_interval=self._retain_interval)
                for path in problems.keys() - self._noted:
                    self._note(problems[path])
                self._noted.update(problems)

        on_every_rank(prune, self._mesh.world.group)

    def hint(self) -> str:
        """What to do where no finite step has followed the newest checkpoint; empty if one has."""
        if self._unproved is None:
            return ""
        newest = self._unproved
        before = [path for path in list_checkpoints(newest.parent) if step_of(path) < step_of(newest)]
        other = f"--ckpt-step {step_of(before[-1])} starts from the one before" if before else "there is none before it"
        return f"no finite step has followed the checkpoint {newest}, so its weights may be of no use: {other}"
