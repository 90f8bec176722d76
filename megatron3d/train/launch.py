"""The outermost frame of every script: from any error to a sentence, a status file and an exit code.

Whatever goes wrong inside `run_main` becomes one sentence on standard error, an `exit_status.json` beside the
checkpoints, a word to the elastic agent if there is one, and the process's exit code (docs/stopping.md). A rank that
fails ends its process at once, so that the launcher ends the others instead of letting them wait.

Nothing here needs torch: a mistake in the options is answered before torch is imported. `joining.py` has what a run
needs to join the job.
"""

from __future__ import annotations

import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NoReturn

from megatron3d.comm.launch import Launch, end_process, read_launch
from megatron3d.errors import ConfigError, InUseError, Megatron3dError, PeerError, StopRequested
from megatron3d.process.streams import patient_streams
from megatron3d.train.agent_gone import stop_without_agent
from megatron3d.train.agent_report import report_to_agent
from megatron3d.train.compile_failed import compile_failed
from megatron3d.train.exit_status import ExitStatus, exit_code_of, saved_step, status_of, write_exit_status
from megatron3d.train.memory_short import memory_short
from megatron3d.train.print_once import print_once
from megatron3d.train.signals import StopFlag

BEFORE_TRAINING = "before training"
NO_STEP = "no step was made, so nothing is saved; start again"


@dataclass
class RunContext:
    """What the outermost frame must know of a run to report its end: filled in while the run learns it.

    `save` is the --save directory, set as soon as it is known: a launcher that looks there for the exit status must
    not find that of an earlier run. `step` is the last step that is finished, None until it is known where the run
    starts. `ended_after` is the last step of the earlier run in that directory, on rank 0, where its exit status had
    one. `stop` is set by signals once the run has joined the job (see `joined`); before, they end the process.
    """

    launch: Launch
    save: str | None = None
    step: int | None = None
    ended_after: int | None = None
    stop: StopFlag = field(init=False)

    def __post_init__(self) -> None:
        """Make the flag, which nothing sets yet."""
        self.stop = StopFlag(on_forced=self.forced_end, on_early=self.early_end)

    @property
    def last_step(self) -> int:
        """The last step that is finished: before the run knows where it starts, that of the latest checkpoint."""
        if self.step is None:
            return saved_step(self.save) if self.save else 0
        return self.step

    def forced_end(self, code: int) -> None:
        """Record beside the checkpoints that a second signal ends this process now, without a save."""
        if self.save:
            reason = f"forced to end by a second {signal.Signals(code - 128).name}, without a save"
            write_exit_status(self.save, ExitStatus(code, reason, self.launch.rank, self.last_step, time.time()))

    def end_by(self, error: PeerError) -> NoReturn:
        """End this process now because of an error that another thread than the main one found."""
        end_process(_report(error, self))

    def early_end(self, reason: str) -> None:
        """End this process, which is asked to stop while it starts: it has joined no others that could stop with it."""
        error = StopRequested(f"stopped {BEFORE_TRAINING} because {reason}; {NO_STEP}")
        code = _report(error, self)
        end_process(0 if self.launch.has_agent else code)


def run_main(main: Callable[[RunContext], None], *, stoppable: bool = False) -> None:
    """Run `main` and end the process with the exit code of what happened (design of the codes: `errors.py`).

    An elastic agent takes every code but 0 for a failure, to be restarted if any restarts are left. A run that stopped
    because it was asked to therefore ends with 0 under an agent; `exit_status.json` has its own code in any case.

    With `stoppable`, signals ask for a stop (see `signals.py`) and `main` looks at `context.stop` once it has joined.
    """
    with patient_streams():
        try:
            context = RunContext(read_launch())
        except ConfigError as error:
            # No process knows its rank, so each of them prints it.
            print(f"error: {error}", file=sys.stderr)
            end_process(error.exit_code)
        stop_without_agent(context.launch, context.stop)
        try:
            with context.stop if stoppable else nullcontext():
                main(context)
        except SystemExit as error:
            if code := _report_exit(error, context):
                end_process(code)
            raise
        except (Exception, KeyboardInterrupt) as error:
            code = _report(memory_short(error) or compile_failed(error) or error, context)
            end_process(0 if context.launch.has_agent and isinstance(error, StopRequested) else code)
        if context.save and context.launch.rank == 0:
            write_exit_status(context.save, status_of(None, rank=0, step=context.last_step))


def _report_exit(error: SystemExit, context: RunContext) -> int:
    """Record that Python was asked to exit, by `--help` or by a package that ends processes; returns the code."""
    code, launch = exit_code_of(error), context.launch
    if code:
        traceback.print_exception(error)
        print(f"error (on rank {launch.rank} of {launch.world_size}): SystemExit: {error}", file=sys.stderr)
    if context.save:
        write_exit_status(context.save, status_of(error, rank=launch.rank, step=context.last_step))
    return code


def _report(error: BaseException, context: RunContext) -> int:
    """Write the sentence, the status file and the agent's file; returns the exit code."""
    code, launch = exit_code_of(error), context.launch
    where = "; ".join(getattr(error, "__notes__", [])) or f"on rank {launch.rank} of {launch.world_size}"
    if isinstance(error, Megatron3dError) and not isinstance(error, PeerError):
        _print_for_the_machine(error, where, launch)
    elif isinstance(error, PeerError):  # what each rank saw of a failure elsewhere
        print(f"error ({where}): {error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
        print(f"error ({where}): {type(error).__name__}: {_first_line(error)}", file=sys.stderr)
    # A directory that another run holds is not ours to leave word in.
    if context.save and not isinstance(error, InUseError):
        refusal = write_exit_status(context.save, status_of(error, rank=launch.rank, step=context.last_step))
        if refusal:
            print(f"the exit status could not be written beside the checkpoints: {refusal}", file=sys.stderr)
    report_to_agent(error, where, launch.error_file)
    return code


def _print_for_the_machine(error: Megatron3dError, where: str, launch: Launch) -> None:
    """Print the sentence of an error that the other ranks of this machine may have as well, so that it stands once.

    Under an elastic agent the first rank to get here prints: the agent ends the others as soon as one has ended, and
    none of them may count on coming this far. Without one each rank lives to its own end. Then options and stops,
    which are the same on all ranks of a machine, are left to its first; of other errors each rank prints its own.
    """
    same_on_all = isinstance(error, ConfigError | StopRequested)
    text = str(error) if isinstance(error, StopRequested) else f"error ({where}): {error}"
    if isinstance(error, ConfigError):
        text = f"error: {error}"
    if launch.error_file is not None:
        print_once(text, key=str(error), directory=launch.error_file.parent.parent)
    elif launch.local_rank == 0 or not same_on_all:
        print(text, file=sys.stderr)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
