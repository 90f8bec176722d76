"""Pretrain a GPT: `python pretrain_gpt.py ...` in one process, `torchrun ... pretrain_gpt.py ...` at any layout.

`--architecture path/to/file.py:NAME` trains a decoder of your own (CONTRIBUTING.md has the recipe). The flags are
Megatron-LM's (`--help` lists them). Copy this file to change how a run goes: each line of `main` is one thing that a
run does, and the function it calls is where to look.
"""

from __future__ import annotations

import sys

from megatron3d.config.cli import read_command, save_directory
from megatron3d.config.sample_counts import sample_counts
from megatron3d.config.serialize import as_table
from megatron3d.train.launch import RunContext, run_main
from megatron3d.train.settle import settle_run


def main(context: RunContext) -> None:
    """The story of a run."""
    # What the user wants: all problems are found here, before a process group or a device exists.
    is_first = context.launch.rank == 0
    context.save = save_directory(sys.argv[1:])
    command = read_command(
        sys.argv[1:], program="pretrain_gpt.py", description="Pretrain a GPT.", log=print if is_first else silent
    )
    config, vocabulary = settle_run(command, context.launch.world_size)
    if is_first:
        print(as_table(config))

    # The rest needs torch, whose import takes seconds: a mistake above is answered without it.
    from megatron3d.data.build import build_data
    from megatron3d.data.curriculum.build import RunLength, with_curriculum
    from megatron3d.models.zoo import architecture_of
    from megatron3d.train.joining import joined
    from megatron3d.train.loop import open_streams, train
    from megatron3d.train.matmul import with_matmul
    from megatron3d.train.setup import build_parts
    from megatron3d.train.stopping import stop_while_starting

    # Where it runs. From here on a stop that a signal asks for is made by every rank at the same point.
    with joined(config, context, save=config.checkpoint.save) as (mesh, device):
        # Which tokens: every rank opens the same files and reads its own part.
        given = {"tokenizer": vocabulary.tokenizer, "eod_token": vocabulary.eod_token}
        counts = sample_counts(config.data, config.train, config.parallel.data_parallel_size)
        data = build_data(config.data, config.model, **given, counts=counts)
        length = RunLength(config.train, config.parallel.data_parallel_size)
        data = with_curriculum(data, config.curriculum, config.data, length, vocab_size=config.model.vocab_size)
        if is_first:
            print("\n".join(data.notes), end="\n" if data.notes else "")
        stop_while_starting(context, mesh)

        # Which layers: this rank's stage, its flat buffers, its part of the optimizer.
        config = with_matmul(config, mesh, device)
        parts = build_parts(config, mesh, device, architecture_of(config.model).build_stage)

        # Steps, evaluations and checkpoints, from the latest checkpoint to the end.
        with open_streams(data, config.data) as streams:
            train(parts, streams, context)


def silent(line: str) -> None:
    """Keep to oneself what rank 0 says already."""


if __name__ == "__main__":
    run_main(main, stoppable=True)
