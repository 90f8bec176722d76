"""What a process does when the one that started it is gone: a killed launcher or tool must leave nothing running."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

POLL_S = 0.5


def watch_parent(parent_pid: int, on_gone: Callable[[], None], *, poll_s: float = POLL_S) -> None:
    """Call `on_gone` once, in a thread, when this process has another parent than `parent_pid`.

    The system gives an orphan to another process at once, so the change cannot be missed, nor can a process that takes
    the old number be mistaken for the parent. The thread ends with the process.
    """

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(poll_s)
        on_gone()

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
