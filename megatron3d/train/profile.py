"""`--profile-pipeline DIR`: one step of the run with the times of everything its pipeline did, as picture and trace."""

from __future__ import annotations

from pathlib import Path

from megatron3d.comm.device import Clock
from megatron3d.errors import StorageError
from megatron3d.pipeline.measured import PipelineRecorder
from megatron3d.train.setup import TrainingSetup


def recorder_of_step(parts: TrainingSetup, step: int) -> PipelineRecorder | None:
    """What records this step (counted from 1 in this process, so that a resumed run has one too), if it is the one."""
    train = parts.config.train
    if train.profile_pipeline is None or step != train.profile_pipeline_step:
        return None
    return PipelineRecorder(parts.mesh.pp, Clock(parts.model.device))


def write_recorded(parts: TrainingSetup, recorder: PipelineRecorder, step: int) -> str | None:
    """Put the ranks' times together and write the files; returns what came out, or why nothing did, on rank 0.

    The first pipeline of the run stands for all. All ranks must come here.
    """
    from megatron3d.pipeline.draw.measured import write_profile  # matplotlib takes half a second

    measured = recorder.gather()
    folder = parts.config.train.profile_pipeline
    if parts.mesh.rank != 0 or folder is None:
        return None
    try:
        return write_profile(measured, Path(folder), name=f"step{step}")
    except StorageError as error:
        return f"no profile was written: {error}"
