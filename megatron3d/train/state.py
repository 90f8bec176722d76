"""What a run knows of its own progress, and how it is saved and taken back.

The whole data state is the number of consumed samples; random numbers have no state at all. Weights are stored as
fp32 masters, from which every precision's weights follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron3d.checkpoint.directory import find_checkpoint, list_checkpoints
from megatron3d.checkpoint.load import load_tensors, read_document
from megatron3d.checkpoint.save import save_checkpoint
from megatron3d.config.batch_size import iterations_for_samples
from megatron3d.config.checkpoint import CheckpointConfig
from megatron3d.config.run import RunConfig
from megatron3d.config.serialize import to_dict
from megatron3d.errors import CheckpointError, MisfitError
from megatron3d.optim.build import kind, other_state_views, set_step_count, state_names, step_count
from megatron3d.optim.schedule import ScheduleSettings, reconcile, settings_from_config
from megatron3d.params.boxes import ShardView
from megatron3d.train.parts import Parts

OLD = "old_weights"  # prefix of tensors: what the layers compute with while a delayed update is due
UPDATE_DUE = "update_due"


@dataclass(frozen=True)
class Progress:
    """Steps made, samples consumed, and how much of both led to an update (fp16 may skip some)."""

    step: int = 0
    consumed_samples: int = 0
    updates: int = 0
    updated_samples: int = 0

    @property
    def skipped(self) -> int:
        """Steps without an update."""
        return self.step - self.updates

    def after(self, samples: int, *, skipped: bool) -> Progress:
        """The progress after one more step."""
        return Progress(
            self.step + 1,
            self.consumed_samples + samples,
            self.updates + (not skipped),
            self.updated_samples + (0 if skipped else samples),
        )


@dataclass(frozen=True)
class Restored:
    """Where a run starts: its progress, the schedule it follows, and the checkpoint it came from, if any.

    `damage` says what is wrong with the checkpoint that was asked for, where the one before was taken instead, and
    `delay_note` what becomes of a delayed update where only one of the two runs has `--offload-delayed-update`.
    `evaluation_due` tells that the run before was stopped within the evaluation that follows this step.
    """

    progress: Progress
    schedule: ScheduleSettings
    source: Path | None = None
    damage: str | None = None
    delay_note: str | None = None
    evaluation_due: bool = False


def save(parts: Parts, progress: Progress, schedule: ScheduleSettings, *, evaluation_due: bool = False) -> Path:
    """Write a checkpoint of this moment below --save; collective over all ranks.

    `evaluation_due` says that the evaluation after this step is still to be made.

    Raises:
        StorageError: the file system refused; the checkpoints before are untouched.
    """
    with parts.engine.states_opened(parts.optimizer, writes=False):
        return _save(parts, progress, schedule, evaluation_due)


def _save(parts: Parts, progress: Progress, schedule: ScheduleSettings, evaluation_due: bool) -> Path:
    config, mesh = parts.config, parts.mesh
    with_optimizer = not config.checkpoint.no_save_optim
    state = {
        "progress": asdict(progress),
        "schedule": schedule.to_json(),
        "scaler": parts.scaler.state(),
        "optimizer": {
            "kind": kind(config.optim),
            "step_count": step_count(parts.optimizer),
            UPDATE_DUE: with_optimizer and parts.engine.is_update_due,
        },
        "evaluation_due": evaluation_due,
    }
    return save_checkpoint(
        Path(config.checkpoint.save),
        progress.step,
        _views(parts, with_optimizer=with_optimizer, with_copies=False) | _old_views(parts, with_optimizer),
        documents={"run": to_dict(config), "state": state},
        keep_last=config.checkpoint.keep_last,
        group=mesh.world.group,
        rank=mesh.rank,
        world_size=mesh.world.size,
    )


def restore(parts: Parts) -> Restored:
    """Start from the checkpoint that the options name, or from the beginning; collective over all ranks.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, or it belongs to another model.
        ConfigError: its schedule differs from the flags' and no option says which to follow.
    """
    options = parts.config.checkpoint
    flags = settings_from_config(parts.config.optim, parts.config.train)
    source = source_of(options)
    if source is None:
        return Restored(Progress(), flags)
    try:
        return _restore_from(source, parts, flags)
    except MisfitError:
        raise
    except CheckpointError as damage:
        before = _checkpoint_before(source)
        if not options.fall_back_to_previous_checkpoint or before is None:
            hint = f"; {before} is the one before: start from it with --fall-back-to-previous-checkpoint"
            raise CheckpointError(f"{damage}{hint if before else ''}") from damage
        return replace(_restore_from(before, parts, flags), damage=str(damage))


def source_of(options: CheckpointConfig) -> Path | None:
    """The checkpoint directory to start from; None starts from the beginning.

    `--load` names it; where only `--save` is given, a run goes on from its own latest checkpoint. The same directory
    for both may be empty, as launch scripts that restart themselves need.
    """
    if options.load is None or options.load == options.save:
        root = Path(options.save) if options.save else None
        if root is None or (options.ckpt_step is None and not list_checkpoints(root)):
            return None
        return find_checkpoint(root, options.ckpt_step)
    return find_checkpoint(Path(options.load), options.ckpt_step)


def _checkpoint_before(directory: Path) -> Path | None:
    older = [path for path in list_checkpoints(directory.parent) if path.name < directory.name]
    return older[-1] if older else None


def _restore_from(source: Path, parts: Parts, flags: ScheduleSettings) -> Restored:
    options, group = parts.config.checkpoint, parts.mesh.world.group
    state = read_document(source, "state")
    _check_architecture(read_document(source, "run"), parts.config.model.architecture, source)
    with_optimizer = not (options.finetune or options.no_load_optim)
    if state.get("weights_only") and not options.finetune:
        raise MisfitError(f"{source} holds weights alone, without steps or optimizer; start from them with --finetune")
    if with_optimizer:
        _check_optimizer(state, kind(parts.config.optim), source)
    with parts.engine.states_opened(parts.optimizer, writes=True):
        load_tensors(source, _views(parts, with_optimizer=with_optimizer, with_copies=True), group=group)
    parts.engine.publish()
    if options.finetune:
        return Restored(Progress(), flags, source)
    if with_optimizer:
        set_step_count(parts.optimizer, state["optimizer"]["step_count"])
        parts.scaler.load(state["scaler"])
    was_due = with_optimizer and state["optimizer"].get(UPDATE_DUE, False)
    if was_due:
        with parts.engine.delayed_update_restored() as old:
            load_tensors(source, {f"{OLD}/{name}": view for name, view in old.items()}, group=group)
    saved = ScheduleSettings.from_json(state["schedule"])
    schedule = reconcile(
        saved,
        flags,
        override=options.override_opt_param_scheduler,
        use_checkpoint=options.use_checkpoint_opt_param_scheduler,
    )
    # Checkpoints from before there was this entry were written after the evaluation of their step.
    evaluation_due = state.get("evaluation_due", False)
    delay_note = _delay_note(parts, was_due=was_due)
    progress = Progress(**state["progress"])
    return Restored(progress, schedule, source, delay_note=delay_note, evaluation_due=evaluation_due)


def _delay_note(parts: Parts, *, was_due: bool) -> str | None:
    delays = parts.config.parallel.offload_delayed_update
    if delays == was_due:
        return None
    if was_due:
        return (
            "the checkpoint holds a delayed update that is due; without --offload-delayed-update the layers get the "
            "updated weights at once"
        )
    return (
        "no delayed update was due in the checkpoint; with --offload-delayed-update the first step computes with "
        "the updated weights, and the delay begins there"
    )


def _check_architecture(run: Mapping[str, Any], wanted: str, source: Path) -> None:
    """Every tensor of a GPT has a namesake of its shape in a BERT, so names alone would not tell."""
    saved = run["model"].get("architecture", "gpt")
    if saved != wanted:
        raise MisfitError(f"{source} holds a {saved.upper()}, not a {wanted.upper()}; go on with pretrain_{saved}.py")


def _check_optimizer(state: Mapping[str, Any], wanted: str, source: Path) -> None:
    saved = state["optimizer"]["kind"]
    if saved != wanted:
        raise MisfitError(
            f"{source} holds the state of --optimizer {saved} and this run asks for {wanted}; "
            "use that optimizer, or leave its state out with --no-load-optim"
        )


def _views(parts: Parts, *, with_optimizer: bool, with_copies: bool) -> dict[str, ShardView]:
    views = {f"model/{name}": view for name, view in parts.engine.weight_views(with_copies=with_copies).items()}
    if with_optimizer:
        for state_name in state_names(parts.config.optim):
            states = parts.engine.state_views(parts.optimizer, state_name, with_copies=with_copies)
            views |= {f"{state_name}/{name}": view for name, view in states.items()}
        views |= other_state_views(parts.optimizer, with_copies=with_copies)
    return views


def _old_views(parts: Parts, with_optimizer: bool) -> dict[str, ShardView]:
    """The weights that the layers compute with while a delayed update is due: part of the optimizer's state."""
    old = parts.engine.old_weight_views(with_copies=False) if with_optimizer else {}
    return {f"{OLD}/{name}": view for name, view in old.items()}


def total_steps(config: RunConfig) -> int:
    """Optimizer steps of the whole run, from iterations or samples."""
    if config.train.train_iters is not None:
        return config.train.train_iters
    return iterations_for_samples(config.train, config.train.train_samples, config.parallel.data_parallel_size)
