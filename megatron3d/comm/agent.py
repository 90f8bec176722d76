"""`torchrun` with `--shutdown-timeout` on every torch that this project runs with.

When torch's elastic agent gets a signal it passes it on to its processes, waits, and kills what is left. From torch
2.13 on `--shutdown-timeout` says how long it waits; before, it is always 30 s, too short to save a large model.
Where torch has the option this is `torchrun` itself; where it has not, the agent here waits as long as it is asked to.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.launcher import api as launcher
from torch.distributed.launcher.api import LaunchConfig
from torch.distributed.run import get_args_parser, run

DEFAULT_TIMEOUT_S = 30  # torch's own


class PatientAgent(LocalElasticAgent):
    """An agent that waits a given time for processes that it passed a signal on to.

    Processes that it ends for another reason, because one of them failed, have torch's 30 s as before.
    """

    def __init__(self, *args: Any, shutdown_timeout_s: int, **kwargs: Any) -> None:
        """Takes what the agent of torch takes, and the time to wait."""
        super().__init__(*args, **kwargs)
        self._patience_s = shutdown_timeout_s
        self._was_signalled = False

    def _shutdown(self, death_sig: signal.Signals | None = None) -> None:
        """End the processes; torch names the signal only where it passes one on that it got."""
        if death_sig is not None:
            self._was_signalled = True
        if self._was_signalled and self._pcontext is not None:
            self._pcontext.close(death_sig or signal.SIGTERM, self._patience_s)
        super()._shutdown(death_sig or signal.SIGTERM)  # no process is left for it, but the agent's own servers are


def torch_has_timeout() -> bool:
    """Whether the agent of the installed torch takes the time to wait as an option."""
    return "shutdown_timeout" in {field.name for field in fields(LaunchConfig)}


@record
def main(argv: Sequence[str] | None = None) -> None:
    """Start the processes that `torchrun`'s arguments ask for and watch them (default: those of the command line).

    Raises: what `torchrun` raises when a process fails or a signal ends it.
    """
    parser = get_args_parser()
    if torch_has_timeout():
        run(parser.parse_args(argv))
        return
    parser.add_argument(
        "--shutdown-timeout",
        "--shutdown_timeout",
        type=int,
        default=DEFAULT_TIMEOUT_S,
        help="Seconds that processes have to end after a signal before they are killed (default 30).",
    )
    args = parser.parse_args(argv)

    def patient(*given: Any, **options: Any) -> PatientAgent:
        return PatientAgent(*given, shutdown_timeout_s=args.shutdown_timeout, **options)

    # Older versions make the agent in this function, of the class that has this name there, and take no other.
    torchs, launcher.LocalElasticAgent = launcher.LocalElasticAgent, patient
    try:
        run(args)
    finally:
        launcher.LocalElasticAgent = torchs
