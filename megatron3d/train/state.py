"""What a run knows of its own progress, and how it is saved and taken back.

The whole data state is the number of consumed samples; random numbers have no state at all. Weights are stored as
fp32 masters, from which every precision's weights follow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from megatron3d.checkpoint.async_save import AsyncSave
from megatron3d.checkpoint.index import Index
from megatron3d.checkpoint.load import agreed_index, load_tensors, read_document
from megatron3d.checkpoint.ranks import from_first, gathered, on_every_rank
from megatron3d.checkpoint.save import save_checkpoint
from megatron3d.config.architectures import how_to_train, named
from megatron3d.config.batch_size import iterations_for_samples
from megatron3d.config.lengths import ConsumedCounts, counts_at_end
from megatron3d.config.sections.train import TrainConfig
from megatron3d.config.serialize import other_architecture, to_dict
from megatron3d.data.blend_history import BlendHistory
from megatron3d.data.content import Content, CorpusContent, content_of_paths
from megatron3d.errors import CheckpointError, MisfitError
from megatron3d.optim.build import kind, other_state_views, set_step_count, state_names, step_count
from megatron3d.optim.schedule import (
    ScheduleSettings,
    reconcile,
    schedule_differences,
    settings_from_config,
    settings_like,
)
from megatron3d.params.boxes import ShardView
from megatron3d.params.freeze import is_frozen
from megatron3d.train.compare import CONTENT_DOCUMENT, SavedRun, compare_resumed, compare_weights, read_saved_run
from megatron3d.train.goodput import TimeSpent
from megatron3d.train.setup import TrainingSetup
from megatron3d.train.source import Source, sources
from megatron3d.zero.replicas import require_equal_replicas

DocumentT = TypeVar("DocumentT")
OLD = "old_weights"  # prefix of tensors: what the layers compute with while a delayed update is due
UPDATE_DUE = "update_due"
TIME_DOCUMENT, BLEND_DOCUMENT = "time", "blend"


@dataclass(frozen=True)
class Progress:
    """Steps made, samples and tokens consumed, and how much of each led to an update (fp16 may skip some).

    Tokens are those that steps were made of: samples x --seq-length but for a sequence-length curriculum.
    """

    step: int = 0
    consumed_samples: int = 0
    updates: int = 0
    updated_samples: int = 0
    consumed_tokens: int = 0
    updated_tokens: int = 0

    @property
    def skipped(self) -> int:
        """Steps without an update."""
        return self.step - self.updates

    def after(self, samples: int, *, tokens: int, skipped: bool) -> Progress:
        """The progress after one more step."""
        return Progress(
            self.step + 1,
            self.consumed_samples + samples,
            self.updates + (not skipped),
            self.updated_samples + (0 if skipped else samples),
            self.consumed_tokens + tokens,
            self.updated_tokens + (0 if skipped else tokens),
        )

    def of_updates(self) -> dict[str, int]:
        """What the next step's rates depend on, by the names of `ScheduleSettings.lr_at`."""
        return {
            "iteration": self.updates,
            "consumed_samples": self.updated_samples,
            "consumed_tokens": self.updated_tokens,
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, int], seq_length: int) -> Progress:
        """What a checkpoint stores; versions that did not count tokens had samples of `seq_length` alone."""
        tokens = {
            "consumed_tokens": stored["consumed_samples"] * seq_length,
            "updated_tokens": stored["updated_samples"] * seq_length,
        }
        return cls(**{**tokens, **stored})


@dataclass(frozen=True)
class Restored:
    """Where a run starts: its progress, the schedule it follows, and the checkpoint it came from, if any, and why.

    `damage` says what is wrong with the checkpoint that was asked for, where another was taken instead. `lines`
    report what the run changes. `evaluation_due` means that the run before was stopped within the evaluation
    that follows this step. `time_spent` is that of the run until the checkpoint, zero where it does not say. `blend`
    is what was read of which training corpus, None where the checkpoint does not say; `saved_corpora` are those of the
    run that wrote it.
    """

    progress: Progress
    schedule: ScheduleSettings
    source: Path | None = None
    damage: str | None = None
    why: str = ""
    lines: tuple[str, ...] = ()
    evaluation_due: bool = False
    time_spent: TimeSpent = field(default_factory=TimeSpent)
    blend: BlendHistory | None = None
    saved_corpora: tuple[CorpusContent, ...] = ()


