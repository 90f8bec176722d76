"""Which checkpoint a run starts from, by its options and by what lies in --load and --save: "start again to go on".

The rules, where both directories hold checkpoints: of --load and --save the later step is resumed; with --finetune
(and --pretrained-checkpoint) any checkpoint in --save is resumed, for it is the run that was started that way. A
--ckpt-step within --save turns back on purpose, once: a checkpoint that was written after such a turn is resumed. So
the same command started again continues where it stopped, and `latest` goes back only when asked.

One rank applies the rules (`train/state.py`); files are looked at and never changed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron3d.checkpoint.directory import find_checkpoint, list_checkpoints, step_of, was_saved_to
from megatron3d.checkpoint.index import INDEX_NAME, read_index
from megatron3d.checkpoint.load import read_document
from megatron3d.config.sections.checkpoint import CheckpointConfig
from megatron3d.errors import CheckpointError


@dataclass(frozen=True)
class Source:
    """A checkpoint to start from: all of it (a resume) or its weights alone, and why this one.

    `is_own` means that it is in --save and was not asked for by its step: what the same command may have written.
    `damage` says what is wrong with `latest`, or with the step asked for, where this one was found without it.
    """

    directory: Path
    weights_only: bool
    why: str
    is_own: bool = False
    damage: str | None = None


@dataclass(frozen=True)
class _Published:
    """The checkpoints of one directory that may be started from, best first, and `damage` as in `Source`."""

    paths: Sequence[Path] = ()
    damage: str | None = None

    def resumed(self, why: str, *, is_own: bool = False) -> list[Source]:
        """All of them as sources of a resume."""
        return [Source(path, False, why, is_own, self.damage) for path in self.paths]

    def weights(self, why: str) -> list[Source]:
        """All of them as sources of weights."""
        return [Source(path, True, why, damage=self.damage) for path in self.paths]


def sources(options: CheckpointConfig) -> list[Source]:
    """The checkpoint to start from, then those to fall back to, best first; empty for the initial weights.

    Raises:
        CheckpointError: there should be one and is not: --load names nothing, or checkpoints once were in --save.
    """
    turn = _turn_back_step(options.load, options.save, options.ckpt_step)
    if turn is not None or options.load is None or is_same_directory(options.load, options.save):
        return _in_place(options, turn)
    own = _published(Path(options.save), None, options) if options.save else _Published()
    load = Path(options.load)
    if (own.paths or options.pretrained_checkpoint) and not was_saved_to(load):
        return own.resumed(f"--load {load} holds no checkpoint", is_own=True) or _pretrained(options)
    given = _published(load, options.ckpt_step, options, must_exist=True)
    if options.finetune:
        why = f"the fine-tuning of {given.paths[0]} has begun; give another --save to begin it again"
        return [*own.resumed(why, is_own=True), *given.weights("--finetune takes its weights")]
    return _by_step(given, own)


def is_same_directory(one: str | None, other: str | None) -> bool:
    """Whether two options name one directory, which need not exist."""
    return one is not None and other is not None and os.path.realpath(one) == os.path.realpath(other)


def _turn_back_step(load: str | None, save: str | None, step: int | None) -> int | None:
    """The step within --save that the options ask to turn back to, by --ckpt-step or as --load SAVE/iter_...; or None.

    Without --save nothing is turned back: what is loaded stays as it is.
    """
    if save is None:
        return None
    if load is not None and is_same_directory(str(Path(load).parent), save) and _is_checkpoint_name(Path(load)):
        return step_of(Path(load))
    return step if load is None or is_same_directory(load, save) else None


def _is_checkpoint_name(path: Path) -> bool:
    try:
        step_of(path)
    except CheckpointError:
        return False
    return True


def _in_place(options: CheckpointConfig, turn: int | None) -> list[Source]:
    """The sources of a run that loads from where it saves."""
    place = options.save or options.load
    if place is None:
        return _pretrained(options)
    root = Path(place)
    if turn is not None:
        written_after = _written_after_turn(root, turn)
        if written_after is not None:
            why = f"it was written after turning back to step {turn}; give another --save to turn back again"
            return _Published([written_after, *_earlier(written_after)]).resumed(why, is_own=True)
        found = _published(root, turn, options)
        way = "turning back to" if found.damage is None else "the newest that is there before"
        return found.resumed(f"{way} step {turn}")
    found = _published(root, None, options)
    if found.paths:
        return found.resumed(
            f"the {'latest' if found.damage is None else 'newest that is there'} in --save", is_own=True
        )
    if options.pretrained_checkpoint is None and options.exit_on_missing_checkpoint:
        raise CheckpointError(
            f"--exit-on-missing-checkpoint: {root} holds no checkpoint; give the directory that --save wrote, or leave "
            "the option out to start from the initial weights"
        )
    return _pretrained(options)


def _pretrained(options: CheckpointConfig) -> list[Source]:
    if options.pretrained_checkpoint is None:
        return []
    found = _published(Path(options.pretrained_checkpoint), None, options)
    if not found.paths:
        raise CheckpointError(
            f"--pretrained-checkpoint {options.pretrained_checkpoint} holds no checkpoint; give the directory that "
            "--save wrote"
        )
    return found.weights("--pretrained-checkpoint gives the weights")


def _published(root: Path, step: int | None, options: CheckpointConfig, *, must_exist: bool = False) -> _Published:
    """The checkpoint of `step`, or the latest, and those before it, newest first; empty if there never was one.

    Where that one is gone or `latest` is damaged, the first is the newest that there is, if falling back is allowed;
    of two branches the newest of the one written last.

    Raises: CheckpointError if one was there and is not, if there is none and one `must_exist`, or none of `step`.
    """
    if step is None and not must_exist and not was_saved_to(root):
        return _Published()
    try:
        first = find_checkpoint(root, step)
    except CheckpointError as damage:
        remaining = [path for path in reversed(list_checkpoints(root)) if step is None or step_of(path) < step]
        left = _left_by_turning_back(remaining) if step is None else []
        remaining = [path for path in remaining if path not in left]
        if options.fall_back_to_previous_checkpoint and remaining:
            names = ", ".join(path.name for path in left)
            of_branch = f"; {names} was passed over: the run has turned back from it since" if left else ""
            return _Published(remaining, f"{damage}{of_branch}")
        hint = ""
        if remaining:
            hint = f"; {remaining[0]} is there: start from it with --fall-back-to-previous-checkpoint"
        elif was_saved_to(root) and step is None:
            hint = "; put the checkpoint back, or give another --save directory to start anew"
        raise CheckpointError(f"{damage}{hint}") from damage
    return _Published([first, *_earlier(first)])


def _earlier(directory: Path) -> list[Path]:
    """Checkpoints of earlier steps beside this one, newest first; none if it lies alone."""
    try:
        own = step_of(directory)
    except CheckpointError:
        return []  # --load names one checkpoint under a name of its own
    return [path for path in reversed(list_checkpoints(directory.parent)) if step_of(path) < own]


def _written_after_turn(root: Path, turn: int) -> Path | None:
    """The latest checkpoint in `root`, if the run that wrote it had turned back to the same step."""
    try:
        latest = find_checkpoint(root)
    except CheckpointError:
        return None  # then the step says what to take, and loading it finds what is damaged
    return latest if _turn_before(latest) == turn and step_of(latest) > turn else None


def _turn_before(directory: Path) -> int | None:
    """The step to which the run that wrote this checkpoint had turned back, if it had; None if that is damaged."""
    try:
        saved = read_document(directory, "run")["checkpoint"]
    except CheckpointError:
        return None
    return _turn_back_step(saved["load"], saved["save"], saved["ckpt_step"])


def _left_by_turning_back(found: Sequence[Path]) -> list[Path]:
    """Of the checkpoints of one directory those from which its run turned back: later steps, but written earlier."""
    turns = {path: turn for path in found if (turn := _turn_before(path)) is not None and turn < step_of(path)}
    if not turns:
        return []
    written = {path: (path / INDEX_NAME).stat().st_mtime_ns for path in found}
    last = max(turns, key=written.__getitem__)
    return [
        path
        for path in found
        if step_of(path) > turns[last]
        and written[path] < written[last]
        and (step_of(path) > step_of(last) or turns.get(path) != turns[last])
    ]


def _by_step(given: _Published, own: _Published) -> list[Source]:
    """Checkpoints of --load and of --save, later steps first, and of equal steps that of --save."""
    if not own.paths:
        return given.resumed("--load names it" if given.damage is None else "the newest that is there in --load")
    mine, other = own.paths[0], given.paths[0]
    ours, theirs = _step(mine), _step(other)
    why_own = f"--save is at step {ours} and --load, {other.parent}, at step {theirs}: the later one is resumed"
    if ours == theirs:
        why_own = f"--save and --load, {other.parent}, are both at step {ours}: the run's own is resumed"
    why_given = f"--load is at step {theirs} and --save, {mine.parent}, at step {ours}: the later one is resumed"
    # Either damage bears on which step is the later one.
    damage = "; ".join(one.damage for one in (own, given) if one.damage is not None) or None
    found = [*own.resumed(why_own, is_own=True), *given.resumed(why_given)]
    return [replace(one, damage=damage) for one in sorted(found, key=lambda one: -_step(one.directory))]


def _step(directory: Path) -> int:
    try:
        return step_of(directory)
    except CheckpointError:
        return read_index(directory).step
