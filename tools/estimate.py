"""Tell how much memory a run will take, or the largest model for a given memory; nothing is started or allocated.

    python tools/estimate.py --preset gpt3-175b --world-size 1024 --tensor-model-parallel-size 8 \
        --pipeline-model-parallel-size 16 --micro-batch-size 1 --bf16 --device cuda
    python tools/estimate.py --largest --memory-gb 80 --world-size 1,8,64 --micro-batch-size 1 --bf16 --device cuda

The other flags are those of pretrain_gpt.py or pretrain_bert.py; data, length and learning rate may be left out.
docs/memory.md says what is counted and how near it comes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

from megatron3d.config.architectures import named, traits_of
from megatron3d.config.cli import parse_args, read_command, settle
from megatron3d.config.derive import model_parallel_size
from megatron3d.config.placeholders import with_placeholders
from megatron3d.config.presets import Preset
from megatron3d.config.run import DraftRun, GivenRun
from megatron3d.errors import ConfigError, Megatron3dError

PROGRAM = "estimate.py"
DESCRIPTION = "Tell how much memory a run will take on each rank."


class _Parser(argparse.ArgumentParser):
    """argparse that raises our error instead of leaving the process."""

    def error(self, message: str) -> None:
        """Raise ConfigError; argparse's own messages name the flag and its value."""
        raise ConfigError(f"{message[0].upper()}{message[1:]}; --help lists every flag and its value.")


def parser() -> argparse.ArgumentParser:
    """The flags that are this tool's own."""
    p = _Parser(prog=PROGRAM, description=DESCRIPTION, allow_abbrev=False, add_help=False)
    p.add_argument("--world-size", default="1", metavar="N", help="ranks (default 1); with --largest also N,N,...")
    p.add_argument("--architecture", metavar="NAME", help="default: the preset's, or gpt")
    p.add_argument("--largest", action="store_true", help="find the largest preset for each ZeRO stage and offload")
    p.add_argument("--memory-gb", metavar="X", help="with --largest: GiB of a rank's device")
    p.add_argument("--host-memory-gb", metavar="X", help="with --largest: GiB of host memory for a rank")
    p.add_argument("--family", metavar="NAME,...", help="with --largest: how presets' names begin (gpt3,megatron)")
    return p


def world_sizes_of(text: str) -> list[int]:
    """The numbers of ranks as given; empty if they are not whole numbers above 0."""
    try:
        sizes = [int(word) for word in text.split(",")]
    except ValueError:
        return []
    return sizes if min(sizes) > 0 else []


def bytes_of(text: str) -> int | None:
    """A size in GiB as bytes, or None if it is no finite number above 0."""
    try:
        size = float(text)
    except ValueError:
        return None
    return int(size * 2**30) if 0 < size < float("inf") else None


def own_problems(args: argparse.Namespace) -> Iterator[str]:
    """What is wrong with the flags of this tool."""
    sizes = world_sizes_of(args.world_size)
    if not sizes:
        yield f"--world-size {args.world_size} is not a whole number of ranks above 0; use --world-size 8."
    if len(sizes) > 1 and not args.largest:
        yield f"--world-size {args.world_size} names several sizes, which --largest compares; give one."
    for name in () if args.largest else ("memory_gb", "host_memory_gb", "family"):
        if getattr(args, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            yield f"{flag} {getattr(args, name)} is for --largest; give --largest too, or leave it out."
    if args.largest and args.memory_gb is None:
        yield "--largest needs the GiB of a rank's device; give --memory-gb 80."
    for flag, text in (("--memory-gb", args.memory_gb), ("--host-memory-gb", args.host_memory_gb)):
        if args.largest and text is not None and bytes_of(text) is None:
            yield f"{flag} {text} is not a number of GiB above 0; use {flag} 80."


def run_to_estimate(args: argparse.Namespace, rest: Sequence[str]) -> DraftRun:
    """The one run that is asked about, with every derived value but a tokenizer's.

    Raises: ConfigError with all problems of its options.
    """
    words = rest if args.architecture is None else ["--architecture", args.architecture, *rest]
    command = read_command(words, program=PROGRAM, description=DESCRIPTION, architecture=None)
    problems = (*own_problems(args), *command.problems)
    # Where the number of ranks is not known, what else is wrong is looked for on the fewest that hold a model.
    sizes = world_sizes_of(args.world_size) or [max(1, model_parallel_size(command.run.parallel))]
    return settle(replace(command, run=with_placeholders(command.run), problems=problems), sizes[0])


def check_search(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """Refuse options that do not describe a search for the largest model.

    Raises: ConfigError with all problems: a limit that is missing, a model that is named, or words that are no options.
    """
    problems = [*own_problems(args)]
    if "--preset" in rest:
        problems.append("--preset names one model and --largest searches a family of them; use --family instead.")
    try:
        architecture = args.architecture or "gpt"
        if not traits_of(architecture).presets:
            found = named(architecture)
            problems.append(f"--largest compares published models, and none of them is {found}; leave it out.")
        parse_with(args, rest)
    except ConfigError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))


def parse_with(args: argparse.Namespace, rest: Sequence[str]) -> GivenRun:
    """The run of the other options. Raises: ConfigError for words that are none."""
    return parse_args(rest, program=PROGRAM, description=DESCRIPTION, architecture=args.architecture or "gpt")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    own = parser()
    if "--help" in words or "-h" in words:
        own.print_help()
        read_command(["--help"], program=PROGRAM, description=DESCRIPTION)
    try:
        args, rest = own.parse_known_args(words)
        run = None if args.largest else run_to_estimate(args, rest)
        if args.largest:
            check_search(args, rest)

        # Counting needs torch, whose import takes seconds: a mistake above is answered without it.
        from megatron3d.train.estimate import Limits, describe, describe_largest, estimate_of, family_of
        from megatron3d.train.vocabulary import open_vocabulary

        if run is not None:
            print(describe(estimate_of(open_vocabulary(run)[0])))
            return 0
        architecture = args.architecture or "gpt"
        family = family_of(args.family or ",".join(traits_of(architecture).presets), architecture)
        device = bytes_of(args.memory_gb)
        assert device is not None, f"--memory-gb {args.memory_gb} is checked above"
        limits = Limits(device, None if args.host_memory_gb is None else bytes_of(args.host_memory_gb))

        def parse(preset: Preset) -> GivenRun:
            return parse_with(args, ["--preset", preset.name, *rest])

        print(describe_largest(parse, family, world_sizes_of(args.world_size), limits))
    except Megatron3dError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
