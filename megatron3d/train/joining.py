"""From a started process to a run with its mesh: the device, the process group, the groups of the layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch

from megatron3d.comm.agree import require_agreement
from megatron3d.comm.device import marker_of, pick_device, set_fp32_precision
from megatron3d.comm.join import join, leave
from megatron3d.comm.mesh import Mesh, make_mesh
from megatron3d.comm.meter import Wait
from megatron3d.comm.roll_call import RollCall, report
from megatron3d.comm.waiting import CollectiveError, first_line, is_peer_failure, is_timeout
from megatron3d.comm.watcher import Watcher, flight_record, flight_record_path, flight_record_paths, group_timeout
from megatron3d.config.agreement import agreed_options
from megatron3d.config.run import RunConfig
from megatron3d.errors import ConfigError, Megatron3dError, PeerError, StopRequested
from megatron3d.planner.layout import layout_of
from megatron3d.train.exit_status import clear_exit_status, remove_of_earlier_run
from megatron3d.train.launch import RunContext


@contextmanager
def joined(
    config: RunConfig,
    context: RunContext,
    *,
    save: str | None,
    files: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[tuple[Mesh, torch.device]]:
    """Pick the device, join the job, build the mesh of a resolved config, and leave the job at the end.

    The mesh is built once all ranks have the same options: with different layouts they would wait in groups that the
    others do not have. Within the block a stop that is asked for only sets `context.stop`, if `run_main` handles stops
    at all; the block must look at it.

    Args:
        config: the resolved run, whose layout and device are taken.
        context: learns `save`.
        save: the --save directory, in which the exit status of an earlier run is removed.
        files: digests of what else each rank has read from files, by a name for people: prompts, a training file.

    Raises:
        ConfigError: the device cannot be had, or the ranks do not agree on an option or on `files`.
        PeerError: instead of the error of a collective in the block that lost another rank.
    """
    launch, parallel = context.launch, config.parallel
    context.save = save
    if save and launch.rank == 0:
        context.ended_after = clear_exit_status(save)
        for record in flight_record_paths(Path(save)):
            remove_of_earlier_run(record)
    device = pick_device(parallel.device, local_rank=launch.local_rank, local_world_size=launch.local_world_size)
    set_fp32_precision(device, config.train.fp32_matmul_precision)
    limit = timedelta(minutes=parallel.distributed_timeout_minutes)
    timeout = group_timeout(limit, device)
    layout = layout_of(parallel, query_groups=config.model.num_query_groups)
    roll: RollCall | None = None
    watcher: Watcher | None = None
    try:
        store = join(launch, device, timeout=timeout)
        if store is not None:
            roll = RollCall(store, rank=launch.rank, world_size=launch.world_size)
        require_agreement({**agreed_options(config), **files}, ConfigError)
        # Not before: while ranks wait for each other nothing looks at the flag, and there is nothing to save.
        context.stop.defer()
        mesh = make_mesh(layout, timeout=timeout)
        if roll is not None:
            roll.watch(mesh.meter)
            mesh.meter.mark = marker_of(device)
            watcher = Watcher(mesh.meter, limit, partial(_end_stuck, context=context, mesh=mesh, roll=roll))
        yield mesh, device
    except Exception as error:
        if watcher is not None:
            watcher.close()  # this thread is not stuck
        if isinstance(error, StopRequested) and roll is not None:
            roll.close()  # all ranks end here
        if (isinstance(error, Megatron3dError) and not isinstance(error, CollectiveError)) or not is_peer_failure(
            error
        ):
            raise
        raise _peer_error(error, roll, launch.world_size) from error
    if watcher is not None:
        watcher.close()
    if roll is not None:
        roll.close()
    leave()


def _end_stuck(wait: Wait, *, context: RunContext, mesh: Mesh, roll: RollCall) -> None:
    """End this process, whose main thread waits in C for a collective, as if the collective had raised."""
    found = CollectiveError(f"{wait}: timed out", waited_for=str(wait))
    error = _peer_error(found, roll, context.launch.world_size)
    error.add_note(f"on {mesh}, after step {context.last_step}")
    if context.save and (record := flight_record()):
        path = flight_record_path(Path(context.save), context.launch.rank)
        error = _with_flight_record(error, path, record)
    context.end_by(error)


def _with_flight_record(error: PeerError, path: Path, record: bytes) -> PeerError:
    """The same error, saying where the record of the latest collectives is, or why it is nowhere."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(record)
        said = f"the latest collectives of this rank are in {path}"
    except OSError as refusal:
        said = f"the latest collectives of this rank could not be written to {path}: {refusal.strerror}"
    more = PeerError(f"{error}; {said}")
    for note in getattr(error, "__notes__", []):
        more.add_note(note)
    return more


def _peer_error(error: Exception, roll: RollCall | None, world_size: int) -> PeerError:
    """An error of a collective, as the sentence it stands for; after a timeout with what a roll call finds."""
    what = first_line(error)
    if roll is not None and is_timeout(error):
        if isinstance(error, CollectiveError):
            what = f"{error.waited_for} was not finished within --distributed-timeout-minutes"
        what = f"{what}; {report(roll.call(), world_size)}"
    failure = PeerError(f"a collective failed, so another rank is gone or stuck: {what}")
    for note in getattr(error, "__notes__", []):
        failure.add_note(note)
    return failure
