"""From the words of a command line to a fine-tuning that can start: everything is read and checked before a device is.

The options of layout, optimizer and checkpoints are those of `pretrain_bert.py`; the shape of the model is not an
option but comes with the weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import lcm
from pathlib import Path

from megatron3d.comm.device import likely_device_type
from megatron3d.config.check import resolve
from megatron3d.config.derive import model_parallel_size
from megatron3d.config.run import GivenRun, RunConfig
from megatron3d.config.sections.checkpoint import CheckpointConfig
from megatron3d.config.sections.data import DataConfig
from megatron3d.config.sections.parallel import GivenParallel, ParallelConfig
from megatron3d.config.sections.train import TrainConfig
from megatron3d.convert.hf import digest_of_tensors
from megatron3d.data.tokenizer import Tokenizer
from megatron3d.errors import ConfigError, DataError
from megatron3d.tasks.glue.command import TaskCommand
from megatron3d.tasks.glue.encode import Encoded, encode
from megatron3d.tasks.glue.finetune import TaskData
from megatron3d.tasks.glue.metrics import require_libraries
from megatron3d.tasks.glue.options import columns_of
from megatron3d.tasks.glue.order import num_steps
from megatron3d.tasks.glue.read import SampleTable, distinct_labels, read_rows
from megatron3d.tasks.glue.tasks import CUSTOM, Task, custom_task, find_task
from megatron3d.tasks.glue.vocabulary import choose_tokenizer
from megatron3d.tasks.glue.weights import InitialWeights, new_prefixes, open_checkpoint, open_hf


@dataclass(frozen=True)
class Job:
    """A fine-tuning that is settled: the run for each seed, what goes into it, and `save`, where all of it is kept.

    `multiple`, `group_size`, `token_dropout`, `ema_decay` and `eval_interval` are those of `finetune.FinetuneSettings`.
    """

    task: Task
    origin: InitialWeights
    runs: tuple[RunConfig, ...]
    data: TaskData
    epochs: int
    multiple: int
    group_size: int
    token_dropout: float
    ema_decay: float | None
    eval_interval: int | None
    predict: Path | None
    save: str | None
    notes: tuple[str, ...]

    def files(self) -> dict[str, str]:
        """Digests of what was read, which all ranks must have alike; loading compares a checkpoint's weights."""
        data, own = self.data, {"epochs": str(self.epochs), "batches": str((self.multiple, self.group_size))}
        found = {"the training file": "none" if data.train is None else data.train.digest(), **own}
        found |= {f"the dev file{ending}": one.digest() for ending, one in data.dev.items()}
        found |= {f"the test file {name}": one.digest() for name, one in data.test.items()}
        tensors = self.origin.tensors
        return found if tensors is None else {**found, "the weights": digest_of_tensors(tensors)}


def settle(command: TaskCommand, world_size: int) -> Job:
    """Read files, weights' shapes and options, and find what is wrong with them.

    Args:
        command: the options.
        world_size: ranks of the job.

    Raises:
        ConfigError, DataError, CheckpointError: an option, a file or the weights cannot be used.
    """
    require_libraries()
    args, given = command.args, command.run
    origin = _origin(args, given.data.tokenizer_type, given.checkpoint)
    task, folder = _task_and_folder(args, origin)
    _check_classifier(args, origin, task)
    multiple = _multiple(args, given.parallel)
    max_length = _max_length(args.max_seq_length, origin, multiple)
    data_options, tokenizer = choose_tokenizer(given.data, origin, override=args.override_tokenizer)
    rows = _read(args, task, folder)
    data = TaskData(
        train=encode(rows.train, tokenizer, max_length=max_length) if rows.train else None,
        dev={ending: encode(one, tokenizer, max_length=max_length) for ending, one in rows.dev.items()},
        test={name: encode(one, tokenizer, max_length=max_length) for name, one in rows.test.items()},
        dev_digests={ending: one.digest() for ending, one in rows.dev.items()},
    )
    options = replace(data_options, train_data_path=(str(rows.train.path if rows.train else folder),))
    seeds = args.seeds or (given.data.seed,)
    runs = tuple(_run(args, given, origin, data, replace(options, seed=seed), world_size) for seed in seeds)
    return Job(
        task=task,
        origin=origin,
        runs=runs,
        data=data,
        epochs=args.epochs,
        multiple=multiple,
        group_size=_group_size(args, runs[0].train.global_batch_size),
        token_dropout=_token_dropout(args, tokenizer),
        ema_decay=args.ema_decay,
        eval_interval=args.eval_interval,
        predict=None if args.predict is None else _writable(Path(args.predict)),
        save=given.checkpoint.save,
        notes=(
            *_notes(rows, data, origin, task, max_length),
            *_without_effect(args, runs[0].train.train_iters, task, data),
        ),
    )


