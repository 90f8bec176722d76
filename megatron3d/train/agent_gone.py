"""A worker whose elastic agent was killed: nobody watches it any more, so it saves and stops as on a signal."""

from __future__ import annotations

import os
import signal
import sys
import time

from megatron3d.comm.launch import Launch, end_process
from megatron3d.process.parent import watch_parent
from megatron3d.train.signals import StopFlag

GRACE_S = 600.0  # for the step under way and the save; a hang is over by then, with the default collective timeout


def stop_without_agent(launch: Launch, flag: StopFlag, *, grace_s: float = GRACE_S) -> None:
    """From now on, if this process was started by an elastic agent and that is gone, ask it to stop.

    A stop saves first where the run has come so far; one that is under way goes on. A process that handles no stops
    gets a SIGTERM, and one that has not ended after `grace_s` is ended.
    """
    if not launch.has_agent:
        return  # a process that a shell started may outlive it, as those under nohup do

    def stop() -> None:
        print(f"rank {launch.rank}: the elastic agent that started it is gone; stopping", file=sys.stderr, flush=True)
        # Not by a signal: a SIGTERM would be the second one of a stop under way and force the end without its save.
        if not flag.request("the elastic agent that started it is gone"):
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace_s)
        print(f"rank {launch.rank}: not stopped after {grace_s:g} s; ending now", file=sys.stderr, flush=True)
        end_process(128 + signal.SIGTERM)

    watch_parent(os.getppid(), stop)
