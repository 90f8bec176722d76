"""What `--help` prints: every flag with its values, help and default, under its section."""

from __future__ import annotations

import argparse
from typing import Any

from megatron3d.config.options import OPTIONS, SECTIONS, Option
from megatron3d.config.presets import PRESETS

_METAVARS = {"int": "N", "float": "X", "str": "TEXT"}
_GROUP_TITLES = {
    "model": "model: what is computed",
    "parallel": "parallel: how the work is cut",
    "train": "train: how long, in which batches, and what is logged",
    "lengths": "lengths: samples that are short at first",
    "optim": "optim: how weights are updated, and in which precision",
    "data": "data: which tokens are read",
    "curriculum": "curriculum: which samples are admitted when",
    "checkpoint": "checkpoint: what is saved and loaded",
}
_EPILOG = (
    "Values come from, in rising order: defaults, --preset, --config, flags, --use-checkpoint-args. Megatron-LM's "
    "flags without meaning here are accepted with one line each; those of features that are not here are refused with "
    "what to use instead. See docs/configuration.md."
)


def help_text(program: str, description: str) -> str:
    """The whole text; argparse lays it out, and parses nothing."""
    parser = argparse.ArgumentParser(
        prog=program,
        description=description,
        epilog=_EPILOG,
        usage=f"{program} [--preset NAME] [--config FILE] [flags]",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=44, width=118),
    )
    parser.add_argument("--config", metavar="FILE", help="Options from a JSON or TOML file; flags override them.")
    names = ", ".join(PRESETS)
    parser.add_argument("--preset", metavar="NAME", help=f"The shape of a published model: {names}.")
    parser.add_argument(
        "--deepspeed_config",
        metavar="FILE",
        help="What a DeepSpeed JSON file sets of ZeRO, batch, precision and optimizer; flags must not contradict it.",
    )
    for section in SECTIONS:
        group = parser.add_argument_group(_GROUP_TITLES[section])
        for option in OPTIONS:
            if option.section == section:
                _add(group, option)
    return parser.format_help()


def metavar(option: Option) -> str:
    """What stands for an option's value: its choices, or a letter for its type."""
    choices = option.flag.choices
    if option.flag.kind == "list":
        return "WORD ..."
    if not choices:
        return _METAVARS[option.type_name]
    words = [*map(str, choices), *(["FILE.py:NAME"] if option.flag.takes_code else [])]
    return "{" + ",".join(words) + "}"


def _add(group: argparse._ArgumentGroup, option: Option) -> None:
    settings: dict[str, Any] = {"dest": option.name, "help": _help(option)}
    if option.flag.kind in ("on", "off"):
        settings |= {"action": "store_true"}
    elif option.flag.kind == "list":
        settings |= {"nargs": "*", "metavar": "WORD"}
    else:
        settings |= {"metavar": metavar(option)}
    group.add_argument(option.spelling, **settings)


def _help(option: Option) -> str:
    unit = f" [{option.flag.unit}]" if option.flag.unit else ""
    has_default = option.flag.kind == "value" and option.default not in (None, "")
    default = f" (default {option.default})" if has_default else ""
    return (option.flag.help + unit + default).replace("%", "%%")
