"""The tokenizer of a fine-tuning: that of the weights it starts from, or a file that holds the same vocabulary."""

from __future__ import annotations

from dataclasses import replace

from megatron3d.config.sections.data import DataConfig
from megatron3d.config.tokenizer_copy import beside_checkpoint
from megatron3d.convert.tokenizer_choice import tokenizer_of, with_given
from megatron3d.data.content import require_same_tokenizer
from megatron3d.data.tokenizer import Tokenizer, TokenizerSpec
from megatron3d.errors import ConfigError
from megatron3d.tasks.glue.weights import InitialWeights

_OPTIONS = ("tokenizer_type", "vocab_file", "merge_file", "tokenizer_model")
_PADDED_VOCABULARY = 128  # a model may have fewer than this many rows beyond its tokens, for speed


def choose_tokenizer(words: DataConfig, origin: InitialWeights, *, override: bool) -> tuple[DataConfig, Tokenizer]:
    """The tokenizer that the options name, else the one that the weights were trained with.

    Files with other content than those of the training are used only by `override`.

    Raises:
        ConfigError: neither names one, or it is not that of the model.
    """
    own = beside_checkpoint(origin.data, origin.path)
    given = {name: vars(words)[name] for name in _OPTIONS}
    chosen = with_given(own, given)
    options = replace(words, **{name: vars(chosen)[name] for name in _OPTIONS})
    if options.tokenizer_type is None:
        raise ConfigError(f"{origin.path} names no tokenizer; give --vocab-file, the vocab.txt it was trained with.")
    files = (options.vocab_file, options.merge_file, options.tokenizer_model)
    tokenizer = TokenizerSpec(options.tokenizer_type, *files, vocab_size=origin.model.vocab_size).build()
    if chosen != own and not override:
        _check_vocabulary(tokenizer, own, origin, next(filter(None, files), options.tokenizer_type))
    here, there = tokenizer.vocab_size, origin.model.vocab_size
    name = next(filter(None, files), options.tokenizer_type)
    if not here <= there < here + _PADDED_VOCABULARY:
        raise ConfigError(
            f"the vocabulary {name} has {here} tokens, but the model in {origin.path} was trained "
            f"with {there}; give the vocabulary of the model with --vocab-file."
        )
    if not override:
        require_same_tokenizer(origin.content, options, origin.model.vocab_size, source=origin.path)
    return options, tokenizer


def _check_vocabulary(tokenizer: Tokenizer, own: DataConfig, origin: InitialWeights, name: str) -> None:
    """Another vocabulary may be as large as the model's own, where that one is still at hand to compare."""
    assert origin.model.vocab_size is not None, "the model of a checkpoint has its vocabulary settled"
    theirs = tokenizer_of(own, origin.model.vocab_size)
    pairs = zip(tokenizer.tokens() or (), (theirs.tokens() if theirs is not None else None) or ())
    for id, (here, there) in enumerate(pairs):
        if here != there:
            raise ConfigError(
                f"{name} is another vocabulary than {own.vocab_file or own.tokenizer_model}, which the model in "
                f"{origin.path} was trained with: id {id} is {here!r} instead of {there!r}; leave the option out."
            )
