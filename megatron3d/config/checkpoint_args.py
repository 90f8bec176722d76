"""`--use-checkpoint-args`: the options of the model out of a checkpoint's `run.json`, as Megatron-LM takes them.

All options that say which function the weights compute, and the dropout, override the flags. The sequence length, the
tokenizer and what extends the context of rotary positions come from the checkpoint unless the flags give them: a
fine-tuning may be of another length, and files move. A scaling that flags give is theirs with all its options. That the
tokenizer is the same is checked when the checkpoint is loaded, as all else is (`config/resume.py`).

This runs before any option is required and before torch is imported, so it reads the files by itself.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron3d.config.architectures import how_to_train, named
from megatron3d.config.options import BY_KEY, Settings
from megatron3d.config.resume import EFFECTS, Effect
from megatron3d.config.serialize import from_dict, other_architecture
from megatron3d.config.tokenizer_copy import beside_checkpoint
from megatron3d.errors import CheckpointError, MisfitError
from megatron3d.files.fields import Fields
from megatron3d.files.json_text import parse_object

_NAME = re.compile(r"(?:\.old-)?iter_\d+")
_LATEST = ("latest", ".tmp-latest")
_MORE = ("hidden_dropout", "attention_dropout", "make_vocab_size_divisible_by")
_TOKENIZER = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file")
_OF_TOKENIZER = ("tiktoken_pattern", "tiktoken_num_special_tokens", "tiktoken_special_tokens")
OVERRIDDEN = (
    *(key for key, effect in EFFECTS.items() if effect is Effect.FUNCTION and key != ("data", "eod_token")),
    *(("model", name) for name in _MORE),
)
_EXTENSION = tuple(key for key, effect in EFFECTS.items() if effect is Effect.EXTENSION)
_BASE, _LONGEST = ("model", "rotary_base"), ("model", "max_position_embeddings")
_INTERPOLATION = ("model", "rotary_seq_len_interpolation_factor")
_POSITIONS, _SCALING = ("model", "position_embedding_type"), ("model", "rotary_scaling")
# Switches that the options above contain once they are resolved: those of the flags are dropped.
_CONTAINED = tuple(("model", name) for name in ("swiglu", "squared_relu", "openai_gelu", "group_query_attention"))


def with_checkpoint_args(settings: Settings, log: Callable[[str], None]) -> dict[tuple[str, str], Any]:
    """The settings with those of the checkpoint, if `--use-checkpoint-args` is among them; `log` takes what changes.

    Raises: CheckpointError if --load names no whole checkpoint; ConfigError if it is of another version.
    """
    changed = dict(settings)
    if not settings.get(("checkpoint", "use_checkpoint_args")):
        return changed
    directory = _directory(settings)
    if directory is None:
        log("--use-checkpoint-args: there is no checkpoint yet, so the flags describe the model.")
        return changed
    run, wanted = _read_run(directory), settings["model", "architecture"]
    if found := other_architecture(run, wanted):
        raise MisfitError(
            f"--use-checkpoint-args: {directory} holds {named(found)}, not {named(wanted)}; "
            f"{how_to_train(found, wanted)}"
        )
    stored = from_dict(run, architecture=wanted)
    for key in _CONTAINED:
        changed.pop(key, None)
    is_rotary = stored.model.position_embedding_type == "rope"
    if is_rotary:
        _extend(changed, vars(stored.model))
    for key in OVERRIDDEN:
        if not (is_rotary and key == _LONGEST and key in changed):
            _override(changed, key, getattr(getattr(stored, key[0]), key[1]), log)
    if not any(settings.get(("data", name)) for name in _TOKENIZER):
        data = beside_checkpoint(stored.data, directory)
        changed.update({("data", name): getattr(data, name) for name in (*_TOKENIZER, *_OF_TOKENIZER)})
    changed.setdefault(("data", "eod_token"), stored.data.eod_token)
    changed.setdefault(("model", "seq_length"), stored.model.seq_length)
    log(f"--use-checkpoint-args: the model's options are those of {directory}")
    return changed


def _extend(changed: dict[tuple[str, str], Any], stored: Mapping[str, Any]) -> None:
    """Take what extends the context from the stored model where flags do not give it."""
    if changed.get(_POSITIONS) == "yarn":
        changed[_POSITIONS] = "rope"
        changed.setdefault(_SCALING, "yarn")
    scaling = [key for key in _EXTENSION if key != _BASE]
    for key in (_BASE, *(scaling if changed.keys().isdisjoint((*scaling, _INTERPOLATION)) else ())):
        changed.setdefault(key, stored[key[1]])


def _override(
    changed: dict[tuple[str, str], Any], key: tuple[str, str], value: Any, log: Callable[[str], None]
) -> None:
    option = BY_KEY[key]
    given = changed.get(key, value)
    if given != value:
        log(f"{option.spelling} {given} is overridden by the checkpoint's {value} (--use-checkpoint-args)")
    changed[key] = value


def _directory(settings: Settings) -> Path | None:
    """The checkpoint whose options count: of --save the latest, else that of --load, else the pretrained one.

    None where a run starts that has saved nothing yet.
    """
    place = {name: settings.get(("checkpoint", name)) for name in ("save", "load", "pretrained_checkpoint")}
    step = settings.get(("checkpoint", "ckpt_step"))
    may_fall_back = bool(settings.get(("checkpoint", "fall_back_to_previous_checkpoint")))
    for name, directory in place.items():
        if directory is None:
            continue
        in_place = name == "save" and place["load"] in (None, directory)
        steps = (None, step) if in_place and step is not None else (step if name == "load" else None,)
        found = _published(Path(directory), steps, may_fall_back=may_fall_back)
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


def _published(root: Path, steps: Sequence[int | None], *, may_fall_back: bool) -> Path | None:
    """`root` itself, or the first that is there of the checkpoints of `steps` (None: that which `latest` names).

    If there is none and falling back is allowed, it is the newest whose options can be read; so it is where those of
    the first cannot. None where nothing was ever saved.

    Raises: CheckpointError if a checkpoint was there and is gone.
    """
    if (root / "run.json").is_file():
        return root
    names = _checkpoint_names(root)
    if not names and not any((root / name).exists() for name in _LATEST):
        return None
    wanted = [_latest_name(root) if step is None else f"iter_{step:07d}" for step in steps]
    found = next((root / name for name in map(names.get, wanted) if name is not None), None)
    if found is not None and (not may_fall_back or _is_readable(found)):
        return found
    bound = steps[-1]
    earlier = [name for name in sorted(names, key=_step, reverse=True) if bound is None or _step(name) < bound]
    remaining = [root / names[name] for name in earlier if _is_readable(root / names[name])]
    if found is not None or (may_fall_back and remaining):
        return remaining[0] if remaining else found
    asked = f"{root / 'latest'} names {wanted[0]!r}" if bound is None else f"--ckpt-step {bound} asks for {wanted[-1]}"
    hint = f"; {remaining[0]} is there: start from it with --fall-back-to-previous-checkpoint" if remaining else ""
    raise CheckpointError(
        f"--use-checkpoint-args: {asked}, which is gone from {root}{hint}; or leave the option out and give "
        "the model's options"
    )


def _checkpoint_names(root: Path) -> dict[str, str]:
    """The directories in `root` that have options, by the name of their checkpoint; see `checkpoint/directory.py`."""
    entries = sorted(root.iterdir()) if root.is_dir() else []
    named = [entry.name for entry in entries if _NAME.fullmatch(entry.name) and (entry / "run.json").is_file()]
    # Those set aside (.old-...) come first by name, so that the others take their place.
    return {name.removeprefix(".old-"): name for name in named}


def _step(name: str) -> int:
    return int(name.removeprefix("iter_"))


def _latest_name(root: Path) -> str:
    """What `latest` names, or what a run was about to write there when it was killed; empty if it cannot be read."""
    for name in _LATEST:
        try:
            return (root / name).read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError):
            break
    return ""


def _is_readable(directory: Path) -> bool:
    try:
        _read_run(directory)
    except CheckpointError:
        return False
    return True


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
