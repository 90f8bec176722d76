"""The command line: from words to a run, with everything that is wrong with it.

`read_command` layers what a user sets, defaults < `--preset` < `--config FILE` < flags, and keeps going: words that it
cannot use become problems of the `Command`, and the rest becomes a run. `settle` adds what is wrong between values,
which needs the number of ranks (`check.py`), and raises all of it in one error. No torch is needed for any of this.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron3d.config.architectures import how_to_train, named, traits_of
from megatron3d.config.check import check
from megatron3d.config.checkpoint_args import with_checkpoint_args
from megatron3d.config.command_line import GivenFlag, split_command_line, stray_sentence
from megatron3d.config.derive import derive
from megatron3d.config.files import FileSettings, read_config_file
from megatron3d.config.foreign.deepspeed_file import DeepSpeedFile, read_deepspeed_file
from megatron3d.config.foreign.deepspeed_keys import OPTIONS_OF_DEEPSPEED
from megatron3d.config.foreign.flags import Verdict, contradictions, judge, synonym_settings
from megatron3d.config.foreign.zero_bubble import zero_bubble_settings
from megatron3d.config.help_text import help_text, metavar
from megatron3d.config.layers import layered
from megatron3d.config.options import BY_KEY, BY_NAME, BY_SPELLING, OPTIONS, Option, Settings, given_run
from megatron3d.config.origins import Origins, origins_of
from megatron3d.config.presets import PRESETS
from megatron3d.config.rules.bounds import with_defaults_where_wrong
from megatron3d.config.rules.doubt import NO_DOUBT, Doubt
from megatron3d.config.run import DraftRun, GivenRun
from megatron3d.config.sections.experts import GivenExperts
from megatron3d.errors import CheckpointError, ConfigError
from megatron3d.files.user_code import is_user_code, located

_CODE = (("model", "architecture"), ("parallel", "pipeline_schedule"))  # may name a file of the user's
_NUM_EXPERTS = ("model", "num_experts")
_FILE_FLAGS = {
    "--config": "config",
    "--preset": "preset",
    "--deepspeed_config": "deepspeed_config",
    "--deepspeed-config": "deepspeed_config",
}


@dataclass(frozen=True)
class Command:
    """What a command line asks for.

    Attributes:
        run: the run as far as it could be read; options that could not are at their defaults.
        problems: a sentence for each word, key or file that cannot be used.
        doubt: the options that `problems` are about.
        origins: by the name of each option that was given, how a sentence names its origin, unless it was its own flag.
    """

    run: GivenRun
    problems: tuple[str, ...] = ()
    doubt: Doubt = NO_DOUBT
    origins: Mapping[str, str] = field(default_factory=dict)


def parse_args(
    argv: Sequence[str],
    *,
    program: str,
    description: str,
    log: Callable[[str], None] | None = None,
    architecture: str = "gpt",
) -> GivenRun:
    """The run a command line asks for, whether or not its values fit together; the arguments are `read_command`'s.

    Raises: ConfigError with every unknown, refused or malformed word of the command line and its files.
    """
    command = read_command(argv, program=program, description=description, log=log, architecture=architecture)
    if command.problems:
        raise ConfigError("\n".join(command.problems))
    return command.run


def settle(command: Command, world_size: int, *, more: Iterable[str] = ()) -> DraftRun:
    """The command's run on `world_size` ranks with all derived values.

    Args:
        command: what is asked for.
        world_size: ranks of the job.
        more: sentences about what the values name, such as files that are missing; they are reported beside problems,
            and by the caller where there are none.

    Raises: ConfigError with all problems of the words and between the values, one a line.
    """
    between = check(command.run, world_size, doubt=command.doubt)
    if between:
        origins = Origins(command.origins, command.run, derive(with_defaults_where_wrong(command.run), world_size))
        between = [origins.put_into(sentence) for sentence in between]
    problems = [*command.problems, *between]
    if problems:
        problems += [sentence for sentence in more if not command.doubt.explains(sentence)]
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return derive(command.run, world_size)


def save_directory(argv: Sequence[str]) -> str | None:
    """The --save of a command line whatever else is wrong with it, so that every failure can be recorded there.

    None where there is none, it has no value, or `--help` is all that is wanted.
    """
    flags, _ = split_command_line(argv)
    if any(flag.name in ("--help", "-h") for flag in flags):
        return None
    found = _sorted_flags(flags)
    return {**_config_file(found).settings, **found.settings}.get(("checkpoint", "save"))


def read_command(
    argv: Sequence[str],
    *,
    program: str,
    description: str,
    log: Callable[[str], None] | None = None,
    architecture: str | None = "gpt",
) -> Command:
    """What a command line asks for and what is wrong with its words; `--help` prints and exits.

    `argv` is without the program's name. `log` takes the lines about flags that have no effect here; by default they
    go to stderr (pass a function that keeps silent on all ranks but one). `architecture` is what the program trains: a
    preset, file or flag that names one of another program is a problem. With None it takes all; a GPT by default.

    Raises: CheckpointError if `--use-checkpoint-args` finds no checkpoint to take options from.
    """
    flags, stray = split_command_line(argv)
    if any(flag.name in ("--help", "-h") for flag in flags):
        sys.stdout.write(help_text(program, description))
        raise SystemExit(0)
    found = _sorted_flags(flags)
    found.problems[:0] = [stray_sentence(word, "the first flag") for word in stray]
    config_file = _config_file(found)
    engine_file = read_deepspeed_file(found.files["deepspeed_config"]) if "deepspeed_config" in found.files else None
    is_dense = ({**config_file.settings, **found.settings}).get(_NUM_EXPERTS) == 1
    by_flag, by_file = judge(found.foreign, is_dense=is_dense), judge(config_file.foreign, is_dense=is_dense)
    by_default = architecture or "gpt"
    settings: dict[tuple[str, str], Any] = {("model", "architecture"): by_default}
    of_preset = _preset_settings(found.files.get("preset") or config_file.preset, found.problems)
    if not config_file.is_whole:
        settings.update(of_preset)
    settings = layered(settings, {**by_file.settings, **config_file.settings})
    settings = layered(settings, by_flag.settings | found.settings)
    lines = _judged(found, by_flag, by_file, config_file)
    if engine_file is not None:
        path = found.files["deepspeed_config"]
        chosen = _chosen(settings, config_file, by_flag.settings | found.settings)
        found.problems += engine_file.problems + engine_file.contradictions(path, chosen)
        lines += [*engine_file.lines, *engine_file.lines_of_defaults(path, settings)]
        more = engine_file.settings(chosen)
        settings.update({key: more[key] for key in more if key in engine_file.values or key not in settings})
    log = _to_stderr if log is None else log
    settings.update(_located_code(settings, config_file, found, log))
    settings["model", "architecture"] = _known_architecture(settings, found) or by_default
    before, settings = settings, _with_checkpoint_args(settings, found, lines)
    origins = origins_of(
        settings,
        [
            ({key: value for key, value in settings.items() if before.get(key) != value}, "of the checkpoint"),
            *_layers_of_flags(found),
            ({**config_file.settings, **by_file.settings}, f"in {found.files.get('config')}"),
            (of_preset, f"of --preset {found.files.get('preset') or config_file.preset}"),
            ({} if engine_file is None else engine_file.settings({}), f"in {found.files.get('deepspeed_config')}"),
        ],
    )
    lines += _zero_bubble(found, by_flag, by_file, config_file, settings)
    found.problems += _problems_between(program, architecture, found.foreign, settings)
    if config_file.is_whole and "preset" in found.files:
        where = f"--config {found.files['config']}"
        lines.append(
            f"--preset {found.files['preset']} gives nothing: {where} is a run.json, which has the whole model."
        )
    lines += _lines_of_run(settings, found.unread)
    for line in lines:
        log(line)
    doubt = _doubt(found, by_flag, by_file, config_file, engine_file, settings)
    return Command(given_run(settings), tuple(dict.fromkeys(found.problems)), doubt, origins)


def _chosen(settings: Settings, config_file: FileSettings, of_flags: Settings) -> Settings:
    """The settings without the defaults of a `run.json`, which has a value of every option: nobody chose these."""
    if not config_file.is_whole:
        return settings
    return {key: value for key, value in settings.items() if key in of_flags or value != BY_KEY[key].default}


def _layers_of_flags(found: _SortedFlags) -> Iterator[tuple[Settings, str]]:
    """What the flags set, with how a sentence names the origin: an option's own flag needs none."""
    yield found.settings, ""
    for flag in found.foreign:
        yield synonym_settings(flag), f"which {flag.name} means"