def save(
    parts: TrainingSetup,
    progress: Progress,
    schedule: ScheduleSettings,
    content: Content | None = None,
    *,
    evaluation_due: bool = False,
    background: AsyncSave | None = None,
    time_spent: TimeSpent | None = None,
    blend: BlendHistory | None = None,
) -> Path:
    """Write a checkpoint of this moment below --save; collective over all ranks. `content` is what the run reads, and
    `blend` in which order, where it reads corpora.

    `evaluation_due` says that the evaluation after this step is still to be made. With `background` the checkpoint is
    begun there instead, to be finished later. `time_spent` is that of the run so far, as rank 0 knows it.

    Raises:
        NumericsError: what would be saved is not finite, or ranks that must hold the same values do not.
        StorageError: the file system refused; the checkpoints before are untouched.
        MemoryShortError: there is no memory for the copy of a save in the background.
    """
    with parts.engine.states_opened(parts.optimizer, writes=False):
        _check_replicas(parts, progress.step)
        documents = _documents(parts, progress, schedule, evaluation_due=evaluation_due)
        documents |= {} if content is None else {CONTENT_DOCUMENT: content.to_json()}
        documents |= {} if blend is None else {BLEND_DOCUMENT: blend.to_json()}
        documents |= {} if time_spent is None else {TIME_DOCUMENT: time_spent.to_json()}
        return _save(parts, progress.step, documents, background)


def check_replicas(parts: TrainingSetup, step: int) -> None:
    """Compare everything that several ranks hold, after a step; collective over all ranks.

    Raises:
        NumericsError: ranks that must hold the same values do not.
    """
    with parts.engine.states_opened(parts.optimizer, writes=False):
        _check_replicas(parts, step)


def _check_replicas(parts: TrainingSetup, step: int) -> None:
    states = _flat_views(parts, with_optimizer=True, with_copies=True)
    require_equal_replicas(parts.engine.units, states, parts.mesh, step=step, others=parts.states.replicated())


def _documents(
    parts: TrainingSetup, progress: Progress, schedule: ScheduleSettings, *, evaluation_due: bool
) -> dict[str, dict[str, Any]]:
    """What is stored beside the tensors."""
    config = parts.config
    is_update_due = not config.checkpoint.no_save_optim and parts.engine.is_update_due
    state = {
        "progress": asdict(progress),
        "schedule": schedule.to_json(),
        "scaler": parts.scaler.state(),
        "optimizer": {"kind": kind(config.optim), "step_count": _agreed_step_count(parts)}
        | ({UPDATE_DUE: True} if is_update_due else {}),
        "evaluation_due": evaluation_due,
    }
    return {"run": to_dict(config), "state": state}


def _agreed_step_count(parts: TrainingSetup) -> int:
    """Updates made so far; a rank whose stages are all frozen has not counted them."""
    return max(gathered(step_count(parts.optimizer), parts.mesh.world.group))


def _save(parts: TrainingSetup, step: int, documents: dict[str, dict[str, Any]], background: AsyncSave | None) -> Path:
    options, mesh = parts.config.checkpoint, parts.mesh
    assert options.save is not None, "a run without --save saves nothing"
    with_optimizer = not options.no_save_optim
    views = _views(parts, with_optimizer=with_optimizer, with_copies=False) | _old_views(parts, with_optimizer)
    if background is not None:
        return background.begin(Path(options.save), step, views, documents=documents)
    return save_checkpoint(
        Path(options.save),
        step,
        views,
        documents=documents,
        keep_last=None,
        group=mesh.world.group,
        rank=mesh.rank,
        world_size=mesh.world.size,
    )


