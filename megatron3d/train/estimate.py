"""Estimates: the memory of a run that has not been started, and the largest model that a memory takes.

The ledger (`planner/ledger.py`) does the counting; this is what `tools/estimate.py` asks it and how the answers look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from megatron3d.comm.device import likely_device_type
from megatron3d.config.architectures import traits_of
from megatron3d.config.check import checked
from megatron3d.config.placeholders import with_placeholders
from megatron3d.config.presets import PRESETS, Preset
from megatron3d.config.run import GivenRun, RunConfig
from megatron3d.config.sections.parallel import ParallelConfig
from megatron3d.errors import ConfigError
from megatron3d.models.counts import num_parameters
from megatron3d.pipeline.plan import PipelinePlan
from megatron3d.planner.ledger import Ledger, ledger_of, worst
from megatron3d.planner.memory import least_state_bytes
from megatron3d.planner.stage_records import StageRecords
from megatron3d.train.async_saves import save_copy_note
from megatron3d.train.plan import plan_of
from megatron3d.train.progress import format_bytes, format_count
from megatron3d.train.vocabulary import open_vocabulary

COLUMNS = ("weights", "gradients", "optimizer", "activations", "buffers", "peak", "host", "files")


@dataclass(frozen=True)
class Estimate:
    """A run of known size: its config, its plan, and the ledger of every pipeline rank."""

    config: RunConfig
    plan: PipelinePlan
    ledgers: tuple[Ledger, ...]

    @property
    def worst(self) -> Ledger:
        """The rank that needs most on its device."""
        return worst(self.ledgers)


def settled(given: GivenRun, world_size: int) -> RunConfig:
    """The run on so many ranks with every derived value.

    Raises:
        ConfigError: the options do not go together.
        DataError: a file of the tokenizer is missing or damaged.
    """
    return open_vocabulary(checked(with_placeholders(given), world_size))[0]


def estimate_of(config: RunConfig) -> Estimate:
    """The ledgers of a settled run.

    Raises:
        ConfigError: the layers cannot be split as asked.
        ScheduleError: the order of work does not take these stages.
    """
    plan = plan_of(config)
    return Estimate(config, plan, ledger_of(StageRecords(config, likely_device_type(config.parallel.device)), plan))


def describe(found: Estimate) -> str:
    """What an estimate says, in lines: the run, a table with a row for each pipeline rank, the fullest rank."""
    config, parallel = found.config, found.config.parallel
    degrees = {
        "tp": parallel.tensor_model_parallel_size,
        "pp": parallel.pipeline_model_parallel_size,
        "dp": parallel.data_parallel_size,
        **({"cp": parallel.context_parallel_size} if parallel.context_parallel_size > 1 else {}),
        **_expert_degrees(parallel),
    }
    layout = ", ".join(f"{name} {size}" for name, size in degrees.items())
    device_type = likely_device_type(parallel.device)
    top = found.worst
    return "\n".join(
        [
            f"{config.model.traits.title}: {num_parameters(config.model):,} parameters on {layout}, ZeRO "
            f"stage {parallel.zero_stage}, {config.optim.precision}, schedule {found.plan.order}, on {device_type}",
            *_table(["pp rank", *COLUMNS], [[str(one.pp_rank), *_sizes(one)] for one in found.ledgers]),
            f"pipeline rank {top.pp_rank} needs most: {format_bytes(top.peak)} on its device",
            *save_copy_note(max(one.save_copy for one in found.ledgers), device_type),
            *_compile_note(config.train.compile),
        ]
    )


def _compile_note(compiles: bool) -> list[str]:
    note = "the activations are those without --compile: torch chooses what its graphs keep when it compiles them"
    return [note] if compiles else []


def _expert_degrees(parallel: ParallelConfig) -> dict[str, int]:
    """Those that differ from the degrees of dense layers."""
    degrees = {"ep": parallel.expert_model_parallel_size} if parallel.expert_model_parallel_size > 1 else {}
    etp = parallel.expert_tensor_parallel_size
    return degrees if etp is None else {**degrees, "etp": etp}


def _sizes(one: Ledger) -> list[str]:
    rows = one.rows()
    return [format_bytes(rows[name]) if rows[name] else "0" for name in COLUMNS]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a Markdown table, its columns aligned to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    yield "| " + " | ".join(word.rjust(width) for word, width in zip(head, widths, strict=True)) + " |"
    yield "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    for row in rows:
        yield "| " + " | ".join(word.rjust(width) for word, width in zip(row, widths, strict=True)) + " |"


# --- The largest model ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """Where state is kept: the stage of ZeRO, and the places of optimizer state and of sharded weights."""

    zero_stage: int
    optimizer: str = "none"
    params: str = "none"

    def __str__(self) -> str:
        if self.optimizer == "none":
            return "-"
        return f"optimizer to {self.optimizer}" + (f", weights to {self.params}" if self.params != "none" else "")

    def of(self, given: GivenRun) -> GivenRun:
        """The run with this setting."""
        uses_files = "nvme" in (self.optimizer, self.params)
        parallel = replace(
            given.parallel,
            zero_stage=self.zero_stage,
            offload_optimizer=self.optimizer,
            offload_params=self.params,
            offload_dir=(given.parallel.offload_dir or ".") if uses_files else None,
        )
        return replace(given, parallel=parallel)


SETTINGS = tuple(
    Setting(stage, place, params)
    for stage in range(4)
    for place in ("none", "cpu", "nvme")
    for params in (("none", place) if stage == 3 and place != "none" else ("none",))
)


@dataclass(frozen=True)
class Limits:
    """Bytes that a rank may use: of its device, and of host memory (None: as much as it likes)."""

    device: int
    host: int | None = None

    def allow(self, found: Estimate) -> bool:
        """Whether every rank stays within."""
        host = max(one.host for one in found.ledgers)
        return found.worst.peak <= self.device and (self.host is None or host <= self.host)


def family_of(names: str, architecture: str) -> tuple[Preset, ...]:
    """The presets of an architecture whose names begin with one of several words (separated by commas), the smallest
    first.

    Raises:
        ConfigError: a word begins none of them.
    """
    known = {name: preset for name, preset in PRESETS.items() if preset.model_config().architecture == architecture}
    for word in names.split(","):
        if not word or not any(name.startswith(word) for name in known):
            families = sorted({name.rsplit("-", 1)[0] for name in known})
            raise ConfigError(
                f"--family {names}: '{word}' begins the name of no {traits_of(architecture).title} among the presets; "
                f"use one or more of {', '.join(families)}, or another --architecture."
            )
    found = [preset for name, preset in known.items() if name.startswith(tuple(names.split(",")))]
    return tuple(sorted(found, key=lambda preset: num_parameters(preset.model_config())))


def largest(
    given: Sequence[GivenRun], setting: Setting, world_size: int, limits: Limits
) -> tuple[int | None, list[str]]:
    """Which of several runs, smallest first, is the largest that stays within the limits.

    Runs whose sizes do not go with the layout are passed over; the second value says why, a sentence for each.
    """
    problems: list[str] = []
    for position in reversed(range(len(given))):
        try:
            config = settled(setting.of(given[position]), world_size)
        except ConfigError as error:
            problems.append(str(error))
            continue
        if (
            least_state_bytes(
                config.parallel,
                config.optim,
                num_parameters(config.model),
                some_frozen=bool(config.train.freeze_params),
            )
            > limits.device
        ):
            continue
        if limits.allow(estimate_of(config)):
            return position, problems
    return None, problems


def describe_largest(
    parse: Callable[[Preset], GivenRun], family: Sequence[Preset], world_sizes: Sequence[int], limits: Limits
) -> str:
    """A table of the largest preset of a family for each setting and number of ranks.

    `parse` gives the run that the command line asks for with a preset.

    Raises:
        ConfigError: no preset goes with the options on some number of ranks.
    """
    given = [parse(preset) for preset in family]
    rows, left_out = [], dict[str, None]()
    for setting in SETTINGS:
        row = [str(setting.zero_stage), str(setting)]
        for world_size in world_sizes:
            position, problems = largest(given, setting, world_size, limits)
            if len(problems) == len(given):
                raise ConfigError(problems[-1])
            left_out |= dict.fromkeys(problems)
            row.append("none" if position is None else _named(family[position]))
        rows.append(row)
    counts = [f"{size} rank{'s' if size > 1 else ''}" for size in world_sizes]
    notes = [f"passed over: {problem}" for problem in left_out]
    return "\n".join([*_table(["ZeRO stage", "offloaded", *counts], rows), *notes])


def _named(preset: Preset) -> str:
    return f"{preset.name} ({format_count(num_parameters(preset.model_config()))})"
