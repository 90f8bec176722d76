"""The command line of a fine-tuning: its own options and those of pretraining, with everything that is wrong with them.

Nothing here needs torch or reads a file of the task, so that mistakes are answered at once and together. What depends
on the weights or on the files is checked in `job.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from megatron3d.config.check import check
from megatron3d.config.cli import Command, read_command
from megatron3d.config.command_line import split_command_line
from megatron3d.config.foreign.flags import judge
from megatron3d.config.foreign.names import plain_name
from megatron3d.config.options import BY_SPELLING, OPTIONS
from megatron3d.config.rules.doubt import Doubt
from megatron3d.config.run import GivenRun
from megatron3d.errors import ConfigError
from megatron3d.tasks.glue.options import INSTEAD, UNREAD, option_problems, task_parser, unread_problems

# What transformers' example of this task calls the options.
_ELSEWHERE = {
    "task-name": "--task",
    "model-name-or-path": "--hf",
    "num-train-epochs": "--epochs",
    "validation-file": "--dev-file",
}
_NEAR = 0.8  # of difflib's ratio, between a slip and the option that was meant


@dataclass(frozen=True)
class TaskCommand:
    """What a command line asks for: the task's own options, and those of pretraining without what comes from files."""

    args: argparse.Namespace
    run: GivenRun


def read_task_command(argv: Sequence[str], world_size: int, *, log: Callable[[str], None]) -> TaskCommand:
    """Read the words behind the program's name; `--help` prints the options and exits.

    Args:
        argv: the given.
        world_size: ranks of the job.
        log: takes lines about options without effect.

    Raises:
        ConfigError: with every problem that the words alone show, one a line.
    """
    args, other_words, unreadable = _own_options(argv)
    other_words, misspelt = _without_misspelt(other_words, list(vars(args)))
    command = read_command(
        [word for word in other_words if word not in UNREAD],
        program="finetune_glue.py",
        description="Fine-tune a BERT.",
        log=log,
        architecture="bert",
    )
    own = [problem for problem in option_problems(args, command.run) if not any(flag in problem for flag in unreadable)]
    problems = [*unreadable.values(), *misspelt, *unread_problems(other_words), *command.problems, *own]
    problems += _problems_between_values(args, command, world_size)
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return TaskCommand(args, command.run)


def _own_options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str], dict[str, str]]:
    """The task's own options, the other words, and a sentence for each own option whose value cannot be read."""
    problems: dict[str, str] = {}
    words = list(argv)
    while True:
        try:
            return *task_parser().parse_known_args(words), problems
        except argparse.ArgumentError as error:
            # argparse stops at its first problem; without that option it goes on to the next.
            flag = error.argument_name or ""
            problems[flag] = f"{flag}: {error.message}; --help lists the options of the task."
            words = _without(words, flag)


def _without_misspelt(words: Sequence[str], own_names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words without flags that are slips of the task's own options, and a sentence for each of those.

    Pretraining would take them for slips of its own options, some of which are refused here.
    """
    own = {plain_name(name): f"--{name.replace('_', '-')}" for name in own_names} | _ELSEWHERE
    problems = []
    for flag in split_command_line(words)[0]:
        nearest = get_close_matches(plain_name(flag.name), own, n=1, cutoff=_NEAR)
        if nearest and flag.name not in BY_SPELLING and judge([flag]).problems:
            problems.append(f"{flag.text} is unknown; did you mean {own[nearest[0]]}?")
            words = _without(words, flag.name)
    return list(words), problems


def _without(words: Sequence[str], name: str) -> list[str]:
    """The words without a flag and its values."""
    flags, stray = split_command_line(words)
    left = list(stray)
    for flag in flags:
        if flag.name != name:
            first = [f"{flag.name}={flag.values[0]}"] if flag.has_equals else [flag.name, *flag.values[:1]]
            left += [*first, *flag.values[1:]]
    return left


def _problems_between_values(args: argparse.Namespace, command: Command, world_size: int) -> Iterator[str]:
    """What is wrong between options of pretraining, whatever the model, the data and the length of the run will be."""
    run, unknown = command.run, set(INSTEAD)
    if run.parallel.context_parallel_size == 1:
        unknown.remove("context_parallel_size")  # which nothing else of the task stands for
    for option in OPTIONS:
        is_open = option.name in ("lr", "global_batch_size", "micro_batch_size") and option.value_in(run) is None
        if option.section in ("model", "data") or (is_open and (option.name != "lr" or args.epochs == 0)):
            unknown.add(option.name)
    doubt = Doubt(command.doubt.unread | unknown, command.doubt.perhaps)
    yield from check(run, world_size, doubt=doubt)