def restore(parts: TrainingSetup, content: Content | None = None) -> Restored:
    """Start from the checkpoint that the options and directories give (`train/source.py`), or from the beginning.

    Rank 0 decides which; collective over all ranks. `content` is what the run reads; None does not compare it.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, another rank sees another one, or it does not fit.
        ConfigError: its schedule differs from the flags' and no option says which to follow.
    """
    options, group = parts.config.checkpoint, parts.mesh.world.group
    found = from_first(lambda: sources(options), group)
    damages: list[str] = []
    for source in found:
        try:
            restored = _restore_from(source, parts, content)
            why = "the newest that is whole" if damages else source.why
            found_without = [] if source.damage is None else [source.damage]
            return replace(restored, why=why, damage="; ".join([*found_without, *damages]) or None)
        except MisfitError:
            raise
        except CheckpointError as damage:
            damages.append(str(damage))
            if not options.fall_back_to_previous_checkpoint:
                before = found[1].directory if len(found) > 1 else None
                hint = f"; {before} is the one before: start from it with --fall-back-to-previous-checkpoint"
                raise CheckpointError(f"{damage}{hint if before else ''}") from damage
    if found:
        raise CheckpointError(
            f"none of the {len(found)} checkpoints to start from is whole: {'; '.join(damages)}; restore one of them, "
            "or give another --save directory to start from the initial weights"
        )
    return Restored(Progress(), settings_from_config(parts.config.optim, parts.config.train))


def _restore_from(source: Source, parts: TrainingSetup, content: Content | None) -> Restored:
    options, group = parts.config.checkpoint, parts.mesh.world.group
    directory = source.directory
    index = agreed_index(directory, group)
    saved = on_every_rank(lambda: _saved_run(directory, parts.config.model.architecture), group)
    if source.weights_only:
        lines = compare_weights(saved, parts.config, content)
        _load(directory, parts, saved.config.train.freeze_params, with_optimizer=False)
        flags = settings_from_config(parts.config.optim, parts.config.train)
        return Restored(Progress(), flags, directory, why=source.why, lines=tuple(lines))
    state = on_every_rank(lambda: read_document(directory, "state"), group)
    if state.get("weights_only"):
        raise MisfitError(
            f"{directory} holds weights alone, without steps or optimizer; start from them with --finetune"
        )
    lines = compare_resumed(saved, parts.config, content)
    has_begun = source.is_own and _dropped_optimizer_before(saved, state, kind(parts.config.optim))
    if options.no_load_optim:
        lines.append(_no_load_line(directory, has_begun=has_begun))
    with_optimizer = has_begun or not options.no_load_optim
    if with_optimizer:
        _check_optimizer(state, kind(parts.config.optim), directory)
    schedule, schedule_lines = _schedule(ScheduleSettings.from_json(state["schedule"]), parts)
    _load(directory, parts, saved.config.train.freeze_params, with_optimizer=with_optimizer)
    if with_optimizer:
        lines += _changed_freezing(parts, saved.config.train.freeze_params)
        set_step_count(parts.optimizer, state["optimizer"]["step_count"])
        parts.scaler.load(state["scaler"])
    was_due = with_optimizer and state["optimizer"].get(UPDATE_DUE, False)
    if was_due:
        with parts.engine.delayed_update_restored() as old:
            load_tensors(directory, {f"{OLD}/{name}": view for name, view in old.items()}, group=group)
    lines = [*lines, *schedule_lines, *_delay_lines(parts, was_due=was_due)]
    progress = Progress.from_json(state["progress"], saved.config.model.seq_length)
    # Checkpoints from before there was this entry were written after the evaluation of their step.
    is_due = state.get("evaluation_due", False)
    spent = on_every_rank(lambda: _read_if_stored(directory, index, TIME_DOCUMENT, TimeSpent.from_json), group)
    blend = on_every_rank(lambda: _read_if_stored(directory, index, BLEND_DOCUMENT, BlendHistory.from_json), group)
    return Restored(
        progress,
        schedule,
        directory,
        why=source.why,
        lines=tuple(lines),
        evaluation_due=is_due,
        time_spent=spent or TimeSpent(),
        blend=blend,
        saved_corpora=(saved.content or content_of_paths(saved.config.data)).training,
    )


