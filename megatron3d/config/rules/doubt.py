"""Which sentences about a run are mere consequences of a mistake that is reported already.

All problems of a command are reported at once, so values that could not be read are checked around. A sentence that
names such an option would blame the user twice: `--num-layer 2` is one mistake, not also a missing `--num-layers`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from megatron3d.config.options import BY_SPELLING

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
        perhaps: names of options that were not given and that a file which could not be read may have set.
    """

    unread: frozenset[str] = frozenset()
    perhaps: frozenset[str] = frozenset()

    def with_unread(self, names: Iterable[str]) -> Doubt:
        """The same with more options that could not be used."""
        return Doubt(self.unread | frozenset(names), self.perhaps)

    def explains(self, sentence: str) -> bool:
        """Whether the sentence would not stand if what is in doubt were known.

        What an unreadable file may set is doubted less than what was given and not understood: there the part before
        the semicolon decides, as the remedy after it names more options; and one that names no option falls only if
        all that it depends on may be in the file.
        """
        named, sources = _named_in(sentence), _sources_of(sentence)
        if (named | sources) & self.unread:
            return True
        subject = _named_in(sentence.split(";")[0])
        return bool(subject & self.perhaps) if subject else bool(sources) and sources <= self.perhaps


NO_DOUBT = Doubt()


def _named_in(sentence: str) -> frozenset[str]:
    """The names of the options whose flags stand in a sentence."""
    return frozenset(BY_SPELLING[flag].name for flag in _FLAG.findall(sentence) if flag in BY_SPELLING)


def _sources_of(sentence: str) -> frozenset[str]:
    """The names of the options that a sentence depends on without naming them."""
    return frozenset(name for words, names in _DERIVED_FROM.items() if words in sentence for name in names.split())
