"""From a started process to a run with its mesh, and from any error to a sentence and an exit code.

`guarded` is the outermost frame of every script: whatever goes wrong inside becomes one sentence on standard error
that names rank, layout and step, an `exit_status.json` beside the checkpoints, and the process's exit code. A rank
that fails ends its process at once, so that the launcher ends the others instead of letting them wait.
"""

from __future__ import annotations

import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import MappingProxyType

import torch

from megatron3d.comm.agree import require_agreement
from megatron3d.comm.device import pick_device
from megatron3d.comm.launch import Launch, end_process, is_peer_failure, join, leave, read_launch
from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import Mesh, make_mesh
from megatron3d.config.agreement import agreed_options
from megatron3d.config.run import RunConfig
from megatron3d.errors import ConfigError, InUseError, Megatron3dError, PeerError, StopRequested
from megatron3d.train.exit_status import ExitStatus, clear_exit_status, exit_code_of, status_of, write_exit_status


@dataclass
class Guard:
    """What the outermost frame must know of a run to report its end: filled in as the run finds out.

    `save` is the --save directory, set as soon as it is known: a launcher that looks there for the exit status must
    not find that of an earlier run.
    """

    launch: Launch
    save: str | None = None
    step: int = 0

    def forced_end(self, code: int) -> None:
        """Leave word beside the checkpoints that a second signal ends this process now, without a save."""
        if self.save:
            reason = f"forced to end by a second {signal.Signals(code - 128).name}, without a save"
            write_exit_status(self.save, ExitStatus(code, reason, self.launch.rank, self.step, time.time()))


def guarded(main: Callable[[Guard], None]) -> None:
    """Run `main` and end the process with the exit code of what happened (design of the codes: `errors.py`)."""
    guard = Guard(read_launch())
    try:
        main(guard)
    except (Exception, KeyboardInterrupt) as error:
        end_process(_report(_as_ours(error, guard), guard))
    leave()
    if guard.save and guard.launch.rank == 0:
        write_exit_status(guard.save, status_of(None, rank=0, step=guard.step))


@contextmanager
def joined(
    config: RunConfig, guard: Guard, *, save: str | None, files: Mapping[str, str] = MappingProxyType({})
) -> Iterator[tuple[Mesh, torch.device]]:
    """Pick the device, join the job, and build the mesh of a resolved config, once all ranks have the same one.

    `files` are digests of what else each rank read from files before, by a name for people: prompts, a training file.

    Raises:
        ConfigError: the device cannot be had, or the ranks do not agree on an option or on `files`.
    """
    launch, parallel = guard.launch, config.parallel
    guard.save = save
    if save and launch.rank == 0:
        clear_exit_status(save)
    device = pick_device(parallel.device, local_rank=launch.local_rank, local_world_size=launch.local_world_size)
    timeout = timedelta(minutes=parallel.distributed_timeout_minutes)
    join(launch, device, timeout=timeout)
    # Before the mesh: ranks with different layouts would wait in groups that the others do not have.
    require_agreement({**agreed_options(config), **files}, ConfigError)
    layout = Layout(
        tp=parallel.tensor_model_parallel_size,
        pp=parallel.pipeline_model_parallel_size,
        dp=parallel.data_parallel_size,
        cp=parallel.context_parallel_size,
        zero_shard=parallel.zero_shard_size,
    )
    yield make_mesh(layout, timeout=timeout), device


def _as_ours(error: BaseException, guard: Guard) -> BaseException:
    """An error of a collective as the `PeerError` it is; others unchanged."""
    if isinstance(error, Megatron3dError) or not is_peer_failure(error):
        return error
    failure = PeerError(f"a collective failed, so another rank is gone or stuck: {_first_line(error)}")
    for note in getattr(error, "__notes__", []):
        failure.add_note(note)
    return failure


def _report(error: BaseException, guard: Guard) -> int:
    """Write the sentence and the status file; returns the exit code."""
    code, rank = exit_code_of(error), guard.launch.rank
    where = "; ".join(getattr(error, "__notes__", [])) or f"on rank {rank} of {guard.launch.world_size}"
    if isinstance(error, ConfigError | StopRequested):
        if guard.launch.local_rank == 0:  # all ranks of a machine say the same; another machine may have its own
            print(error if isinstance(error, StopRequested) else f"error: {error}", file=sys.stderr)
    elif isinstance(error, Megatron3dError):
        print(f"error ({where}): {error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
        print(f"error ({where}): {type(error).__name__}: {_first_line(error)}", file=sys.stderr)
    # A directory that another run holds is not ours to leave word in.
    if guard.save and not isinstance(error, InUseError):
        refusal = write_exit_status(guard.save, status_of(error, rank=rank, step=guard.step))
        if refusal:
            print(f"the exit status could not be written beside the checkpoints: {refusal}", file=sys.stderr)
    return code


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
