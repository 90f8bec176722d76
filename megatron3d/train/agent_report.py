"""Why this process failed, for the elastic agent that started it: the file that `torchrun` reads.

The agent hands the message of the first failure on to whatever started it, and `torchrun` prints for every process what
stands there as the call stack. A bug has its traceback there. An error meant for the user has its sentence in the
message; it is printed once for the machine, so that the report points to it instead of repeating it for every rank.
The format is that of torch.distributed.elastic.multiprocessing.errors, which has no description but its code.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import traceback
from pathlib import Path

from megatron3d.errors import Megatron3dError, PeerError, StopRequested


def report_to_agent(error: BaseException, where: str, file: Path | None) -> None:
    """Write the reason into the agent's file, if it has one; a file system that refuses is left alone.

    A stop is no failure. Nor is the loss of another rank reported: the agent takes the earliest file for the
    cause, and a process that was killed has left none.
    """
    if file is None or isinstance(error, StopRequested | PeerError):
        return
    kind = type(error).__name__
    if isinstance(error, Megatron3dError):
        shown = f"{kind} {where}; its sentence is printed above, once for this machine, and stands in the error_file"
    else:
        shown = "".join(traceback.format_exception(error))
    document = {
        "message": {
            "message": f"{kind} {where}: {error}",
            "extraInfo": {"py_callstack": shown, "timestamp": str(int(time.time()))},
        }
    }
    # In one step: the agent ends the other processes once one has ended, and fails over half a file.
    beside = file.with_name(f".{file.name}.tmp")
    with contextlib.suppress(OSError):  # the error itself is printed, and must not be hidden by this one
        beside.write_text(json.dumps(document), encoding="utf-8")
        os.replace(beside, file)
