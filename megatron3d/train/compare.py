"""A resumed run compared with the run that wrote its checkpoint: refused, refused unless overridden, or reported.

The table of what each option means is `config/resume.py`; what is read is compared by `data/content.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron3d.checkpoint.index import read_index
from megatron3d.checkpoint.load import read_document
from megatron3d.checkpoint.ranks import ProcessGroup, on_every_rank
from megatron3d.comm.agree import require_agreement
from megatron3d.config.resume import Difference, Effect, differences
from megatron3d.config.run import RunConfig
from megatron3d.config.sections.data import DataConfig
from megatron3d.config.sections.data_efficiency import CurriculumConfig
from megatron3d.config.sections.model import ModelConfig
from megatron3d.config.serialize import from_dict
from megatron3d.data.content import (
    TOKENIZER,
    Content,
    code_differences,
    content_differences,
    content_from_json,
    content_of,
    content_of_paths,
    moved,
    tokenizer_differences,
)
from megatron3d.errors import ConfigError, DataError, MisfitError

CONTENT_DOCUMENT = "content"


@dataclass(frozen=True)
class SavedRun:
    """The run that wrote a checkpoint: its options and, unless it is of an earlier version, what it read."""

    directory: Path
    config: RunConfig
    content: Content | None


def read_saved_run(directory: Path, *, architecture: str | None = None) -> SavedRun:
    """The run that wrote a checkpoint; `architecture` is the one that the user names, see `from_dict`.

    Raises:
        CheckpointError: a document is missing or damaged.
        ConfigError: it is of another version, or of an architecture of a user's own that is not named.
    """
    content = None
    if f"{CONTENT_DOCUMENT}.json" in read_index(directory).documents:
        content = content_from_json(read_document(directory, CONTENT_DOCUMENT))
    try:
        run = from_dict(read_document(directory, "run"), architecture=architecture)
    except ConfigError as error:
        raise ConfigError(f"{directory}: {error}") from error
    return SavedRun(directory, run, content)


def agreed_content(
    data: DataConfig, model: ModelConfig, curriculum: CurriculumConfig, group: ProcessGroup | None
) -> Content:
    """What a run reads, once it is sure that all ranks read the same. Collective over all ranks.

    Raises: DataError if a file cannot be read, or the ranks read different ones; raised on every rank.
    """

    def read() -> Content:
        return content_of(data, vocab_size=model.vocab_size, architecture=model.architecture, curriculum=curriculum)

    content = on_every_rank(read, group)
    require_agreement(content.digests(), DataError)
    return content


def compare_weights(saved: SavedRun, config: RunConfig, content: Content | None) -> list[str]:
    """Lines about what a fine-tuning changes of the rotary frequencies, of the tokenizer, if it may, and of the user's
    own code; the rest is a run of its own.

    Refused is a model that computes another function of the same weights in any other way, and, unless
    --override-tokenizer is given, a tokenizer of the same kind with other content, by which the model's ids mean other
    tokens. A tokenizer of another kind is named on purpose. The arguments are those of `compare_resumed`.

    Raises: MisfitError with all differences.
    """
    found = differences(saved.config, config)
    function = [one for one in found if one.effect is Effect.FUNCTION]
    extension = [one for one in found if one.effect is Effect.EXTENSION]
    tokenizer: list[Difference] = []
    code: list[Difference] = []
    if content is not None and saved.content is not None:
        tokenizer = tokenizer_differences(saved.content, content)
        code = code_differences(saved.content.code, content.code)
    may_differ = config.checkpoint.override_tokenizer or saved.config.data.tokenizer_type != config.data.tokenizer_type
    refused = [] if may_differ else tokenizer
    if function or refused:
        raise MisfitError(_refusal(saved.directory, function, [], refused))
    return [f"changed: {one}" for one in (*extension, *tokenizer, *code)]


def compare_resumed(saved: SavedRun, config: RunConfig, content: Content | None) -> list[str]:
    """Lines about what a resumed run changes and may change.

    Args:
        saved: the run that wrote the checkpoint.
        config: the resolved options of this run.
        content: what this run reads; None does not compare it.

    Raises: MisfitError with all differences that the run may not have.
    """
    found, lines = differences(saved.config, config), []
    if content is not None:
        theirs, ours = saved.content, content
        if theirs is None:
            theirs, ours, line = _as_known_then(saved.config.data, content)
            lines.append(line)
        found += content_differences(theirs, ours, continues=config.data.sample_order != "megatron")
        lines += moved(theirs, ours)
    function = [one for one in found if one.effect in (Effect.FUNCTION, Effect.EXTENSION)]
    is_overridden = config.checkpoint.override_tokenizer
    samples = [one for one in found if one.effect is Effect.SAMPLES and not (is_overridden and one.option == TOKENIZER)]
    may_differ = config.checkpoint.override_sample_order
    if function or (samples and not may_differ):
        continues = config.data.sample_order != "megatron"
        raise MisfitError(_refusal(saved.directory, function, [] if may_differ else samples, continues=continues))
    return [*(f"changed: {one}" for one in found), *lines]


def _as_known_then(saved: DataConfig, content: Content) -> tuple[Content, Content, str]:
    """Both contents as far as a checkpoint without digests knows its own, and a line about the rest."""
    theirs = content_of_paths(saved)
    left = {"all"} if saved.data_args_path is not None else set()
    ours = Content({part: one for part, one in content.corpora.items() if part not in left}, None)
    paths = " ".join(one.prefix for corpora in theirs.corpora.values() for one in corpora)
    where = f"; its data was {paths or saved.data_args_path}" if paths or left else ""
    tokenizer = f"; its tokenizer was {saved.tokenizer_type}" if saved.tokenizer_type else ""
    line = (
        "the checkpoint is of a version that stored no digests of data and tokenizer, so their content was not "
        f"compared{where}{tokenizer}"
    )
    return theirs, ours, line


def _refusal(
    directory: Path,
    function: list[Difference],
    samples: list[Difference],
    tokenizer: Sequence[Difference] = (),
    *,
    continues: bool = True,
) -> str:
    """One sentence a difference, and what to do; `continues` says whether another blend continues its corpora."""
    lines = []
    if function:
        lines += [
            f"{directory} does not fit this run: its weights are those of another function. Give the options of the "
            "checkpoint, or take them from it with --use-checkpoint-args:",
            *(f"  {one}" for one in function),
        ]
    if any(one.effect is Effect.EXTENSION for one in function):
        lines += ["To extend the context of these weights, start from them with --finetune and another --save."]
    if samples:
        lines += [
            f"{directory} counts samples that are not those of this run, which would see some twice and some never. "
            "Give the options of the checkpoint, or resume with the new ones by --override-sample-order"
            + (" (corpora of equal content continue where they stopped):" if continues else ":"),
            *(f"  {one}" for one in samples),
        ]
    if tokenizer:
        lines += [
            f"{directory} was trained with another tokenizer: the ids of its weights mean other tokens. Give the "
            "files of the training, or use these ones by --override-tokenizer:",
            *(f"  {one}" for one in tokenizer),
        ]
    return "\n".join(lines)
