"""Samples per second of fine-tuning, as a ratio to transformers' Trainer on the same samples.

    python tools/bench/finetune.py --task sst-2 --data-dir glue/SST-2 --hf DIR --steps 200 --rounds 2

Both fine-tune the same weights in fp32 on the same samples, each once a turn: batches of near-equal length (the
Trainer's own grouping by length, ours by `tasks/glue/order.py`), padded to their longest, dropout, AdamW, clipping,
linear decay. They take turns, so that a machine whose speed drifts is fair to both; the figure to quote is the median
of the ratios of the rounds. One process, the same threads for both. Loading, tokenizing and start-up are not counted.
The Trainer groups by length within a quarter of the samples, at most 50 batches: with fewer than 200 steps its groups
are smaller, and its padding larger, than on a whole training file. The padding of both is printed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.errors import ConfigError, Megatron3dError
from megatron3d.models.bert_classifier import build_bert_classifier_stage
from megatron3d.tasks.glue.command import read_task_command
from megatron3d.tasks.glue.encode import Encoded
from megatron3d.tasks.glue.job import Job, settle
from megatron3d.tasks.glue.order import padded_share, training_steps
from megatron3d.tasks.glue.weights import fill
from megatron3d.train.setup import build_parts
from megatron3d.train.step import Rates, train_step

SEED = 1234


@dataclass(frozen=True)
class Turn:
    """What one turn took, and the share of its positions that were padding."""

    elapsed_s: float
    padding: float


TakeTurn = Callable[[int], Turn]  # trains for so many steps


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description="Fine-tuning beside transformers' Trainer.", allow_abbrev=False)
    p.add_argument("--task", default="sst-2", help="a GLUE task (default sst-2)")
    p.add_argument("--data-dir", required=True, help="folder of its TSV files")
    p.add_argument("--hf", required=True, help="directory of a Hugging Face BERT")
    p.add_argument("--batch-size", type=int, default=32, help="samples of a step (default 32)")
    p.add_argument("--steps", type=int, default=200, help="steps of a turn (default 200)")
    p.add_argument("--rounds", type=int, default=2, help="turns of each (default 2)")
    p.add_argument("--warmup-steps", type=int, default=5, help="steps of each before the first turn (default 5)")
    p.add_argument("--lr", type=float, default=2e-5, help="default 2e-5")
    p.add_argument("--max-seq-length", type=int, default=128, help="default 128")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; the last line is JSON."""
    args = parser().parse_args(argv)
    try:
        found = measure(args)
    except Megatron3dError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    for name, rate in found["samples_per_second"].items():
        print(f"{name:12s} {rate:8.1f} samples/s")
    print(f"megatron3d / transformers: median {found['median_ratio']:.3f} of {len(found['ratios'])} rounds")
    print(json.dumps(found))
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All turns; rates in samples per second."""
    job = settled(args)
    take = {"megatron3d": our_turns(args, job), "transformers": their_turns(args, job)}
    for one in take.values():
        one(args.warmup_steps)
    rates: dict[str, list[float]] = {name: [] for name in take}
    for _ in range(args.rounds):
        for name, one in take.items():
            turn = one(args.steps)
            rates[name].append(args.steps * args.batch_size / turn.elapsed_s)
            line = f"{name:12s} {rates[name][-1]:8.1f} samples/s, {turn.padding:.1%} of positions are padding"
            print(line, file=sys.stderr, flush=True)
    ratios = [ours / theirs for ours, theirs in zip(rates["megatron3d"], rates["transformers"])]
    return {
        "task": job.task.name,
        "batch_size": args.batch_size,
        "steps": args.steps,
        "threads": torch.get_num_threads(),
        "samples_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "ratios": ratios,
        "median_ratio": statistics.median(ratios),
    }


def settled(args: argparse.Namespace) -> Job:
    """The fine-tuning as tools/finetune_glue.py settles it."""
    words = ["--task", args.task, "--data-dir", args.data_dir, "--hf", args.hf, "--epochs", "1", "--lr", str(args.lr)]
    words += ["--global-batch-size", str(args.batch_size), "--max-seq-length", str(args.max_seq_length)]
    words += ["--device", "cpu", "--seed", str(SEED)]
    return settle(read_task_command(words, 1, log=partial(print, file=sys.stderr)), 1)


def chosen(samples: Encoded, count: int) -> np.ndarray:
    """Numbers of `count` random samples of the training file, the same for both."""
    if count > len(samples):
        raise ConfigError(
            f"--steps times --batch-size is {count} samples and the training file has {len(samples)}; use fewer steps"
        )
    return np.random.default_rng(SEED).permutation(len(samples))[:count]


def our_turns(args: argparse.Namespace, job: Job) -> TakeTurn:
    """Our turns: the step of the tool, on batches in the tool's order."""
    builder = partial(build_bert_classifier_stage, num_outputs=job.task.num_outputs)
    parts = build_parts(job.runs[0], make_mesh(Layout()), torch.device("cpu"), builder)
    fill(parts, job.origin, job.task)
    samples = job.data.train
    assert samples is not None, "--epochs is 1"

    def take(steps: int) -> Turn:
        numbers = chosen(samples, steps * args.batch_size)
        lengths_N = samples.lengths_N[numbers]
        began_s = time.perf_counter()
        sizes = {"step_size": args.batch_size, "group_size": args.batch_size}
        planned = training_steps(lengths_N, **sizes, multiple=job.multiple, seed=SEED, epoch=0)
        for step, one in enumerate(planned):
            (batch,) = one.batches
            here = samples.batch(numbers[batch.indices_R], batch.weights_R, batch.length)
            train_step(parts, here, Rates(args.lr * (1 - step / steps), 0.01), step=step)
        return Turn(time.perf_counter() - began_s, padded_share(planned, lengths_N))

    return take


