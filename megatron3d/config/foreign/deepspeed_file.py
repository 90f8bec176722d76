"""A DeepSpeed JSON file (`--deepspeed_config`): what it sets of ZeRO, batch, precision, optimizer and schedule.

Each key has one fate, as flags have: it sets an option of ours, it is without effect here (buffers, buckets, logs), or
it asks for something that is not here. Keys that DeepSpeed does not know either are mistakes. A value of "auto" leaves
the option to the flags, as in Hugging Face's integration. What is left out has DeepSpeed's default unless a flag says
otherwise, where that default would give another run than ours.

The keys are tables in `deepspeed_keys.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron3d.config.foreign.deepspeed_data import DataEfficiency, read_data_efficiency, read_legacy_curriculum
from megatron3d.config.foreign.deepspeed_keys import (
    DIRECT,
    IMPLIED_BY_OPTIMIZER,
    IMPLIED_SCALE_POWER,
    INSTEAD,
    NEEDED_OF_SCHEDULER,
    OPTIMIZERS,
    REFUSED,
    SCHEDULES,
    SWITCHED_OFF,
    UNSET,
    WITHOUT_EFFECT,
    Key,
)
from megatron3d.config.options import BY_KEY, BY_NAME, Settings
from megatron3d.files.json_text import parse


@dataclass
class DeepSpeedFile:
    """What a file sets.

    Attributes:
        values: option -> (value, where in the file it stands).
        implied: the same for what the file leaves out and DeepSpeed has another default for.
        problems: sentences about what cannot be read or done.
        lines: sentences about what has no effect.
        sets_clipping: whether the file decides about clipping gradients.
        is_read: whether the file could be read at all.
    """

    values: dict[Key, tuple[Any, str]] = field(default_factory=dict)
    implied: dict[Key, tuple[Any, str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    sets_clipping: bool = False
    is_read: bool = True

    def contradictions(self, path: str, given: Settings) -> list[str]:
        """A sentence for each option that `given`, the flags and other files, sets to another value than the file."""
        problems = [
            f"{path} has {where} = {_shown(value)}, but {BY_KEY[key].spelling} is {_shown(given[key])}; make them "
            "equal, or leave one of them out."
            for key, (value, where) in self.values.items()
            if key in given and given[key] != value
        ]
        for mine, other in (("bf16", "fp16"), ("fp16", "bf16")):
            value, where = self.values.get(("optim", mine), (False, ""))
            if value and given.get(("optim", other)) and ("optim", mine) not in given:
                problems.append(f"{path} has {where} = true, but --{other} is given; give only one of them.")
        stage, where = self.values.get(("parallel", "zero_stage"), (1, ""))
        if given.get(("parallel", "use_distributed_optimizer")) and stage != 1:
            problems.append(
                f"{path} has {where} = {stage}, but --use-distributed-optimizer is stage 1; leave one of them out."
            )
        return problems

    def settings(self, given: Settings) -> dict[Key, Any]:
        """What the file adds to `given`; precision stays with the flags where they chose one."""
        chosen = given.get(("optim", "bf16")) or given.get(("optim", "fp16"))
        precision = (("optim", "bf16"), ("optim", "fp16")) if chosen else ()
        found = {**self.implied, **self.values}
        return {key: value for key, (value, _) in found.items() if key not in given and key not in precision}

    def lines_of_defaults(self, path: str, given: Settings) -> list[str]:
        """A line for each option that neither the file nor `given` sets, where DeepSpeed's default is not ours."""
        lines = [
            f"{path} leaves {where} out, so that {BY_KEY[key].spelling} is {_shown(value)} as in DeepSpeed."
            for key, (value, where) in self.implied.items()
            if key not in given and key not in self.values
        ]
        if self.is_read and not self.sets_clipping and ("optim", "clip_grad") not in given:
            lines.append(
                f"{path} leaves gradient_clipping out, which means none to DeepSpeed; --clip-grad "
                f"{_shown(BY_KEY['optim', 'clip_grad'].default)} holds here, and --clip-grad 0 is none."
            )
        return lines


def read_deepspeed_file(path: str) -> DeepSpeedFile:
    """What a DeepSpeed JSON file sets; a file that is missing or malformed is a problem of the result."""
    found = DeepSpeedFile()
    try:
        parsed = parse(Path(path).read_bytes(), unique_keys=True)
    except OSError as error:
        return _unread(f"--deepspeed_config {path} cannot be read ({error.strerror}); give the path of a JSON file.")
    except ValueError as error:
        return _unread(f"--deepspeed_config {path} is not valid JSON ({error}); correct it there.")
    if not isinstance(parsed, dict):
        return _unread(f"--deepspeed_config {path} holds a {type(parsed).__name__}; it must be one object.")
    reader = _Reader(path, found)
    for name, value in parsed.items():
        reader.read(name, value)
    params = _object(_object(parsed, "optimizer"), "params")
    found.sets_clipping = "gradient_clipping" in parsed or "max_grad_norm" in params
    _check_scheduler(path, _object(parsed, "scheduler"), found)
    _add_implied(path, parsed, params, found)
    for tracker, key in (("tensorboard", "output_path"), ("wandb", "project")):
        if (settings := _object(parsed, tracker)).get("enabled") and not settings.get(key):
            option = BY_KEY[DIRECT[f"{tracker}.{key}"]].spelling
            found.lines.append(f"{path}: {tracker}.enabled is without effect: there is no {key}; give it, or {option}.")
    return found