def _multiple(args: argparse.Namespace, parallel: GivenParallel) -> int:
    """What the length of a batch is a multiple of: as asked for, and so that sequence parallelism can cut it."""
    padded = args.pad_to_multiple_of or (1 if likely_device_type(parallel.device) == "cpu" else 8)
    return lcm(padded, parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)


def _group_size(args: argparse.Namespace, step_size: int) -> int:
    """Samples of near-equal length that stay together in a step."""
    group = step_size if args.length_group_size is None else args.length_group_size
    if group < 1 or step_size % group:
        raise ConfigError(
            f"--length-group-size {group} does not divide --global-batch-size {step_size}, of whose samples it is a "
            "part; use a divisor."
        )
    return group


def _token_dropout(args: argparse.Namespace, tokenizer: Tokenizer) -> float:
    """The probability with which tokens of training samples are hidden."""
    if args.token_dropout > 0 and tokenizer.mask is None:
        raise ConfigError(
            f"--token-dropout {args.token_dropout:g} hides tokens behind [MASK], which the tokenizer does not have; "
            "leave the option out."
        )
    return args.token_dropout


def _check_micro_batches(train: TrainConfig, parallel: ParallelConfig, group: int) -> None:
    """Refuse micro-batches that do not lie within one group, on each rank."""
    micro, dp = train.micro_batch_size, parallel.data_parallel_size
    if group % (micro * dp):
        ranks = f" on each of {dp} data-parallel ranks" if dp > 1 else ""
        raise ConfigError(
            f"--length-group-size {group} does not split into micro-batches of --micro-batch-size {micro}{ranks}, "
            f"so that some would mix lengths; use a multiple of {micro * dp}, or a smaller --micro-batch-size."
        )


