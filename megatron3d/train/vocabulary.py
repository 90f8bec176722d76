"""Where the vocabulary of a run comes from: the tokenizer that the options name, or the options alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron3d.config.check import with_vocab_size
from megatron3d.config.derive import what_was_given
from megatron3d.config.run import DraftRun, RunConfig
from megatron3d.data.fim import fill_in_the_middle
from megatron3d.data.tiktoken_file import tiktoken_options
from megatron3d.data.tokenizer import Tokenizer, TokenizerSpec
from megatron3d.errors import ConfigError


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer, if one is named, and the end-of-document token, if there is one."""

    tokenizer: Tokenizer | None
    eod_token: int | None


def open_vocabulary(config: DraftRun) -> tuple[RunConfig, Vocabulary]:
    """Build the tokenizer and resolve the run with the size of its vocabulary.

    Raises:
        ConfigError: the tokenizer does not fit --vocab-size, or neither is given; or --fim-data lacks tokens.
        DataError: a file of the tokenizer is missing or damaged.
    """
    data = config.data
    tokenizer = None
    if data.tokenizer_type is not None:
        files = {"vocab_file": data.vocab_file, "merge_file": data.merge_file, "tokenizer_model": data.tokenizer_model}
        tokenizer = TokenizerSpec(
            data.tokenizer_type, **files, vocab_size=config.model.vocab_size, tiktoken=tiktoken_options(data)
        ).build()
    eod = data.eod_token if tokenizer is None or data.eod_token is not None else tokenizer.eod
    size = config.model.vocab_size if tokenizer is None else tokenizer.vocab_size
    if size is None:
        raise ConfigError(
            "The size of the vocabulary is unknown; name the tokenizer by --tokenizer-type with its files, or give "
            "--vocab-size."
        )
    fill_in_the_middle(data, tokenizer, eod)  # its tokens are looked for now, and used by whoever reads samples
    # The end of a document is settled too, so that checkpoints say which token it was.
    draft = replace(config, data=replace(data, eod_token=eod))
    settled = with_vocab_size(replace(draft, as_given=what_was_given(config, draft)), size)
    return settled, Vocabulary(tokenizer, eod)
