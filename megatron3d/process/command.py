"""The outermost frame of a tool: errors for the user become sentences, signals become exceptions, both exit codes.

SIGTERM ends Python on the spot unless somebody handles it, so files that are half written and worker processes would
stay. Here it is raised like Ctrl-C, and every `with` and `finally` on the way out is run. A second one ends at once.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from megatron3d.errors import Megatron3dError
from megatron3d.process.streams import patient_streams


class Terminated(BaseException):
    """SIGTERM was received; not an `Exception`, so that nothing handles it on the way out."""


def run_command(action: Callable[[], None]) -> int:
    """Run a tool and return the exit code of what happened: 0, that of the error, 130 for Ctrl-C, 143 for SIGTERM.

    Notes of an exception say what became of the work.
    """
    with patient_streams(), _sigterm_raised():
        try:
            action()
        except Megatron3dError as error:
            print("\n".join([str(error), *_notes(error)]), file=sys.stderr)
            return error.exit_code
        except (KeyboardInterrupt, Terminated) as error:
            number = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
            left = " ".join(_notes(error)) or "nothing half written was left"
            print(f"ended by {number.name}; {left}", file=sys.stderr)
            return 128 + number
    return 0


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", []))


@contextmanager
def _sigterm_raised() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets the main thread alone have handlers
        return
    before = signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _raise_terminated(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    raise Terminated(signal.Signals(number).name)