def _read_if_stored(
    directory: Path, index: Index, document: str, from_json: Callable[[Mapping[str, Any]], DocumentT]
) -> DocumentT | None:
    """What a document holds; None for checkpoints of versions that did not store it."""
    if f"{document}.json" not in index.documents:
        return None
    try:
        return from_json(read_document(directory, document))
    except ValueError as error:
        raise CheckpointError(f"{directory}: {error}; load an earlier checkpoint with --ckpt-step") from error


def _dropped_optimizer_before(saved: SavedRun, state: Mapping[str, Any], optimizer_kind: str) -> bool:
    """Whether --no-load-optim has been obeyed by the run that wrote this, which has built up a state of this kind."""
    was_stored = saved.config.checkpoint.no_load_optim and not saved.config.checkpoint.no_save_optim
    return was_stored and state["optimizer"]["kind"] == optimizer_kind


def _no_load_line(directory: Path, *, has_begun: bool) -> str:
    if has_begun:
        return (
            f"--no-load-optim was obeyed by the run that wrote {directory}, so its optimizer state is loaded; give "
            "--ckpt-step, or another --save, to leave that out too"
        )
    return "the optimizer starts anew (--no-load-optim)"


def _changed_freezing(parts: TrainingSetup, before: Sequence[str]) -> list[str]:
    """Lines about the optimizer state of parameters that train in one of the two runs alone; collective."""
    now = parts.config.train.freeze_params
    slots = [slot for unit in parts.engine.units.values() for slot in unit.layout.slots] if before != now else []
    names = set().union(*gathered([slot.spec.name for slot in slots], parts.mesh.world.group))
    thawed = sum(is_frozen(name, before) and not is_frozen(name, now) for name in names)
    frozen = sum(is_frozen(name, now) and not is_frozen(name, before) for name in names)
    lines = []
    if thawed:
        lines.append(
            f"{thawed} parameters that were frozen in the checkpoint train now: their optimizer state starts from "
            "zero while that of the others is resumed; --no-load-optim starts all of it anew"
        )
    if frozen:
        lines.append(
            f"{frozen} parameters that trained in the checkpoint are frozen now: their optimizer state is dropped"
        )
    return lines


def _load(directory: Path, parts: TrainingSetup, frozen: Sequence[str], *, with_optimizer: bool) -> None:
    """Fill weights, and optimizer state if asked. All weights that are stored must have a place in the model; of
    parameters that were `frozen` in the saved run there is no optimizer state."""
    with parts.engine.states_opened(parts.optimizer, writes=True):
        load_tensors(
            directory,
            _views(parts, with_optimizer=with_optimizer, with_copies=True),
            group=parts.mesh.world.group,
            may_be_left=lambda name: not name.startswith("model/"),
            may_be_missing=lambda name: _may_be_missing(name, parts, frozen),
        )
    parts.engine.publish()


def _may_be_missing(name: str, parts: TrainingSetup, frozen: Sequence[str]) -> bool:
    kind, _, own = name.partition("/")
    return parts.states.may_be_missing(own) if kind == "model" else is_frozen(own, frozen)


def _schedule(saved: ScheduleSettings, parts: TrainingSetup) -> tuple[ScheduleSettings, list[str]]:
    """The schedule to follow, and lines about how that of the checkpoint differs from the flags'."""
    options, flags = parts.config.checkpoint, settings_like(saved, parts.config.optim, parts.config.train)
    chosen = reconcile(
        saved,
        flags,
        override=options.override_opt_param_scheduler,
        use_checkpoint=options.use_checkpoint_opt_param_scheduler,
    )
    by = " (--override-opt-param-scheduler)" if options.override_opt_param_scheduler else ""
    if options.use_checkpoint_opt_param_scheduler:
        by = " (--use-checkpoint-opt_param-scheduler)"
    return chosen, [f"changed: {one}{by}" for one in schedule_differences(saved, flags)]