def their_turns(args: argparse.Namespace, job: Job) -> TakeTurn:
    """Turns of the Trainer.

    Raises:
        ConfigError: transformers, or accelerate, which its Trainer needs, is not installed.
    """
    try:
        importlib.import_module("accelerate")
        from transformers import (
            AutoTokenizer,
            BertForSequenceClassification,
            DataCollatorWithPadding,
            PrinterCallback,
            Trainer,
        )
    except ImportError as error:
        raise ConfigError(
            f"transformers' Trainer needs {error.name}, which is not installed; run: "
            f"{sys.executable} -m pip install transformers accelerate"
        ) from error
    samples = job.data.train
    assert samples is not None, "--epochs is 1"
    model = BertForSequenceClassification.from_pretrained(args.hf, num_labels=job.task.num_outputs)
    collate = DataCollatorWithPadding(AutoTokenizer.from_pretrained(args.hf))

    def take(steps: int) -> Turn:
        rows = [_row(samples, int(number)) for number in chosen(samples, steps * args.batch_size)]
        positions: list[int] = []

        def counted(batch_rows: list[dict[str, Any]]) -> Any:
            batch = collate(batch_rows)
            positions.append(batch["attention_mask"].numel())
            return batch

        clock = _clock()
        trainer = Trainer(
            model=model,
            args=_arguments(args, steps),
            train_dataset=rows,
            data_collator=counted,
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return Turn(clock.elapsed_s, 1 - sum(len(row["input_ids"]) for row in rows) / sum(positions))

    return take


def _row(samples: Encoded, number: int) -> dict[str, Any]:
    """A sample as transformers' tokenizer gives it."""
    begin, end = (int(place) for place in samples.starts[number : number + 2])
    first = int(samples.first_lengths_N[number])
    assert samples.labels_N is not None, "the training file has labels"
    return {
        "input_ids": samples.tokens_T[begin:end].tolist(),
        "token_type_ids": [0] * first + [1] * (end - begin - first),
        "attention_mask": [1] * (end - begin),
        "label": samples.labels_N[number].item(),
    }


def _arguments(args: argparse.Namespace, steps: int) -> Any:
    """One epoch of `steps` steps, grouped by length, with nothing written or measured."""
    from transformers import TrainingArguments

    names = {field.name for field in fields(TrainingArguments)}
    is_new = "train_sampling_strategy" in names  # transformers 5 has this for group_by_length
    grouped: dict[str, Any] = {"train_sampling_strategy": "group_by_length"} if is_new else {"group_by_length": True}
    return TrainingArguments(
        **grouped,
        max_steps=steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.lr,
        weight_decay=0.01,
        max_grad_norm=1.0,
        lr_scheduler_type="linear",
        optim="adamw_torch_fused",
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=SEED,
    )


def _clock() -> Any:
    """A callback that takes the time from the begin of the epoch to the end of its last step."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        began_s = elapsed_s = 0.0

        def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began_s = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.elapsed_s = time.perf_counter() - self.began_s

    return Clock()


if __name__ == "__main__":
    sys.exit(main())
