"""Where a value that a sentence names comes from, where the user did not write it as a flag.

Rules speak of values by their flags: "--ffn-hidden-size 256 is not a multiple of --tensor-model-parallel-size 3". Who
gave neither would look for them in vain, so the origin is put behind the value: (the default), (derived from
--hidden-size), (in run.json), (of --preset NAME), (which --erf-gelu means).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron3d.config.options import BY_NAME, BY_SPELLING, Option, Settings
from megatron3d.config.run import DraftRun, GivenRun

_FLAG = re.compile(r"--[A-Za-z][\w-]*")
# What an option is derived from where it is not given.
DERIVED_FROM: Mapping[str, str] = {
    "activation": "swiglu squared_relu openai_gelu",
    "ffn_hidden_size": "hidden_size activation swiglu squared_relu",
    "kv_channels": "hidden_size num_attention_heads",
    "num_query_groups": "group_query_attention num_attention_heads",
    "max_position_embeddings": "seq_length",
    "num_token_types": "bert_binary_head",
    "rotary_scaling": "position_embedding_type rotary_seq_len_interpolation_factor",
    "rotary_scaling_factor": "rotary_scaling rotary_seq_len_interpolation_factor "
    "rotary_original_max_position_embeddings max_position_embeddings seq_length",
    "rotary_original_max_position_embeddings": "rotary_scaling",
    "pipeline_schedule": "num_virtual_stages_per_pipeline_rank num_layers_per_virtual_pipeline_stage",
    "zero_stage": "use_distributed_optimizer",
    "global_batch_size": "step_batch_size_schedule micro_batch_size gradient_accumulation_steps",
    "train_samples": "train_tokens",
    "recompute_granularity": "recompute_activations recompute_method",
    "recompute_method": "recompute_granularity",
    "recompute_num_layers": "recompute_granularity recompute_method",
    "lr_decay_iters": "train_iters",
    "lr_decay_samples": "lr_decay_tokens train_samples train_tokens",
    "lr_decay_tokens": "train_tokens train_samples",
    "lr_warmup_samples": "lr_warmup_tokens",
    "tokenizer_type": "vocab_file merge_file",
}


def origins_of(settings: Settings, layers: Iterable[tuple[Settings, str]]) -> Mapping[str, str]:
    """The origin of each setting by the option's name: the phrase of the first layer with its value, empty for none."""
    layers = tuple(layers)
    return {
        key[1]: next((phrase for layer, phrase in layers if key in layer and layer[key] == value), "")
        for key, value in settings.items()
    }


@dataclass(frozen=True)
class Origins:
    """Where the values of a run come from.

    Attributes:
        of_given: `origins_of` what was given.
        given: the run as it was given.
        run: the same with derived values.
    """

    of_given: Mapping[str, str]
    given: GivenRun
    run: DraftRun

    def put_into(self, sentence: str) -> str:
        """The sentence with the origin of each value before the semicolon that no flag gave.

        After the semicolon stands the remedy, whose values are proposals.
        """
        problem, semicolon, remedy = sentence.partition(";")
        parts, done = [], 0
        for found in _FLAG.finditer(problem):
            option = self._set_by(found.group())
            if option is None:
                continue
            end = found.end() + self._length_of_value(option, problem[found.end() :])
            is_value_shown = end > found.end() or option.flag.kind != "value"
            origin = self._origin(option) if is_value_shown else ""
            parts += [problem[done:end], f" ({origin})" if origin else ""]
            done = end
        return "".join([*parts, problem[done:], semicolon, remedy])

    def _set_by(self, flag: str) -> Option | None:
        """The option that a flag sets: another one where it was given several values."""
        option = BY_SPELLING.get(flag)
        several = BY_NAME.get(option.flag.several) if option is not None else None
        return several if several is not None and several.value_in(self.given) else option

    def _origin(self, option: Option) -> str:
        if option.name in self.of_given:
            return self.of_given[option.name]
        value = option.value_in(self.run)
        if option.flag.kind != "value" or value is None or option.value_in(self.given) != option.default:
            return ""
        names = (BY_NAME[name] for name in DERIVED_FROM.get(option.name, "").split())
        sources = " and ".join(one.spelling for one in names if one.value_in(self.given) != one.default)
        return f"derived from {sources}" if sources else "the default"

    def _length_of_value(self, option: Option, text: str) -> int:
        """How many letters of a text that follows the option's flag are its value; 0 if it is none."""
        texts = {f" {word}" for run in (self.given, self.run) for word in _texts(option.value_in(run))}
        for value in sorted(texts | {f" is{one}" for one in texts}, key=len, reverse=True):
            if text.startswith(value) and not re.match(r"[\w-]|[.,]\w", text[len(value) :]):
                return len(value)
        return 0


def _texts(value: Any) -> Iterator[str]:
    """The ways in which sentences write a value."""
    if isinstance(value, bool) or value is None:
        return
    yield " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    if isinstance(value, float):
        yield f"{value:g}"