def _located_code(
    settings: Settings, config_file: FileSettings, found: _SortedFlags, log: Callable[[str], None]
) -> Settings:
    """The options that name code of the user's, by the path of its file; `log` takes a line before any of it is run."""
    of_code = {key: located(settings[key]) for key in _CODE if is_user_code(settings.get(key) or "")}
    for key, name in of_code.items():
        is_of_file = key in config_file.settings.keys() - found.settings.keys()
        source = f"--config {found.files['config']}: " if is_of_file else ""
        log(f"{source}{BY_KEY[key].spelling} {name} is code, which is run.")
    return of_code


def _known_architecture(settings: Settings, found: _SortedFlags) -> str | None:
    """The architecture that is asked for; where it cannot be had, that is a problem, and None is returned."""
    name = settings["model", "architecture"]
    try:
        traits_of(name)
    except ConfigError as error:
        found.problems += str(error).splitlines()
        found.unread.add("architecture")
        return None
    return name


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


@dataclass
class _SortedFlags:
    """The flags of a command line, sorted: our options, the files to read, and what is no option of ours."""

    settings: dict[tuple[str, str], Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    foreign: list[GivenFlag] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)


def _sorted_flags(flags: Iterable[GivenFlag]) -> _SortedFlags:
    found = _SortedFlags()
    for flag in flags:
        if flag.name in _FILE_FLAGS:
            _read_file_flag(flag, found)
        elif flag.name == "--deepspeed" and flag.values and flag.values[0].endswith(".json"):
            # Hugging Face's Trainer takes the file by this flag.
            _read_file_flag(GivenFlag("--deepspeed_config", flag.values), found)
        elif flag.name in BY_SPELLING:
            _read_option(flag, BY_SPELLING[flag.name], found)
        else:
            found.foreign.append(flag)
    return found