def _delay_lines(parts: TrainingSetup, *, was_due: bool) -> list[str]:
    """What becomes of a delayed update where only one of the two runs has `--offload-delayed-update`."""
    delays = parts.config.parallel.offload_delayed_update
    if delays == was_due:
        return []
    if was_due:
        return [
            "the checkpoint holds a delayed update that is due; without --offload-delayed-update the layers get the "
            "updated weights at once"
        ]
    return [
        "no delayed update was due in the checkpoint; with --offload-delayed-update the first step computes with "
        "the updated weights, and the delay begins there"
    ]


def _saved_run(directory: Path, wanted: str) -> SavedRun:
    """The run that wrote a checkpoint, of the architecture that is wanted: every tensor of a GPT has a namesake of its
    shape in a BERT, so names of tensors would not tell."""
    if found := other_architecture(read_document(directory, "run"), wanted):
        raise MisfitError(
            f"{directory} holds {named(found)}, not {named(wanted)}; to resume it, {how_to_train(found, wanted)}"
        )
    return read_saved_run(directory, architecture=wanted)


def _check_optimizer(state: Mapping[str, Any], wanted: str, source: Path) -> None:
    saved = state["optimizer"]["kind"]
    if saved != wanted:
        raise MisfitError(
            f"{source} holds the state of --optimizer {saved} and this run asks for {wanted}; "
            "use that optimizer, or leave its state out with --no-load-optim"
        )


def _views(parts: TrainingSetup, *, with_optimizer: bool, with_copies: bool) -> dict[str, ShardView]:
    views = _flat_views(parts, with_optimizer=with_optimizer, with_copies=with_copies)
    return views | {f"model/{name}": view for name, view in parts.states.views().items()}


def _flat_views(parts: TrainingSetup, *, with_optimizer: bool, with_copies: bool) -> dict[str, ShardView]:
    """What lies in the flat buffers of the units."""
    views = {f"model/{name}": view for name, view in parts.engine.weight_views(with_copies=with_copies).items()}
    if with_optimizer:
        views |= parts.engine.beside_views(with_copies=with_copies)
        for state_name in state_names(parts.config.optim):
            states = parts.engine.state_views(parts.optimizer, state_name, with_copies=with_copies)
            views |= {f"{state_name}/{name}": view for name, view in states.items()}
        views |= other_state_views(parts.optimizer, with_copies=with_copies)
    return views


def _old_views(parts: TrainingSetup, with_optimizer: bool) -> dict[str, ShardView]:
    """The weights that the layers compute with while a delayed update is due: part of the optimizer's state."""
    old = parts.engine.old_weight_views(with_copies=False) if with_optimizer else {}
    return {f"{OLD}/{name}": view for name, view in old.items()}


def last_step(train: TrainConfig, data_parallel_size: int, progress: Progress, *, seq_length: int) -> int:
    """The number of the run's last step, seen from `progress`.

    Iterations are counted from the run's beginning. Samples and tokens are counted by what was consumed, whatever
    batches and lengths the steps before had: the whole batches of these options that still fit into the samples, or
    those up to the one that reaches the tokens.
    """
    if train.train_iters is not None:
        return train.train_iters
    assert train.train_samples is not None, "a run has a length"
    if train.train_tokens is not None:
        of_tokens = counts_at_end(train, data_parallel_size, seq_length, tokens=train.train_tokens)
        # Samples that were not given follow from the tokens; given ones end the run where they are fewer.
        samples = train.train_samples if train.train_samples < of_tokens.samples else None
        start = ConsumedCounts(progress.step, progress.consumed_samples, progress.consumed_tokens)
        return counts_at_end(
            train, data_parallel_size, seq_length, start=start, samples=samples, tokens=train.train_tokens
        ).step
    left = iterations_for_samples(train, train.train_samples, data_parallel_size, consumed=progress.consumed_samples)
    return progress.step + left
