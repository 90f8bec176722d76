"""From the words of a command line to a fine-tuning that can start: everything is read and checked before a device is.

The options of layout, optimizer and checkpoints are those of `pretrain_bert.py`; the shape of the model is not an
option but comes with the weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import lcm
from pathlib import Path

from megatron3d.comm.device import likely_device_type
from megatron3d.config.check import resolve
from megatron3d.config.cli import parse_args
from megatron3d.config.data import DataConfig
from megatron3d.config.derive import model_parallel_size
from megatron3d.config.options import OPTIONS
from megatron3d.config.run import RunConfig
from megatron3d.data.tokenizer import Tokenizer, TokenizerSpec
from megatron3d.errors import ConfigError, DataError
from megatron3d.tasks.glue.encode import Encoded, encode
from megatron3d.tasks.glue.finetune import TaskData
from megatron3d.tasks.glue.metrics import require_libraries
from megatron3d.tasks.glue.order import num_batches
from megatron3d.tasks.glue.read import Rows, distinct_labels, read_rows
from megatron3d.tasks.glue.tasks import CUSTOM, CustomColumns, Task, custom_task, find_task
from megatron3d.tasks.glue.weights import Origin, new_prefixes, open_checkpoint, open_hf

_PADDED_VOCABULARY = 128  # a model may have fewer than this many rows beyond its tokens, for speed
_SHORTEST = 8  # tokens; a pair needs three special ones and some of its own
_FROM_ELSEWHERE = {
    "train_iters": "--epochs",
    "train_samples": "--epochs",
    "rampup_batch_size": "--global-batch-size",
    "step_batch_size_schedule": "--global-batch-size",
    "data_path": "--data-dir",
    "train_data_path": "--data-dir, or --train-file with --task tsv",
    "mock_data": "--data-dir",
    "finetune": "--load, which takes the weights alone anyway",
}


@dataclass(frozen=True)
class Job:
    """A fine-tuning that is settled: the run for each seed, and what goes into it."""

    task: Task
    origin: Origin
    runs: tuple[RunConfig, ...]
    data: TaskData
    epochs: int
    multiple: int
    predict: Path | None
    notes: tuple[str, ...]


def settle(args: argparse.Namespace, other_words: Sequence[str], world_size: int, *, say: Callable[[str], None]) -> Job:
    """Read files, weights' shapes and options, and find what is wrong with them.

    Args:
        args: the task's own options, see `tools/finetune_glue.py`.
        other_words: the options of pretraining.
        world_size: ranks of the job.
        say: takes lines about options without effect.

    Raises:
        ConfigError, DataError, CheckpointError: an option, a file or the weights cannot be used.
    """
    require_libraries()
    words = parse_args(
        other_words, program="finetune_glue.py", description="Fine-tune a BERT.", say=say, architecture="bert"
    )
    _refuse_foreign_options(words)
    task, folder = _task_and_folder(args)
    origin = _origin(args, words)
    max_length = _max_length(args.max_seq_length, origin)
    data_options, tokenizer = _tokenizer(words.data, origin)
    rows = _read(args, task, folder)
    data = TaskData(
        train=encode(rows.train, tokenizer, max_length=max_length) if rows.train else None,
        dev={ending: encode(one, tokenizer, max_length=max_length) for ending, one in rows.dev.items()},
        test={name: encode(one, tokenizer, max_length=max_length) for name, one in rows.test.items()},
    )
    options = replace(data_options, train_data_path=(str(rows.train.path if rows.train else folder),))
    runs = tuple(
        _run(args, words, origin, data, replace(options, seed=seed), world_size) for seed in _seeds(args, words)
    )
    parallel = runs[0].parallel
    padded = args.pad_to_multiple_of or (1 if likely_device_type(parallel.device) == "cpu" else 8)
    return Job(
        task=task,
        origin=origin,
        runs=tuple(replace(run, model=replace(run.model, seq_length=max_length)) for run in runs),
        data=data,
        epochs=args.epochs,
        multiple=lcm(padded, parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1),
        predict=None if args.predict is None else Path(args.predict),
        notes=_notes(rows, data, origin, task, max_length),
    )


def _refuse_foreign_options(words: RunConfig) -> None:
    """Options of the model's shape, and those that other options stand for here."""
    problems = []
    for option in OPTIONS:
        value = option.value_in(words)
        if option.name in _FROM_ELSEWHERE and value not in (None, (), False):
            problems.append(f"{option.spelling} is not for fine-tuning; use {_FROM_ELSEWHERE[option.name]}.")
        elif option.section == "model" and option.name != "architecture" and value != option.default:
            problems.append(f"{option.spelling} {value}: the model comes with --load or --hf; leave the option out.")
    if problems:
        raise ConfigError("\n".join(problems))