def _read_file_flag(flag: GivenFlag, found: _SortedFlags) -> None:
    if not flag.values:
        found.problems.append(f"{flag.name} has no value after it; give the name of a preset or the path of a file.")
        return
    name = _FILE_FLAGS[flag.name]
    if name != "preset" and found.files.get(name, flag.values[0]) != flag.values[0]:
        found.problems.append(
            f"{flag.name} {found.files[name]} and {flag.text} are two files, of which one can be read; give one."
        )
    found.files[name] = flag.values[0]
    found.problems += [stray_sentence(word, flag.name) for word in flag.values[1:]]


def _read_option(flag: GivenFlag, option: Option, found: _SortedFlags) -> None:
    """Set one option by its flag, or note why not."""
    if option.flag.several and flag.values[1:]:
        option = BY_NAME[option.flag.several]
    kind = option.flag.kind
    if kind in ("on", "off"):
        if flag.has_equals:
            found.problems.append(f"{flag.name}={flag.values[0]} gives a value to a switch; write {flag.name} alone.")
        else:
            found.problems += [stray_sentence(word, flag.name) for word in flag.values]
        found.settings[option.key] = kind == "on"
        return
    if not flag.values:
        found.problems.append(f"{flag.name} has no value after it; give one ({metavar(option)}): {option.flag.help}")
        found.unread.add(option.name)
        return
    if kind != "list":
        found.problems += [stray_sentence(word, flag.name) for word in flag.values[1:]]
    try:
        found.settings[option.key] = option.convert(flag.values if kind == "list" else flag.values[0])
    except ValueError as error:
        found.problems.append(str(error))
        found.unread.add(option.name)


def _config_file(found: _SortedFlags) -> FileSettings:
    if "config" not in found.files:
        return FileSettings({}, None, (), ())
    try:
        return read_config_file(found.files["config"], found.settings)
    except ConfigError as error:
        return FileSettings({}, None, (), (str(error),), is_read=False)


def _preset_settings(name: str | None, problems: list[str]) -> Settings:
    if name is None:
        return {}
    if name not in PRESETS:
        problems.append(f"--preset {name} is not known; use one of: {', '.join(PRESETS)}.")
        return {}
    preset = PRESETS[name]
    architecture = preset.model_config().architecture
    return {("model", field): value for field, value in preset.model.items()} | {
        ("model", "architecture"): architecture
    }


def _judged(found: _SortedFlags, by_flag: Verdict, by_file: Verdict, config_file: FileSettings) -> list[str]:
    """Add the problems of files and foreign words; returns the lines about words without effect."""
    found.problems += config_file.problems
    for layer, verdict, foreign, given in (
        ("", by_flag, found.foreign, found.settings),
        (f"{found.files.get('config')}: ", by_file, config_file.foreign, config_file.settings),
    ):
        problems = [*verdict.problems, *contradictions(foreign, given), *_shard_contradiction(given)]
        found.problems += [f"{layer}{problem}" for problem in problems]
    return [*by_flag.lines, *by_file.lines]


