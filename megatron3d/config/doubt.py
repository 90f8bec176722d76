"""Which sentences about a run are mere consequences of a mistake that is reported already.

All problems of a command are reported at once, so values that could not be read are checked around. A sentence that
names such an option would blame the user twice: `--num-layer 2` is one mistake, not also a missing `--num-layers`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from megatron3d.config.options import BY_NAME, BY_SPELLING

# What a value is derived from, and the words of sentences that do not name their options.
_DERIVED_FROM = {
    "--ffn-hidden-size": "hidden_size activation swiglu squared_relu",
    "--kv-channels": "hidden_size num_attention_heads",
    "--num-query-groups": "group_query_attention",
    "data-parallel": "tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size",
    "A world of": "tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size",
    "the batch grows": "rampup_batch_size step_batch_size_schedule",
    "No data is given": "data_path train_data_path data_args_path mock_data",
    "The size of the vocabulary": "tokenizer_type vocab_file vocab_size",
}
_FLAG = re.compile(r"--[A-Za-z][\w-]*")


@dataclass(frozen=True)
class Doubt:
    """What is not known of a run.

    Attributes:
        unread: names of options that were given and could not be used.
        known: names of options that were given, where a file that may set others could not be read; else None.
    """

    unread: frozenset[str] = frozenset()
    known: frozenset[str] | None = None

    def with_unread(self, names: Iterable[str]) -> Doubt:
        """The same with more options that could not be used."""
        return Doubt(self.unread | frozenset(names), self.known)

    def explains(self, sentence: str) -> bool:
        """Whether the sentence would not stand if what is in doubt were known.

        A sentence ends with its remedy, which may name what could have been in an unreadable file; so there the part
        before the semicolon decides.
        """
        if _options_in(sentence) & self.unread:
            return True
        if self.known is None:
            return False
        subject = _options_in(sentence.split(";")[0])
        return not subject or not subject <= self.known


NO_DOUBT = Doubt()


def _options_in(sentence: str) -> frozenset[str]:
    """The names of the options that a sentence is about."""
    names = {BY_SPELLING[flag].name for flag in _FLAG.findall(sentence) if flag in BY_SPELLING}
    for words, sources in _DERIVED_FROM.items():
        if words in sentence:
            names |= {name for name in sources.split() if name in BY_NAME}
    return frozenset(names)