def _task_and_folder(args: argparse.Namespace) -> tuple[Task, Path]:
    """The task, and where its files are."""
    own = {
        "--train-file": args.train_file,
        "--dev-file": args.dev_file,
        "--test-file": args.test_file,
        "--labels": args.labels,
        "--metric": args.metric,
        "--regression": args.regression,
        "--second-text-column": args.second_text_column,
    }
    if args.task != CUSTOM:
        given = [flag for flag, value in own.items() if value]
        if given:
            raise ConfigError(f"{given[0]} belongs to --task {CUSTOM}; leave it out with --task {args.task}.")
        task = find_task(args.task)
        if args.data_dir is None:
            raise ConfigError(f"--task {task.name} needs --data-dir, the folder of its TSV files; give it.")
        return task, _folder(Path(args.data_dir), task)
    if args.dev_file is None or (args.epochs > 0 and args.train_file is None):
        missing = "--dev-file" if args.dev_file is None else "--train-file"
        raise ConfigError(f"--task {CUSTOM} needs {missing}; give the path of a TSV file with a header line.")
    texts = tuple(filter(None, (args.text_column, args.second_text_column)))
    labels = tuple(args.labels or ())
    if not labels and not args.regression:
        labels = distinct_labels(Path(args.train_file or args.dev_file), args.label_column)
    columns = CustomColumns(texts, args.label_column, labels, args.regression, tuple(args.metric or ()))
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


def _origin(args: argparse.Namespace, words: RunConfig) -> Origin:
    load = words.checkpoint.load
    if (load is None) == (args.hf is None):
        state = "neither is given" if load is None else "both are given"
        raise ConfigError(
            f"--load CHECKPOINT or --hf DIRECTORY says which model is fine-tuned, and {state}; give one of them."
        )
    origin = open_hf(args.hf) if load is None else open_checkpoint(load, words.checkpoint.ckpt_step)
    if args.keep_classifier and "head.classifier.weight" not in origin.names:
        raise ConfigError(f"--keep-classifier: {origin.path} has no classifier; leave the option out.")
    return replace(origin, keeps_classifier=args.keep_classifier)


def _max_length(wanted: int, origin: Origin) -> int:
    positions = origin.model.max_position_embeddings
    learned = origin.model.position_embedding_type == "learned_absolute"
    if learned and wanted > positions:
        raise ConfigError(
            f"--max-seq-length {wanted} is longer than the {positions} positions of the model in {origin.path}; use "
            f"--max-seq-length {positions}, or a model with more positions."
        )
    if wanted < _SHORTEST:
        raise ConfigError(f"--max-seq-length {wanted} leaves no room for a text; use at least {_SHORTEST}.")
    return wanted


