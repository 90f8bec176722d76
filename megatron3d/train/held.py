"""A --save directory that one run holds for all its ranks, from its start to its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megatron3d.checkpoint.directory import HeldDirectory, hold_directory
from megatron3d.checkpoint.ranks import on_every_rank
from megatron3d.checkpoint.shared import require_shared
from megatron3d.comm.mesh import Mesh


@contextmanager
def held_directory(save: Path | None, mesh: Mesh) -> Iterator[Callable[[], str | None]]:
    """Keep other runs out of the --save directory while this one writes there; collective at its start.

    All ranks must see the same directory, which is looked at here and not at the first save.

    Yields a function to call before each save, collective as well: it takes the directory anew if somebody removed it
    since, and says so on rank 0.

    Raises: InUseError on all ranks if another run is in, at the start or at a save; StorageError if it cannot be made,
    or is another directory for another rank.
    """
    with ExitStack() as stack:
        held: list[HeldDirectory] = []

        def hold() -> None:
            if save is not None and mesh.rank == 0:
                held.append(stack.enter_context(hold_directory(save)))

        def renew() -> str | None:
            return on_every_rank(lambda: held[0].renew() if held else None, mesh.world.group)

        on_every_rank(hold, mesh.world.group)
        if save is not None:
            require_shared(save, mesh.world.group, rank=mesh.rank)
        yield renew
