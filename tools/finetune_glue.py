"""Fine-tune a BERT on one of the nine GLUE tasks, or on TSV files of your own, and measure it.

    python tools/finetune_glue.py --task sst-2 --data-dir glue/SST-2 --hf MODEL --epochs 3 --lr 3e-5 --save OUT
    torchrun --standalone --nproc-per-node 4 tools/finetune_glue.py --task mrpc --data-dir glue --load CHECKPOINTS \
        --epochs 3 --lr 3e-5 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --predict predictions

Beside the options below it takes those of `pretrain_bert.py` for layout, optimizer, batch, precision and checkpoints
(`pretrain_bert.py --help`). The last line on standard output is one JSON object with the metrics on the dev file; what
happens meanwhile goes to standard error. See docs/glue.md.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron3d.tasks.glue.options import task_parser

if __name__ == "__main__" and {"--help", "-h"} & set(sys.argv):
    task_parser().print_help()  # before the imports below, which take seconds
    sys.exit(0)

import torch

from megatron3d.comm.mesh import Mesh
from megatron3d.config.cli import save_directory
from megatron3d.config.run import RunConfig
from megatron3d.models.bert_classifier import build_bert_classifier_stage
from megatron3d.tasks.glue.finetune import Finetuned, Wishes, finetune
from megatron3d.tasks.glue.job import Job, settle
from megatron3d.tasks.glue.metrics import over_seeds
from megatron3d.tasks.glue.pace import Pace
from megatron3d.tasks.glue.predict import scores, write_predictions
from megatron3d.tasks.glue.weights import fill, keep_tokenizer
from megatron3d.train.held import held_directory
from megatron3d.train.joining import joined
from megatron3d.train.launch import Guard, guarded
from megatron3d.train.parts import Parts, build_parts
from megatron3d.train.stopping import stop_if_asked, stop_while_starting


def main(guard: Guard) -> None:
    """Settle what is asked for, fine-tune once for each seed, predict, and print the result."""
    is_first = guard.launch.rank == 0
    say = to_stderr if is_first else silent
    guard.save = save_directory(sys.argv[1:])
    args, other_words = task_parser().parse_known_args()
    job = settle(args, other_words, guard.launch.world_size, say=say)
    for note in job.notes:
        say(note)
    results = []
    with joined(job.runs[0], guard, save=job.save, files=job.files()) as (mesh, device):
        for run in job.runs:
            results.append(one_seed(job, run, mesh, device, guard))
    if is_first:
        print(json.dumps(summary(job, results)))


def one_seed(job: Job, run: RunConfig, mesh: Mesh, device: torch.device, guard: Guard) -> dict[str, Any]:
    """Fine-tune, and predict with the best weights; collective over all ranks."""
    say = to_stderr if mesh.rank == 0 else silent
    save = None if run.checkpoint.save is None else Path(run.checkpoint.save)
    with held_directory(save, mesh) as renew:
        if save is not None:
            run = replace(run, data=keep_tokenizer(run.data, run.model, save, mesh))
        builder = partial(build_bert_classifier_stage, num_outputs=job.task.num_outputs)
        parts = build_parts(run, mesh, device, builder)
        fill(parts, job.origin, job.task)
        stop_while_starting(guard, mesh)
        wishes = Wishes(
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
        found = finetune(parts, job.data, wishes, guard=guard, say=say)
        files = predict(parts, job, run, guard, saved=found.saved)
    return result_of(run, found) | ({"predictions": files} if files else {})


def predict(parts: Parts, job: Job, run: RunConfig, guard: Guard, *, saved: Path | None) -> list[str]:
    """Write the predictions of all test files, with the weights that were `saved`; returns their paths."""
    written = []
    weights = f"the best weights are saved at {saved}" if saved else "no weights are saved"
    give_up = partial(stop_if_asked, guard, parts.mesh, when="while predicting", outcome=f"{weights}; start again")
    for name, samples in job.data.test.items():
        pace = Pace(f"predicting {name}", samples.lengths_N, to_stderr if parts.mesh.rank == 0 else silent)
        found_NC = scores(
            parts,
            samples,
            num_outputs=job.task.num_outputs,
            multiple=job.multiple,
            pace=pace,
            before_batch=give_up,
        )
        folder = job.predict or Path()
        path = (folder / f"seed-{run.data.seed}" if len(job.runs) > 1 else folder) / f"{name}.tsv"
        if parts.mesh.rank == 0:
            write_predictions(path, found_NC, job.task)
        written.append(str(path))
    return written


def result_of(run: RunConfig, found: Finetuned) -> dict[str, Any]:
    """One seed's part of the result."""
    speed = {"train_samples_per_second": found.samples / found.train_s} if found.train_s else {}
    return {
        "seed": run.data.seed,
        "metrics": dict(found.best.metrics),
        "loss": found.best.loss,
        "epoch": found.epoch,
        "step": found.step,
        **speed,
    }


def summary(job: Job, results: list[dict[str, Any]]) -> dict[str, Any]:
    """What the last line says: of several seeds the means, their standard deviations, and each seed's own."""
    if len(results) == 1:
        return {"task": job.task.name, **results[0]}
    means, spread = over_seeds([one["metrics"] for one in results])
    return {"task": job.task.name, "metrics": means, "standard_deviations": spread, "runs": results}


def to_stderr(line: str) -> None:
    """A line for people; standard output is for the result."""
    print(line, file=sys.stderr, flush=True)


def silent(line: str) -> None:
    """Keep to oneself what rank 0 says already."""


if __name__ == "__main__":
    guarded(main, stoppable=True)
