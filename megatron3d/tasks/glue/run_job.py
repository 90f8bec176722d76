"""Running a fine-tuning that is settled: once for each seed, with the predictions and the result of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron3d.comm.mesh import Mesh
from megatron3d.config.run import RunConfig
from megatron3d.models.stage import StageBuilder
from megatron3d.models.zoo import architecture_of
from megatron3d.tasks.glue.average import with_averages
from megatron3d.tasks.glue.finetune import Finetuned, FinetuneSettings, finetune
from megatron3d.tasks.glue.job import Job
from megatron3d.tasks.glue.metrics import over_seeds
from megatron3d.tasks.glue.pace import Pace
from megatron3d.tasks.glue.predict import scores, write_predictions
from megatron3d.tasks.glue.weights import fill, keep_tokenizer
from megatron3d.train.held import held_directory
from megatron3d.train.launch import RunContext
from megatron3d.train.setup import TrainingSetup, build_parts
from megatron3d.train.stopping import stop_if_asked, stop_while_starting


def one_seed(
    job: Job, run: RunConfig, mesh: Mesh, device: torch.device, context: RunContext, *, log: Callable[[str], None]
) -> dict[str, Any]:
    """Fine-tune, and predict with the best weights; collective over all ranks. `log` takes lines for people."""
    save = None if run.checkpoint.save is None else Path(run.checkpoint.save)
    with held_directory(save, mesh) as renew:
        if save is not None:
            run = replace(run, data=keep_tokenizer(run.data, run.model, save, mesh))
        build = architecture_of(run.model).build_classifier
        assert build is not None, "an origin of another architecture is refused"
        builder: StageBuilder = partial(build, num_outputs=job.task.num_outputs)
        if job.ema_decay is not None:
            builder = with_averages(builder)
        parts = build_parts(run, mesh, device, builder)
        fill(parts, job.origin, job.task)
        stop_while_starting(context, mesh)
        settings = FinetuneSettings(
            task=job.task,
            epochs=job.epochs,
            max_length=run.model.seq_length,
            multiple=job.multiple,
            group_size=job.group_size,
            token_dropout=job.token_dropout,
            ema_decay=job.ema_decay,
            eval_interval=job.eval_interval,
            save=save,
            renew_hold=renew,
        )
        found = finetune(parts, job.data, settings, context=context, log=log)
        files = _predict(parts, job, context, saved=found.saved, log=log)
    return _result_of(run.data.seed, found) | ({"predictions": files} if files else {})


def summary(job: Job, results: list[dict[str, Any]]) -> dict[str, Any]:
    """What the last line says: of several seeds the means, their standard deviations, and each seed's own."""
    if len(results) == 1:
        return {"task": job.task.name, **results[0]}
    means, spread = over_seeds([one["metrics"] for one in results])
    return {"task": job.task.name, "metrics": means, "standard_deviations": spread, "runs": results}


def _predict(
    parts: TrainingSetup, job: Job, context: RunContext, *, saved: Path | None, log: Callable[[str], None]
) -> list[str]:
    """Write the predictions of all test files, with the weights that were `saved`; returns their paths."""
    written = []
    weights = f"the best weights are saved at {saved}" if saved else "no weights are saved"
    give_up = partial(stop_if_asked, context, parts.mesh, when="while predicting", outcome=f"{weights}; start again")
    for name, samples in job.data.test.items():
        pace = Pace(f"predicting {name}", samples.lengths_N, log)
        found_NC = scores(
            parts,
            samples,
            num_outputs=job.task.num_outputs,
            multiple=job.multiple,
            pace=pace,
            before_batch=give_up,
        )
        folder = job.predict or Path()
        path = (folder / f"seed-{parts.config.data.seed}" if len(job.runs) > 1 else folder) / f"{name}.tsv"
        if parts.mesh.rank == 0:
            write_predictions(path, found_NC, job.task)
        written.append(str(path))
    return written


def _result_of(seed: int, found: Finetuned) -> dict[str, Any]:
    """One seed's part of the result."""
    speed = {"train_samples_per_second": found.samples / found.train_s} if found.train_s else {}
    return {
        "seed": seed,
        "metrics": dict(found.best.metrics),
        "loss": found.best.loss,
        "epoch": found.epoch,
        "step": found.step,
        **speed,
    }
