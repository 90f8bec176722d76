"""Whether all ranks mean one directory by --save: rank 0 makes a token of a new name in it, and every rank looks.

A path may name another directory on another node, if the file system is not shared or the path is relative. Without
this look that would show at the first save, after all steps before it.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from megatron3d.checkpoint.ranks import ProcessGroup, from_first, gathered, on_every_rank
from megatron3d.checkpoint.refusals import storage_errors
from megatron3d.errors import StorageError

_PREFIX = ".tmp-shared-"  # a directory of such a name is removed by the next save, should this process be killed here
_PATIENCE_S = 3.0  # what another node has just made may take this long to show on a shared file system


def require_shared(root: Path, group: ProcessGroup | None, *, rank: int) -> None:
    """Make sure that `root`, which rank 0 has made, is one directory for all ranks. Collective over `group`.

    Raises:
        StorageError: on every rank, with the ranks that see another directory; or rank 0 cannot write there.
    """
    if group is None:
        return
    name = from_first(lambda: f"{_PREFIX}{uuid.uuid4().hex}", group)
    token = root / name

    def on_first(action: Callable[[], None]) -> None:
        if rank == 0:
            with storage_errors(token):
                action()

    on_every_rank(lambda: on_first(token.mkdir), group)
    places = gathered((_is_there(token), f"{os.path.abspath(root)} on {socket.gethostname()}"), group)
    on_every_rank(lambda: on_first(token.rmdir), group)
    blind = [f"rank {number} ({place})" for number, (is_seen, place) in enumerate(places) if not is_seen]
    if blind:
        shown = ", ".join(blind[:8]) + (f" and {len(blind) - 8} more" if len(blind) > 8 else "")
        raise StorageError(
            f"--save {root} is not one directory for all ranks: what rank 0 makes in {places[0][1]} is not seen by "
            f"{shown}; give all of them the same directory, on a file system that all nodes share"
        )


def _is_there(token: Path) -> bool:
    until = time.monotonic() + _PATIENCE_S
    while not token.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True
