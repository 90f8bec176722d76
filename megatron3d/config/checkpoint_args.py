"""`--use-checkpoint-args`: the options of the model out of a checkpoint's `run.json`, as Megatron-LM takes them.

All options that say which function the weights compute, and the dropout, override the flags. The sequence length and
the tokenizer come from the checkpoint unless the flags give them: a fine-tuning may be of another length, and files
move. That the tokenizer is the same is checked when the checkpoint is loaded, as all else is (`config/resume.py`).

This runs before any option is required and before torch is imported, so it reads the files by itself.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron3d.config.options import BY_KEY, Settings
from megatron3d.config.resume import EFFECTS, Effect
from megatron3d.config.run import RunConfig
from megatron3d.config.serialize import from_dict
from megatron3d.errors import CheckpointError, MisfitError
from megatron3d.files.fields import Fields
from megatron3d.files.json_text import parse_object

_NAME = re.compile(r"(?:\.old-)?iter_\d+")
_MORE = ("hidden_dropout", "attention_dropout", "make_vocab_size_divisible_by")
_TOKENIZER = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file")
_OF_TOKENIZER = ("tiktoken_pattern", "tiktoken_num_special_tokens", "tiktoken_special_tokens")
OVERRIDDEN = (
    *(key for key, effect in EFFECTS.items() if effect is Effect.FUNCTION and key != ("data", "eod_token")),
    *(("model", name) for name in _MORE),
)
# Switches that the options above contain once they are resolved: those of the flags are dropped.
_CONTAINED = tuple(("model", name) for name in ("swiglu", "squared_relu", "openai_gelu", "group_query_attention"))


def with_checkpoint_args(settings: Settings, say: Callable[[str], None]) -> dict[tuple[str, str], Any]:
    """The settings with those of the checkpoint, if `--use-checkpoint-args` is among them; `say` takes what changes.

    Raises: CheckpointError if --load names no whole checkpoint; ConfigError if it is of another version.
    """
    changed = dict(settings)
    if not settings.get(("checkpoint", "use_checkpoint_args")):
        return changed
    directory = _directory(settings)
    if directory is None:
        say("--use-checkpoint-args: there is no checkpoint yet, so the flags describe the model.")
        return changed
    stored = from_dict(_read_run(directory))
    wanted, found = settings["model", "architecture"], stored.model.architecture
    if wanted != found:
        raise MisfitError(
            f"--use-checkpoint-args: {directory} holds a {found.upper()}, not a {wanted.upper()}; "
            f"use pretrain_{found}.py"
        )
    for key in _CONTAINED:
        changed.pop(key, None)
    for key in OVERRIDDEN:
        _override(changed, key, stored, say)
    if not any(settings.get(("data", name)) for name in _TOKENIZER):
        changed.update({("data", name): getattr(stored.data, name) for name in (*_TOKENIZER, *_OF_TOKENIZER)})
    changed.setdefault(("data", "eod_token"), stored.data.eod_token)
    changed.setdefault(("model", "seq_length"), stored.model.seq_length)
    say(f"--use-checkpoint-args: the model's options are those of {directory}")
    return changed


def _override(
    changed: dict[tuple[str, str], Any], key: tuple[str, str], stored: RunConfig, say: Callable[[str], None]
) -> None:
    option, value = BY_KEY[key], getattr(getattr(stored, key[0]), key[1])
    given = changed.get(key, value)
    if given != value:
        say(f"{option.spelling} {given} is overridden by the checkpoint's {value} (--use-checkpoint-args)")
    changed[key] = value


def _directory(settings: Settings) -> Path | None:
    """The checkpoint whose options count: of --save the latest, else that of --load, else the pretrained one.

    None where a run starts that has saved nothing yet.
    """
    place = {name: settings.get(("checkpoint", name)) for name in ("save", "load", "pretrained_checkpoint")}
    step = settings.get(("checkpoint", "ckpt_step"))
    for name, directory in place.items():
        found = None if directory is None else _published(Path(directory), None if name != "load" else step)
        if found is not None:
            return found
    missing = place["load"] if place["load"] != place["save"] else None
    missing = missing or place["pretrained_checkpoint"]
    if missing is not None:
        raise CheckpointError(
            f"--use-checkpoint-args: {missing} holds no checkpoint to take options from; give the directory that "
            "--save wrote, or leave the option out and give the model's options"
        )
    return None


def _published(root: Path, step: int | None) -> Path | None:
    """The checkpoint of `step`, else the one that `latest` names, or `root` itself."""
    if (root / "run.json").is_file():
        return root
    try:
        name = f"iter_{step:07d}" if step is not None else (root / "latest").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    is_checkpoint = _NAME.fullmatch(name) is not None  # and not a path that leads out of the directory
    return root / name if is_checkpoint and (root / name / "run.json").is_file() else None


def _read_run(directory: Path) -> Mapping[str, Any]:
    """`run.json`, which must be what the index says."""
    try:
        data = (directory / "run.json").read_bytes()
        index = Fields(parse_object((directory / "index.json").read_bytes()), "index.json")
        if zlib.crc32(data) != int(index.objects("documents")["run.json"].text("crc32"), 16):
            raise ValueError("its checksum disagrees with index.json")
        return parse_object(data)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"--use-checkpoint-args: {directory / 'run.json'} cannot be used ({error}); name another checkpoint with "
            "--ckpt-step, or leave the option out and give the model's options"
        ) from error