def _object(parsed: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The object at a key; empty where there is none, or something else, which is reported when it is read."""
    value = parsed.get(name)
    return value if isinstance(value, dict) else {}


def _check_scheduler(path: str, scheduler: Mapping[str, Any], found: DeepSpeedFile) -> None:
    if ("optim", "lr_decay_style") not in found.values:
        return  # No scheduler, or none that can be used.
    for key, meaning in NEEDED_OF_SCHEDULER.items():
        if key not in _object(scheduler, "params"):
            found.problems.append(f"{path} leaves scheduler.params.{key} out, which means {meaning}.")


def _add_implied(path: str, parsed: Mapping[str, Any], params: Mapping[str, Any], found: DeepSpeedFile) -> None:
    optimizer, _ = found.values.get(("optim", "optimizer"), (None, ""))
    implied = dict(IMPLIED_BY_OPTIMIZER.get(optimizer, {}))
    decoupled, where = found.values.get(("optim", "decoupled_weight_decay"), (True, ""))
    if not decoupled and str(_object(parsed, "optimizer").get("type")).lower() == "adamw":
        found.problems.append(
            f"{path} has {where} = false, which DeepSpeed ignores where optimizer.type is AdamW; leave it out, or "
            "write Adam as the type."
        )
    if params.get("torch_adam") and decoupled:
        implied["weight_decay"] = 0.01  # torch's AdamW, and not DeepSpeed's
    for name in (name for name in implied if name not in params):
        where = f"optimizer.params.{name}"
        if name == "betas":
            for field_name, beta in zip(("adam_beta1", "adam_beta2"), implied[name], strict=True):
                found.implied["optim", field_name] = (beta, where)
        else:
            found.implied[DIRECT[where]] = (implied[name], where)
    fp16 = _object(parsed, "fp16")
    if fp16.get("enabled") is True and "initial_scale_power" not in fp16:
        found.implied["optim", "initial_loss_scale"] = (2.0**IMPLIED_SCALE_POWER, "fp16.initial_scale_power")


def _unread(problem: str) -> DeepSpeedFile:
    return DeepSpeedFile(problems=[problem], is_read=False)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    return f"{value:g}" if isinstance(value, float) else str(value)


class _Reader:
    """Reads one file key by key, objects depth first, and writes what it finds into a `DeepSpeedFile`."""

    def __init__(self, path: str, found: DeepSpeedFile) -> None:
        self._path = path
        self._found = found
        self._special: Mapping[str, Callable[[str, Any], None]] = {
            "optimizer.type": self._optimizer,
            "scheduler.type": self._scheduler,
            "optimizer.params.betas": self._betas,
            "fp16.loss_scale": self._loss_scale,
            "fp16.initial_scale_power": self._initial_scale,
            "zero_optimization.cpu_offload": self._cpu_offload,
            "zero_optimization.cpu_offload_params": self._cpu_offload,
            "scheduler.params.warmup_type": self._warmup_type,
            "tensorboard.enabled": self._tracker,
            "wandb.enabled": self._tracker,
            "data_efficiency": lambda _, value: self._data_efficiency(read_data_efficiency(value)),
            "curriculum_learning": lambda _, value: self._data_efficiency(read_legacy_curriculum(value)),
        }

    def read(self, name: str, value: Any) -> None:
        """Judge the key `name`, the path of an entry with dots."""
        if value == "auto" or (name in UNSET and value in UNSET[name]):
            return
        if name in self._special:
            self._special[name](name, value)
        elif name in DIRECT:
            self._set(name, DIRECT[name], value)
        elif name in REFUSED:
            harmless, reason = REFUSED[name]
            if value not in harmless:
                self._refuse(name, value, f"{reason}; leave it out")
        elif (reason := _reason_without_effect(name)) is not None:
            self._found.lines.append(f"{self._path}: {name} is accepted without effect: {reason}.")
        elif name in SWITCHED_OFF.split():
            if isinstance(value, dict) and value.get("enabled"):
                self._refuse(name, "enabled", INSTEAD.get(name, "this is not in this version; leave it out"))
        elif isinstance(value, dict) and _is_object(name):
            for key, inner in _in_use(name, value).items():
                self.read(f"{name}.{key}", inner)
        elif _is_object(name):
            self._found.problems.append(f"{self._path}: {name} is {_shown(value)}; write {_example_of(name)}.")
        else:
            self._found.problems.append(f"{self._path} has the key {name}, which is not known; correct or remove it.")

    def _set(self, name: str, key: Key, value: Any) -> None:
        option = BY_KEY[key]
        where = name if name == option.name else f"{name} ({option.spelling})"
        try:
            converted = option.convert(value)
        except ValueError as error:
            self._found.problems.append(f"{self._path}: {name}: {error}")
            return
        earlier = self._found.values.get(key)
        if earlier is not None and earlier[0] != converted:
            self._found.problems.append(
                f"{self._path} sets {option.spelling} twice: {earlier[1]} = {_shown(earlier[0])} and {name} = "
                f"{_shown(converted)}; make them equal."
            )
        self._found.values[key] = (converted, where)

    def _refuse(self, name: str, value: Any, instead: str) -> None:
        self._found.problems.append(f"{self._path} has {name} = {_shown(value)}, which is not supported: {instead}.")

    def _optimizer(self, name: str, value: Any) -> None:
        kind = str(value).lower()
        if kind not in OPTIMIZERS:
            self._refuse(name, value, f"use one of {', '.join(sorted(OPTIMIZERS))}")
            return
        self._set(name, ("optim", "optimizer"), OPTIMIZERS[kind])

    def _scheduler(self, name: str, value: Any) -> None:
        if not isinstance(value, str) or value not in SCHEDULES:
            self._refuse(name, value, f"use {' or '.join(SCHEDULES)}, or --lr-decay-style and its flags")
            return
        self._set(name, ("optim", "lr_decay_style"), SCHEDULES[value])

    def _warmup_type(self, name: str, value: Any) -> None:
        if value != "linear":
            self._refuse(name, value, "the learning rate warms up linearly; write linear")

    def _betas(self, name: str, value: Any) -> None:
        if not isinstance(value, list) or len(value) != 2:
            self._found.problems.append(f"{self._path}: {name} is {value}; write two numbers, such as [0.9, 0.95].")
            return
        for field_name, beta in zip(("adam_beta1", "adam_beta2"), value, strict=True):
            self._set(name, ("optim", field_name), beta)

    def _loss_scale(self, name: str, value: Any) -> None:
        if value:  # 0 is a dynamic scale, our default
            self._set(name, ("optim", "loss_scale"), value)

    def _initial_scale(self, name: str, value: Any) -> None:
        if not isinstance(value, int) or not 0 <= value <= 64:
            self._found.problems.append(f"{self._path}: {name} is {value}; write an exponent of 2 from 0 to 64.")
            return
        self._set(name, ("optim", "initial_loss_scale"), 2.0**value)

    def _data_efficiency(self, read: DataEfficiency) -> None:
        """Take over what stands in an object with a reader of its own."""
        self._found.problems += [f"{self._path}: {problem}." for problem in read.problems]
        self._found.lines += [
            f"{self._path}: {name} is accepted without effect: {reason}." for name, reason in read.inert
        ]
        if not read.problems:
            for where, name, value in read.values:
                self._set(where, BY_NAME[name].key, value)

    def _tracker(self, name: str, value: Any) -> None:
        """Switches that count by what lies beside them: see `_in_use`."""
        if not isinstance(value, bool):
            self._found.problems.append(f"{self._path}: {name} is {_shown(value)}; write true or false.")

    def _cpu_offload(self, name: str, value: Any) -> None:
        if value:
            field_name = "offload_optimizer" if name.endswith("cpu_offload") else "offload_params"
            self._set(name, ("parallel", field_name), "cpu")


def _in_use(name: str, value: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entries of an object that count: of one that is switched off only the switch."""
    if name in ("fp16", "bf16", "bfloat16", "tensorboard", "wandb") and not value.get("enabled"):
        return {"enabled": value["enabled"]} if "enabled" in value else {}
    if name.startswith("zero_optimization.offload_") and value.get("device") != "nvme":
        return {key: inner for key, inner in value.items() if key != "nvme_path"}
    return value


def _reason_without_effect(name: str) -> str | None:
    return next((reason for reason, names in WITHOUT_EFFECT.items() if name in names.split()), None)


def _is_object(name: str) -> bool:
    """Whether some known key lies inside `name`."""
    return any(key.startswith(f"{name}.") for key in _known_keys())


def _example_of(name: str) -> str:
    """An object in the place of `name`, with the first of its keys."""
    inner = next(key.removeprefix(f"{name}.") for key in _known_keys() if key.startswith(f"{name}."))
    return f'an object of keys, such as {{"{inner}": ...}}'


def _known_keys() -> Iterable[str]:
    yield from (*DIRECT, *REFUSED)
    for names in WITHOUT_EFFECT.values():
        yield from names.split()
