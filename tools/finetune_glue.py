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

from megatron3d.config.cli import save_directory
from megatron3d.tasks.glue.command import read_task_command
from megatron3d.train.launch import RunContext, run_main


def main(context: RunContext) -> None:
    """Settle what is asked for, fine-tune once for each seed, predict, and print the result."""
    is_first = context.launch.rank == 0
    log = to_stderr if is_first else silent
    context.save = save_directory(sys.argv[1:])
    command = read_task_command(sys.argv[1:], context.launch.world_size, log=log)

    # The rest needs torch, whose import takes seconds: a mistake above is answered without it.
    from megatron3d.tasks.glue.job import settle
    from megatron3d.tasks.glue.run_job import one_seed, summary
    from megatron3d.train.joining import joined

    job = settle(command, context.launch.world_size)
    for note in job.notes:
        log(note)
    with joined(job.runs[0], context, save=job.save, files=job.files()) as (mesh, device):
        results = [one_seed(job, run, mesh, device, context, log=log) for run in job.runs]
    if is_first:
        print(json.dumps(summary(job, results)))


def to_stderr(line: str) -> None:
    """A line for people; standard output is for the result."""
    print(line, file=sys.stderr, flush=True)


def silent(line: str) -> None:
    """Keep to oneself what rank 0 says already."""


if __name__ == "__main__":
    run_main(main, stoppable=True)