def _writable(folder: Path) -> Path:
    """Make the folder of the predictions now, and not after an hour of training."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--predict {folder} cannot be made ({error.strerror}); give another directory.") from error
    return folder


def _task_and_folder(args: argparse.Namespace, origin: InitialWeights) -> tuple[Task, Path]:
    """The task, and where its files are."""
    if args.task != CUSTOM:
        task = find_task(args.task)
        return task, _folder(Path(args.data_dir), task)
    labels = tuple(args.labels or ())
    if not labels and not args.regression and not args.epochs:
        labels = tuple((origin.task or {}).get("labels", ()))
    if not labels and not args.regression:
        labels = distinct_labels(Path(args.train_file or args.dev_file), args.label_column)
    columns = columns_of(args, labels)
    return custom_task(columns, train=args.train_file, dev=args.dev_file, test=args.test_file), Path()


def _folder(given: Path, task: Task) -> Path:
    """The folder itself, or that of the task in the folder of all tasks."""
    for folder in (given, given / task.folder):
        if any((folder / name).is_file() for name in (task.train, *task.dev.values())):
            return folder
    expected = ", ".join((task.train, *task.dev.values()))
    raise DataError(
        f"--data-dir {given} has none of {expected}, neither itself nor in a folder {task.folder}; give the folder of "
        "the official files"
    )


def _origin(args: argparse.Namespace, tokenizer_type: str | None, checkpoint: CheckpointConfig) -> InitialWeights:
    load = checkpoint.load
    if load is None:
        origin = open_hf(args.hf, needs_tokenizer=tokenizer_type is None)
    else:
        origin = open_checkpoint(load, checkpoint.ckpt_step)
    if args.keep_classifier and origin.num_outputs is None:
        raise ConfigError(f"--keep-classifier: {origin.path} has no classifier; leave the option out.")
    return replace(origin, keeps_classifier=args.keep_classifier)


def _check_classifier(args: argparse.Namespace, origin: InitialWeights, task: Task) -> None:
    """A classifier that is kept must fit, and one that is measured only must be there."""
    if args.keep_classifier and origin.num_outputs != task.num_outputs:
        raise ConfigError(
            f"--keep-classifier: the classifier in {origin.path} has {origin.num_outputs} outputs, and --task "
            f"{task.name} needs {task.num_outputs}; leave the option out for a new one."
        )
    if args.epochs == 0 and not origin.is_of(task):
        has = "has no classifier" if origin.num_outputs is None else "has a classifier of another task"
        raise ConfigError(
            f"--epochs 0 measures what is loaded, and {origin.path} {has}, so that nothing of --task {task.name} would "
            "be measured; give a checkpoint fine-tuned on it, --keep-classifier where its classifier is one of this "
            "task, or --epochs 1 and more."
        )


def _max_length(wanted: int, origin: InitialWeights, multiple: int) -> int:
    """Tokens that samples are cut to; the batch they are in, padded to a multiple, must have its positions."""
    positions = origin.model.max_position_embeddings
    ends = origin.model.position_embedding_type != "none"
    longest = positions - positions % multiple
    if ends and wanted > longest:
        padded = f", whole batches of which are a multiple of {multiple} long" if multiple > 1 else ""
        raise ConfigError(
            f"--max-seq-length {wanted} is longer than the {positions} positions of the model in {origin.path} allow"
            f"{padded}; use --max-seq-length {longest}, or a model with more positions."
        )
    return wanted


@dataclass(frozen=True)
class _Files:
    train: SampleTable | None
    dev: dict[str, SampleTable]
    test: dict[str, SampleTable]


def _read(args: argparse.Namespace, task: Task, folder: Path) -> _Files:
    skip = {"skip_bad_rows": args.skip_bad_rows}
    train = read_rows(folder / task.train, task, labelled=True, **skip) if args.epochs else None
    dev = {ending: read_rows(folder / name, task, labelled=True, **skip) for ending, name in task.dev.items()}
    test = {}
    if args.predict is not None:
        # The diagnostic set belongs to another download and is optional.
        wanted = {name: folder / file for name, file in task.test.items() if name != "AX" or (folder / file).is_file()}
        test = {name: read_rows(path, task, labelled=False) for name, path in wanted.items()}
    return _Files(train, dev, test)


def _run(
    args: argparse.Namespace,
    given: GivenRun,
    origin: InitialWeights,
    data: TaskData,
    options: DataConfig,
    world_size: int,
) -> RunConfig:
    """The whole run of one seed."""
    rates = {"hidden_dropout": args.hidden_dropout, "attention_dropout": args.attention_dropout}
    model = replace(origin.model, seq_length=args.max_seq_length, **{n: v for n, v in rates.items() if v is not None})
    train, optim, checkpoint = given.train, given.optim, given.checkpoint
    dp = max(1, world_size // model_parallel_size(given.parallel))
    batch = train.global_batch_size or (train.micro_batch_size or 0) * dp or 32
    stages = given.parallel.pipeline_model_parallel_size
    group = _group_size(args, batch)
    micro = train.micro_batch_size or max(1, group // (dp * stages if group % (dp * stages) == 0 else dp))
    num_train = len(data.train) if data.train else 1
    iterations = max(1, args.epochs * num_steps(num_train, batch))
    if optim.lr is None and not args.epochs:
        optim = replace(optim, lr=0.0)
    if optim.lr_warmup_fraction is None and not optim.lr_warmup_iters:
        optim = replace(optim, lr_warmup_fraction=0.1)
    several = args.seeds is not None and len(args.seeds) > 1
    save = checkpoint.save
    if save is not None:
        save = str(Path(save) / f"seed-{options.seed}") if several else save
        checkpoint = replace(checkpoint, save=save, keep_last=1)
    metrics_file = train.metrics_file
    if metrics_file is not None and several:
        path = Path(metrics_file)
        metrics_file = str(path.with_name(f"{path.stem}-seed-{options.seed}{path.suffix}"))
    train = replace(
        train, global_batch_size=batch, micro_batch_size=micro, train_iters=iterations, metrics_file=metrics_file
    )
    run = resolve(
        replace(given, model=model, train=train, optim=optim, data=options, checkpoint=checkpoint), world_size
    )
    _check_micro_batches(run.train, run.parallel, group)
    return run


def _notes(rows: _Files, data: TaskData, origin: InitialWeights, task: Task, max_length: int) -> tuple[str, ...]:
    notes = []
    read = [*([(rows.train, data.train)] if rows.train else []), *((rows.dev[e], data.dev[e]) for e in rows.dev)]
    read += [(rows.test[name], data.test[name]) for name in rows.test]
    for file, samples in read:
        cut = f", {samples.num_cut} of them cut to {max_length} tokens" if samples.num_cut else ""
        notes.append(f"{file.path}: {len(samples)} samples{cut}, {_mean_length(samples):.1f} tokens on average")
        notes += [f"left out: {problem}" for problem in file.skipped]
    fresh = [prefix.strip(".") for prefix in new_prefixes(origin, task)]
    notes.append(f"starting from {origin.path}{', with a new ' + ' and '.join(fresh) if fresh else ''}")
    return tuple(notes)


def _without_effect(args: argparse.Namespace, steps: int | None, task: Task, data: TaskData) -> Iterator[str]:
    """Lines about what is asked for and will not come."""
    if args.eval_interval is not None and steps is not None and args.eval_interval >= steps:
        yield f"--eval-interval {args.eval_interval} adds nothing: there are {steps} steps, measured after each epoch"
    missing = [name for name in task.test if name not in data.test] if args.predict is not None else []
    if missing:
        yield f"--predict writes nothing for {', '.join(missing)}: {task.test[missing[0]]} is not there"


def _mean_length(samples: Encoded) -> float:
    return float(samples.lengths_N.mean())
