"""What the user of a stored run gave, apart from what followed from it: `run.json` read as a config file.

A `run.json` holds the values that were used, and beside them what was given instead of those that were derived. Only
what was given is a setting again, so that `--config run.json --hidden-size 128` derives the width of the MLP anew.

Earlier versions stored no such record. Of their runs a value counts as derived if the run would be the same without
it. The global batch size alone is kept then, as it was before, since it would follow another number of ranks; it is
derived if what it is made of changes, or if accumulation steps or a schedule stand beside it, which also give it. The
vocabulary and the end of a document were the tokenizer's if flags name another one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron3d.config.derive import derive
from megatron3d.config.layers import names_other_tokenizer
from megatron3d.config.options import BY_KEY, Settings, given_run
from megatron3d.config.rules.bounds import with_defaults_where_wrong
from megatron3d.config.run import DraftRun
from megatron3d.config.serialize import AS_GIVEN
from megatron3d.errors import ConfigError
from megatron3d.files.json_text import is_whole_number
from megatron3d.files.user_code import is_user_code

# The options that `derive` sets, each before those it is derived from.
DERIVED: tuple[tuple[str, str], ...] = (
    *(("model", name) for name in ("ffn_hidden_size", "kv_channels", "num_query_groups", "activation")),
    *(("model", f"rotary_{name}") for name in ("scaling_factor", "original_max_position_embeddings", "scaling")),
    *(("model", name) for name in ("max_position_embeddings", "num_token_types")),
    *(("parallel", name) for name in ("pipeline_schedule", "zero_stage")),
    *(("optim", name) for name in ("lr_decay_iters", "lr_decay_samples", "lr_warmup_samples")),
    ("optim", "lr_decay_tokens"),
    *(("train", name) for name in ("recompute_num_layers", "recompute_method", "recompute_granularity")),
    *(("train", name) for name in ("train_samples", "global_batch_size")),
    ("data", "tokenizer_type"),
)
_ARCHITECTURE = ("model", "architecture")
_OF_TRAITS = ("activation", "num_token_types")  # what is derived from an architecture
# What follows from the tokenizer.
_VOCABULARY, _END = ("model", "vocab_size"), ("data", "eod_token")
_BATCH = ("train", "global_batch_size")
_ALSO_GIVE_BATCH = (("train", "gradient_accumulation_steps"), ("train", "step_batch_size_schedule"))
_MADE_OF = {("train", "micro_batch_size"), *_ALSO_GIVE_BATCH}


def ranks_of_stored_run(parsed: Mapping[str, Any]) -> int | None:
    """The number of ranks of the run that a file holds, or None if it was not written as a `run.json`."""
    parallel = parsed.get("parallel")
    ranks = parallel.get("world_size") if isinstance(parallel, Mapping) else None
    return ranks if is_whole_number(ranks, 1) else None


def with_given_values(parsed: Mapping[str, Any]) -> Mapping[str, Any]:
    """The sections of a `run.json` as they were given; nothing else is changed.

    Raises: ConfigError if its record of that is damaged.
    """
    record = parsed[AS_GIVEN]
    if not isinstance(record, Mapping) or not all(
        isinstance(values, Mapping) and isinstance(parsed.get(section), Mapping) for section, values in record.items()
    ):
        raise ConfigError(f"{AS_GIVEN} is {record!r:.60} and must hold objects, named by sections that are there")
    given = {section: {**parsed[section], **_not_default(section, values)} for section, values in record.items()}
    return {name: one for name, one in parsed.items() if name != AS_GIVEN} | given


def _not_default(section: str, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The values with None for those that are the default, such as the stage beside --use-distributed-optimizer."""
    options = {name: BY_KEY.get((section, name)) for name in values}
    return {name: None if one and one.default == values[name] else values[name] for name, one in options.items()}


def edits(parsed: Mapping[str, Any], settings: Settings, ranks: int) -> Iterator[str]:
    """A sentence for each derived value of a `run.json` that is not what its other values, `settings`, give.

    Somebody changed it, or what it is derived from, by hand; it would be passed over without a word. What follows from
    the code of an architecture in the user's own file is not looked at.
    """
    of_code = {("model", name): parsed["model"].get(name) for name in _OF_TRAITS} if _is_code(settings) else {}
    try:
        derived = _derived({**settings, **of_code}, ranks)
    except ConfigError:  # of an architecture that cannot be had, which is reported when it is asked for
        return
    for section, name in DERIVED:
        value = parsed[section].get(name) if section in parsed[AS_GIVEN] else None
        again = vars(vars(derived)[section])[name]
        if value is not None and name in parsed[AS_GIVEN][section] and value != again:
            yield (
                f"{name} is {value} in {section}, but it was derived, and the other values of the file give {again}; "
                f"take it out of {AS_GIVEN} to keep {value}, or out of {section} to use {again}."
            )


def without_derived(settings: Settings, ranks: int, flags: Settings) -> Settings:
    """The settings of a run of an earlier version without those that were derived.

    Args:
        settings: those of all options.
        ranks: how many the run had.
        flags: what the flags set.
    """
    is_batch_kept = _MADE_OF.isdisjoint(flags) and all(settings.get(key) is None for key in _ALSO_GIVE_BATCH)
    given = {key: value for key, value in settings.items() if key not in _of_tokenizer(settings, flags)}
    try:
        stored = _derived(given, ranks)
        for key in DERIVED:
            without = {name: value for name, value in given.items() if name != key}
            is_same = _derived(without, ranks) == stored
            if is_same and not (key == _BATCH and is_batch_kept):
                given = without
    except ConfigError:  # of an architecture that cannot be had, which is reported when it is asked for
        return settings
    return given


def _of_tokenizer(settings: Settings, flags: Settings) -> tuple[tuple[str, str], ...]:
    """What the tokenizer of a run gave it that the flags change."""
    if settings.get(("data", "tokenizer_type")) is not None and names_other_tokenizer(settings, flags):
        return (_VOCABULARY, _END)
    is_counted = settings.get(("data", "tokenizer_type")) == "NullTokenizer" and _VOCABULARY in flags
    return (_END,) if is_counted and settings.get(_END) == settings.get(_VOCABULARY, 0) - 1 else ()


def _is_code(settings: Settings) -> bool:
    return is_user_code(settings.get(_ARCHITECTURE, ""))


def _derived(settings: Settings, ranks: int) -> DraftRun:
    """The run of some settings, with a GPT for an architecture in the user's own file, which is not run for this."""
    if _is_code(settings):
        settings = {**settings, _ARCHITECTURE: "gpt"}
    return derive(with_defaults_where_wrong(given_run(settings)), ranks)
