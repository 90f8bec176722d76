"""What a process learns from the launcher that started it. The only user of the environment, and free of torch.

`torchrun` (torch's elastic agent) and cluster schedulers tell a process its rank by environment variables. torch takes
seconds to import, so what can be decided without it, such as whether the options make sense, imports this module and
not `join.py`.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from megatron3d.comm.launch_variables import parse_launch_variables


@dataclass(frozen=True)
class Launch:
    """What the launcher sets.

    Attributes:
        rank: among all processes of the job.
        world_size: how many those are.
        local_rank: among the processes of this machine.
        local_world_size: how many those are.
        restart_count: how often an elastic agent restarted the job.
        has_agent: whether an elastic agent watches this process: it takes any exit code but 0 for a failure, ends the
            other processes of the machine, and may restart the job.
        master_addr: host of rank 0, where all processes of the job meet; None where it is not given.
        master_port: the port there.
        error_file: where the agent looks for the reason of a failure, if it does. The directory above the file's own is
            shared by the processes of this machine and new for every attempt.
        started_s: `time.monotonic()` when this was read, which is the first thing that a process does.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    restart_count: int = 0
    has_agent: bool = False
    master_addr: str | None = None
    master_port: str | None = None
    error_file: Path | None = None
    started_s: float = field(default_factory=time.monotonic, compare=False)


def read_launch() -> Launch:
    """Read `torchrun`'s variables; a process started without it is rank 0 of 1.

    Raises:
        ConfigError: they cannot be used, see `parse_launch_variables`.
    """
    env = os.environ
    numbers = parse_launch_variables(env)
    error_file = env.get("TORCHELASTIC_ERROR_FILE")
    return Launch(
        rank=numbers["RANK"],
        world_size=numbers["WORLD_SIZE"],
        local_rank=numbers["LOCAL_RANK"],
        local_world_size=numbers["LOCAL_WORLD_SIZE"],
        restart_count=numbers["TORCHELASTIC_RESTART_COUNT"],
        has_agent="TORCHELASTIC_RUN_ID" in env,
        master_addr=env.get("MASTER_ADDR"),
        master_port=env.get("MASTER_PORT"),
        error_file=Path(error_file) if error_file else None,
    )


def limit_tokenizers_to_one_thread() -> None:
    """Keep the `tokenizers` library from starting threads in this process and its children, unless the user asked.

    By default each process has a thread for each core, which is too many where there is a process for each core; and
    threads do not survive a fork.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def end_process(code: int) -> NoReturn:
    """End this process now with an exit code, without waiting for threads of collectives that may never finish."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
