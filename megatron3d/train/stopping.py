"""The ranks' common decision to stop: each may have its own request, and all act on it at the same point.

Signals do not reach all ranks at the same time. A rank that stopped alone would leave the others waiting for it, so
every point at which a run may stop is a small reduction over all ranks.
"""

from __future__ import annotations

from megatron3d.comm.collectives import count_votes, gather_values
from megatron3d.comm.mesh import Axis, Mesh
from megatron3d.errors import StopRequested
from megatron3d.train.launch import BEFORE_TRAINING, NO_STEP, RunContext


def agreed_reason(reason: str | None, mesh: Mesh) -> str | None:
    """The reason of the first rank that has one to stop, on every rank; None if no rank has. Collective."""
    return first_reason(reason, mesh.world) if count_votes(reason is not None, mesh.host) else None


def first_reason(reason: str | None, world: Axis) -> str | None:
    """The same where it is known that a rank has one."""
    return next(filter(None, gather_values(reason, world)), None)


def signal_reason(context: RunContext) -> str | None:
    """That a signal, or the loss of its agent, asked this rank to stop, if one did."""
    return context.stop.reason


def stop_if_asked(context: RunContext, mesh: Mesh, *, when: str, outcome: str) -> None:
    """End the run if a signal asked any rank to stop; collective.

    Args:
        context: knows of signals to this rank.
        mesh: the ranks that decide together.
        when: for the sentence, such as "before training".
        outcome: for the sentence: what is kept and what to do.

    Raises: StopRequested on all ranks.
    """
    reason = agreed_reason(signal_reason(context), mesh)
    if reason is not None:
        raise StopRequested(f"stopped {when} because {reason}; {outcome}")


def stop_while_starting(context: RunContext, mesh: Mesh) -> None:
    """The same before the first step of a run.

    Raises: StopRequested on all ranks.
    """
    stop_if_asked(context, mesh, when=BEFORE_TRAINING, outcome=NO_STEP)