def _shard_contradiction(given: Settings) -> Iterator[str]:
    """--use-distributed-optimizer is at least stage 1; the default of --zero-stage does not contradict it."""
    stage = given.get(("parallel", "zero_stage"))
    if given.get(("parallel", "use_distributed_optimizer")) and stage == 0:
        yield "--use-distributed-optimizer means --zero-stage 1, but --zero-stage is 0; give only one of them."


def _with_checkpoint_args(
    settings: dict[tuple[str, str], Any], found: _SortedFlags, lines: list[str]
) -> dict[tuple[str, str], Any]:
    """The settings with those of a checkpoint, where they are asked for.

    Raises: CheckpointError if there is none and nothing else is wrong; else that is a problem like the others.
    """
    try:
        return with_checkpoint_args(settings, lines.append)
    except CheckpointError as error:
        if not found.problems:
            raise
        found.problems.append(str(error))
        found.unread.update(option.name for option in OPTIONS if option.section == "model")
        return settings


def _zero_bubble(
    found: _SortedFlags,
    by_flag: Verdict,
    by_file: Verdict,
    config_file: FileSettings,
    settings: dict[tuple[str, str], Any],
) -> list[str]:
    """Set the schedule that the zero-bubble fork's switches ask for; returns the lines about them."""
    key = ("parallel", "pipeline_schedule")
    of_flags = by_flag.settings | found.settings
    given = of_flags if by_flag.zero_bubble or key in of_flags else config_file.settings
    switches = by_flag.zero_bubble if given is of_flags else by_file.zero_bubble
    stages = settings.get(("parallel", "pipeline_model_parallel_size"), 1)
    schedule: dict[tuple[str, str], Any] = {}
    problems, lines = zero_bubble_settings(switches, stages, schedule)
    found.problems += problems
    if schedule and given.get(key, schedule[key]) != schedule[key]:
        found.problems.append(
            f"{' '.join(switches)} means --pipeline-schedule {schedule[key]}, but --pipeline-schedule is {given[key]}; "
            "give only one of them."
        )
    settings.update(schedule)
    return lines


def _problems_between(
    program: str, architecture: str | None, foreign: Iterable[GivenFlag], settings: Mapping[tuple[str, str], Any]
) -> list[str]:
    """What is wrong between the program, flags that are no option, and options."""
    problems = []
    asked = settings["model", "architecture"]
    if architecture is not None and traits_of(asked).script != traits_of(architecture).script:
        problems.append(
            f"{program} trains {named(architecture)}, but --preset, --config or --architecture asks for "
            f"{named(asked)}; {how_to_train(asked, architecture)}."
        )
    stages = settings.get(("parallel", "pipeline_model_parallel_size"), 1)
    if stages > 1 and any(flag.name == "--no-pipeline-parallel" for flag in foreign):
        problems.append(
            f"--no-pipeline-parallel and --pipeline-model-parallel-size {stages} contradict each other; give only one "
            "of them."
        )
    return problems


def _lines_of_run(settings: Settings, unread: set[str]) -> list[str]:
    """A line for each option of ours that has no effect in this run."""
    lines = list(_lines_of_dense(settings))
    interval = settings.get(("checkpoint", "save_interval"))
    if interval is None or settings.get(("checkpoint", "save")) is not None or "save" in unread:
        return lines
    return [*lines, f"--save-interval {interval} is accepted without effect: nothing is saved without --save."]


def _lines_of_dense(settings: Settings) -> Iterator[str]:
    """A line for each option of experts that is given beside --num-experts 1."""
    if settings.get(_NUM_EXPERTS) != 1:
        return
    for option in OPTIONS:
        value = settings.get(option.key, option.default)
        if option.name in GivenExperts.__dataclass_fields__ and value != option.default:
            text = "" if value is True else f" {' '.join(value) if isinstance(value, tuple) else value}"
            yield f"{option.spelling}{text} is accepted without effect: --num-experts 1 is a dense model."


def _doubt(
    found: _SortedFlags,
    by_flag: Verdict,
    by_file: Verdict,
    config_file: FileSettings,
    engine_file: DeepSpeedFile | None,
    settings: Settings,
) -> Doubt:
    unread = found.unread | by_flag.meant | by_file.meant | config_file.unread
    perhaps: set[str] = set() if config_file.is_read else set(BY_NAME)
    if engine_file is not None and not engine_file.is_read:
        perhaps |= OPTIONS_OF_DEEPSPEED
    if (found.files.get("preset") or config_file.preset) not in (None, *PRESETS):
        perhaps |= {option.name for option in OPTIONS if option.section == "model"}
    given = frozenset(name for _, name in settings)
    return Doubt(frozenset(unread) - given, frozenset(perhaps) - given)
