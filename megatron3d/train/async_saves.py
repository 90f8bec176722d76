"""--async-save within a run: saves that are under way while training goes on, and what is reported of them.

All ranks make the same calls. A save under way is published after the first step by whose end every rank has written
its part, or when the next save is due or the run ends, which then wait for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from megatron3d.checkpoint.async_save import AsyncSave
from megatron3d.comm.collectives import count_votes
from megatron3d.comm.mesh import Mesh
from megatron3d.errors import MemoryShortError, StorageError
from megatron3d.train.progress import format_bytes

_PATIENCE_S = 10.0  # until a wait that is not over has a line


class Published(Protocol):
    """Takes a checkpoint that has become the latest, the seconds that training waited for it in all, and those since
    its step."""

    def __call__(self, path: Path, *, waited_s: float, took_s: float) -> None: ...


def save_copy_note(num_bytes: int, device_type: str) -> list[str]:
    """A line about the copy that asynchronous saves hold on the host, if they do."""
    if not num_bytes:
        return []
    beside = "; it is memory of this machine beside the peak" if device_type == "cpu" else ""
    return [f"--async-save holds a copy of what a rank saves on the host: about {format_bytes(num_bytes)}{beside}"]


class AsyncSaves:
    """The saves of one run that training does not wait for."""

    def __init__(self, mesh: Mesh, *, published: Published, note: Callable[[str], None]) -> None:
        """`note` takes lines for the log."""
        self._mesh, self._published, self._note = mesh, published, note
        self._save = AsyncSave(group=mesh.world.group, rank=mesh.rank, world_size=mesh.world.size)
        self._began_s, self._waited_s = 0.0, 0.0  # of the save under way

    def begin(self, save: Callable[[AsyncSave], Path]) -> bool:
        """Begin a save, for which no other may be under way; False if that failed, which a line reports. Collective.

        Raises: what `save` does, but for the errors of a system that has no more memory or space.
        """
        self._began_s = time.monotonic()
        try:
            path = save(self._save)
        except (StorageError, MemoryShortError) as error:
            self._report_failure(str(error))
            return False
        self._waited_s = time.monotonic() - self._began_s
        size = format_bytes(self._save.buffer_bytes)
        self._note(f"saving {path}: training waited {self._waited_s:.2f} s for the copy ({size} on rank 0) and goes on")
        return True

    def publish_written(self) -> bool:
        """Publish the save under way if all ranks have written it; False if that failed. Collective.

        Raises: NumericsError on all ranks if what was copied is not finite.
        """
        if self._save.under_way is None or count_votes(not self._save.is_written(), self._mesh.host):
            return True
        return self._finish()

    def wait(self, why: str) -> bool:
        """The same, after waiting for the save under way if there is one; `why` is for the line."""
        path = self._save.under_way
        if path is None:
            return True
        before_s = self._waited_s
        self._await_written(path, why)
        is_well = self._finish()
        self._note(f"waited {self._waited_s - before_s:.2f} s for {path.name}, because {why}")
        return is_well

    def _await_written(self, path: Path, why: str) -> None:
        """Wait for a while until all ranks have written, and say so if they have not."""
        began_s = time.monotonic()
        missing = count_votes(not self._save.is_written_within(_PATIENCE_S), self._mesh.host)
        now_s = time.monotonic()
        self._waited_s += now_s - began_s
        if missing:
            self._note(
                f"warning: training waits for {path}, because {why}: {missing} of {self._mesh.world.size} ranks have "
                f"not written their part {now_s - self._began_s:.0f} s after its step; look at the disk of --save"
            )

    def _finish(self) -> bool:
        began_s = time.monotonic()
        try:
            path = self._save.finish()
        except StorageError as error:
            self._report_failure(str(error))
            return False
        finally:
            self._waited_s += time.monotonic() - began_s
        self._published(path, waited_s=self._waited_s, took_s=time.monotonic() - self._began_s)
        return True

    def _report_failure(self, reason: str) -> None:
        self._note(f"warning: a save failed and training goes on: {reason}")

    def close(self) -> None:
        """End the writer process and give the memory back; a save under way is given up, as if killed."""
        self._save.close()
