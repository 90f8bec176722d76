"""The options of a fine-tuning: its own, which of those of pretraining it takes, and what is said to the others."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from megatron3d.config.options import OPTIONS
from megatron3d.config.run import GivenRun
from megatron3d.errors import ConfigError
from megatron3d.tasks.glue.tasks import CUSTOM, GLUE_TASKS, METRICS, CustomColumns, custom_task, find_task

_SHORTEST = 8  # tokens; a pair needs three special ones and some of its own

# Of these sections of the options of pretraining, what fine-tuning takes; others would be without effect.
_TAKEN = {
    "train": {
        *("micro_batch_size", "global_batch_size", "log_interval", "metrics_file", "peak_tflops", "freeze_params"),
        *("recompute_granularity", "recompute_activations", "recompute_method", "recompute_num_layers"),
    },
    "lengths": set(),
    "data": {"tokenizer_type", "tokenizer_model", "vocab_file", "merge_file", "seed"},
    "curriculum": set(),
    "checkpoint": {"save", "load", "ckpt_step"},
}
# Options that something of the task stands for.
INSTEAD = {
    "train_iters": "use --epochs",
    "train_samples": "use --epochs",
    "train_tokens": "use --epochs",
    "rampup_batch_size": "use --global-batch-size",
    "step_batch_size_schedule": "use --global-batch-size",
    "tensorboard_dir": "use --metrics-file",
    "wandb_project": "use --metrics-file",
    "data_path": "use --data-dir",
    "train_data_path": "use --data-dir, or --train-file with --task tsv",
    "mock_data": "use --data-dir",
    "seq_length": "use --max-seq-length",
    "context_parallel_size": "texts of a task are short; use --tensor-model-parallel-size, or data-parallel ranks",
    "finetune": "the weights alone are taken from --load anyway; leave the option out",
}

# Left out before the options are read, since it would replace others by what the user never wrote.
UNREAD = {"--use-checkpoint-args": "the options of the model come with --load or --hf anyway; leave the option out"}


def task_parser() -> argparse.ArgumentParser:
    """The parser of the task's own options; what it leaves over are those of pretraining.

    It raises argparse.ArgumentError for a value that it cannot read, and neither prints nor exits.
    """
    p = argparse.ArgumentParser(
        exit_on_error=False,
        description="Fine-tune a BERT on a task of GLUE or on TSV files of your own.",
        epilog="All other options are those of pretrain_bert.py: see its --help, and docs/glue.md.",
        allow_abbrev=False,
    )
    p.add_argument("--task", metavar="NAME", help=f"{', '.join(GLUE_TASKS)}, or {CUSTOM} for your files")
    p.add_argument("--data-dir", metavar="DIR", help="folder of the official TSV files, or the one it is in")
    p.add_argument("--hf", metavar="DIR", help="start from a Hugging Face directory (or from --load CHECKPOINT)")
    p.add_argument(
        "--override-tokenizer", action="store_true", help="use files with other content than the model was trained with"
    )
    p.add_argument("--keep-classifier", action="store_true", help="the classifier there is one of this task: keep it")
    p.add_argument("--epochs", type=int, default=3, metavar="N", help="default 3; 0 measures what was loaded")
    p.add_argument(
        "--ema-decay",
        type=float,
        metavar="D",
        help="measure and keep an exponential moving average of the weights, with this decay a step (say 0.997)",
    )
    p.add_argument("--eval-interval", type=int, metavar="N", help="measure every N steps too, not only after an epoch")
    p.add_argument("--max-seq-length", type=int, default=128, metavar="N", help="cut samples to N tokens (default 128)")
    p.add_argument("--pad-to-multiple-of", type=int, metavar="N", help="length of batches (default 1 on a CPU, else 8)")
    p.add_argument(
        "--length-group-size",
        type=int,
        metavar="N",
        help="samples of near-equal length that stay together in a step (default --global-batch-size: all of them)",
    )
    p.add_argument("--seeds", type=int, nargs="+", metavar="S", help="one fine-tuning for each seed, one after another")
    p.add_argument("--hidden-dropout", type=float, metavar="P", help="default the model's")
    p.add_argument("--attention-dropout", type=float, metavar="P", help="default the model's")
    p.add_argument(
        "--token-dropout",
        type=float,
        default=0.0,
        metavar="P",
        help="hide each token of the training samples behind [MASK] with probability P, others in every epoch",
    )
    p.add_argument("--predict", metavar="DIR", help="write the leaderboard's files for the test files there")
    p.add_argument("--skip-bad-rows", action="store_true", help="leave labelled rows with a problem out, and tell them")
    own = p.add_argument_group(f"with --task {CUSTOM}: TSV files with a header line")
    own.add_argument("--train-file", metavar="FILE")
    own.add_argument("--dev-file", metavar="FILE")
    own.add_argument("--test-file", metavar="FILE", help="texts without labels, for --predict")
    own.add_argument("--text-column", default="sentence", metavar="NAME", help="default sentence")
    own.add_argument("--second-text-column", metavar="NAME", help="for pairs")
    own.add_argument("--label-column", default="label", metavar="NAME", help="default label")
    own.add_argument("--labels", nargs="+", metavar="LABEL", help="default those of the training file, sorted")
    own.add_argument("--regression", action="store_true", help="labels are numbers to be learned as such")
    own.add_argument("--metric", nargs="+", choices=METRICS, metavar="NAME", help=", ".join(METRICS))
    return p


def option_problems(args: argparse.Namespace, given: GivenRun) -> list[str]:
    """Sentences about options of the model's shape, those that other options stand for here, and those without effect.

    Args:
        args: the task's own options.
        given: the options of pretraining as they were given.
    """
    problems = [*_problems_of_numbers(args, given), *_problems_of_origin(args, given), *_problems_of_task(args)]
    for option in OPTIONS:
        value = option.value_in(given)
        if value == option.default or option.name == "architecture":
            continue
        if given.checkpoint.use_checkpoint_args and option.section in ("model", "data"):
            continue  # perhaps the checkpoint's and not the user's: a config file may ask for that
        words = option.spelling if value is True else f"{option.spelling} {value}"
        if option.name in INSTEAD:
            problems.append(f"{words} is not for fine-tuning; {INSTEAD[option.name]}.")
        elif option.section == "model":
            problems.append(f"{words}: the model comes with --load or --hf; leave the option out.")
        elif option.section in _TAKEN and option.name not in _TAKEN[option.section]:
            problems.append(f"{words} has no effect on fine-tuning; leave the option out.")
    return problems


def unread_problems(words: Sequence[str]) -> list[str]:
    """Sentences about the flags in `UNREAD`."""
    return [f"{flag} is not for fine-tuning: {reason}." for flag, reason in UNREAD.items() if flag in words]


def _problems_of_numbers(args: argparse.Namespace, given: GivenRun) -> list[str]:
    problems = []
    if args.epochs < 0:
        problems.append(f"--epochs {args.epochs} is below 0; use 0 to measure only, or at least 1.")
    if args.epochs == 0 and given.checkpoint.save is not None:
        problems.append(
            f"--save {given.checkpoint.save} keeps what was learned, and --epochs 0 learns nothing; leave one out."
        )
    for name in ("length_group_size", "token_dropout", "ema_decay", "eval_interval") if args.epochs == 0 else ():
        if value := vars(args)[name]:
            problems.append(
                f"--{name.replace('_', '-')} {value} is for training, and --epochs 0 has none; leave it out."
            )
    if not 0 <= args.token_dropout < 1:
        problems.append(f"--token-dropout {args.token_dropout:g} is no probability below 1; use 0 to hide nothing.")
    if args.ema_decay is not None and not 0 < args.ema_decay < 1:
        problems.append(
            f"--ema-decay {args.ema_decay:g} is not between 0 and 1; use 0.99 to average over some 100 steps, 0.999 "
            "over some 1000, or leave it out."
        )
    if args.eval_interval is not None and args.eval_interval < 1:
        problems.append(
            f"--eval-interval {args.eval_interval} is below 1; give a number of steps, or leave it out to measure "
            "after each epoch alone."
        )
    if args.max_seq_length < _SHORTEST:
        problems.append(f"--max-seq-length {args.max_seq_length} leaves no room for a text; use at least {_SHORTEST}.")
    if args.seeds is not None and len(set(args.seeds)) < len(args.seeds):
        problems.append(f"--seeds {' '.join(map(str, args.seeds))} names a seed twice; give different ones.")
    if args.pad_to_multiple_of is not None and args.pad_to_multiple_of < 1:
        problems.append(f"--pad-to-multiple-of {args.pad_to_multiple_of} is below 1; use 1 for no such padding.")
    return problems


def _problems_of_origin(args: argparse.Namespace, given: GivenRun) -> Iterator[str]:
    load = given.checkpoint.load
    if (load is None) == (args.hf is None):
        state = "neither is given" if load is None else "both are given"
        yield f"--load CHECKPOINT or --hf DIRECTORY says which model is fine-tuned, and {state}; give one of them."


def _problems_of_task(args: argparse.Namespace) -> Iterator[str]:
    if args.task is None:
        yield f"--task is missing; give one of {', '.join(GLUE_TASKS)}, or {CUSTOM} for files of your own."
    elif args.task == CUSTOM:
        yield from _problems_of_own_files(args)
    else:
        own = ("train_file", "dev_file", "test_file", "labels", "metric", "regression", "second_text_column")
        given = [f"--{name.replace('_', '-')}" for name in own if vars(args)[name]]
        if given:
            verb = "belongs" if len(given) == 1 else "belong"
            yield f"{', '.join(given)} {verb} to --task {CUSTOM}; leave it out with --task {args.task}."
        try:
            name = find_task(args.task).name
        except ConfigError as error:
            yield str(error)
            return
        if args.data_dir is None:
            yield f"--task {name} needs --data-dir, the folder of its TSV files; give it."


def _problems_of_own_files(args: argparse.Namespace) -> Iterator[str]:
    needed = {"--dev-file": args.dev_file, "--train-file": args.train_file if args.epochs > 0 else ""}
    missing = [flag for flag, path in needed.items() if path is None]
    if missing:
        yield f"--task {CUSTOM} needs {' and '.join(missing)}; give the path of a TSV file with a header line."
    if args.predict is not None and args.test_file is None:
        yield f"--predict {args.predict} needs --test-file, the texts to be labelled; give it."
    try:
        custom_task(columns_of(args, args.labels or ()), train=args.train_file, dev="", test=args.test_file)
    except ConfigError as error:
        yield str(error)


def columns_of(args: argparse.Namespace, labels: Sequence[str]) -> CustomColumns:
    """The columns of the user's own files; `labels` are the classes, none in a regression."""
    texts = tuple(filter(None, (args.text_column, args.second_text_column)))
    return CustomColumns(texts, args.label_column, tuple(labels), args.regression, tuple(args.metric or ()))