def _tokenizer(words: DataConfig, origin: Origin) -> tuple[DataConfig, Tokenizer]:
    """The tokenizer that the options name, else the one that the weights were trained with."""
    named = ("tokenizer_type", "vocab_file", "merge_file", "tokenizer_model")
    given = {name: vars(words)[name] for name in named if vars(words)[name] is not None}
    if given.get("vocab_file") and "tokenizer_type" not in given:
        own = origin.data.tokenizer_type or ""
        given["tokenizer_type"] = own if own.startswith("BertWordPiece") else "BertWordPieceLowerCase"
    options = replace(words, **(given or {name: vars(origin.data)[name] for name in named}))
    if options.tokenizer_type is None:
        raise ConfigError(f"{origin.path} names no tokenizer; give --vocab-file, the vocab.txt it was trained with.")
    files = (options.vocab_file, options.merge_file, options.tokenizer_model)
    tokenizer = TokenizerSpec(options.tokenizer_type, *files, vocab_size=origin.model.vocab_size).build()
    here, there = tokenizer.vocab_size, origin.model.vocab_size
    if not here <= there < here + _PADDED_VOCABULARY:
        raise ConfigError(
            f"the vocabulary {next(filter(None, files))} has {here} tokens, but the model in {origin.path} was trained "
            f"with {there}; give the vocabulary of the model with --vocab-file."
        )
    return options, tokenizer


@dataclass(frozen=True)
class _Files:
    train: Rows | None
    dev: dict[str, Rows]
    test: dict[str, Rows]


def _read(args: argparse.Namespace, task: Task, folder: Path) -> _Files:
    skip = {"skip_bad_rows": args.skip_bad_rows}
    if args.epochs < 0:
        raise ConfigError(f"--epochs {args.epochs} is below 0; use 0 to measure only, or at least 1.")
    if task.name == CUSTOM and args.predict is not None and not task.test:
        raise ConfigError(f"--predict {args.predict} needs --test-file, the texts to be labelled; give it.")
    train = read_rows(folder / task.train, task, labelled=True, **skip) if args.epochs else None
    dev = {ending: read_rows(folder / name, task, labelled=True, **skip) for ending, name in task.dev.items()}
    test = {}
    if args.predict is not None:
        # The diagnostic set belongs to another download and is optional.
        wanted = {name: folder / file for name, file in task.test.items() if name != "AX" or (folder / file).is_file()}
        test = {name: read_rows(path, task, labelled=False) for name, path in wanted.items()}
    return _Files(train, dev, test)


def _seeds(args: argparse.Namespace, words: RunConfig) -> tuple[int, ...]:
    if args.seeds is None:
        return (words.data.seed,)
    if len(set(args.seeds)) < len(args.seeds):
        raise ConfigError(f"--seeds {' '.join(map(str, args.seeds))} names a seed twice; give different ones.")
    return tuple(args.seeds)


def _run(
    args: argparse.Namespace, words: RunConfig, origin: Origin, data: TaskData, options: DataConfig, world_size: int
) -> RunConfig:
    """The whole run of one seed."""
    rates = {"hidden_dropout": args.hidden_dropout, "attention_dropout": args.attention_dropout}
    model = replace(origin.model, seq_length=args.max_seq_length, **{n: v for n, v in rates.items() if v is not None})
    train, optim, checkpoint = words.train, words.optim, words.checkpoint
    dp = max(1, world_size // model_parallel_size(words.parallel))
    batch = train.global_batch_size or (train.micro_batch_size or 0) * dp or 32
    stages = words.parallel.pipeline_model_parallel_size
    micro = train.micro_batch_size or max(1, batch // (dp * stages if batch % (dp * stages) == 0 else dp))
    num_train = len(data.train) if data.train else 1
    iterations = max(1, args.epochs * num_batches(num_train, batch))
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
    return resolve(
        replace(words, model=model, train=train, optim=optim, data=options, checkpoint=checkpoint), world_size
    )


def _notes(rows: _Files, data: TaskData, origin: Origin, task: Task, max_length: int) -> tuple[str, ...]:
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


def _mean_length(samples: Encoded) -> float:
    return float(samples.lengths_N.mean())
