"""The tokenizer of a fine-tuning: that of the weights it starts from, or a file that holds the same vocabulary."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron3d.config.data import DataConfig
from megatron3d.data.content import require_same_tokenizer
from megatron3d.data.tokenizer import Tokenizer, TokenizerSpec
from megatron3d.errors import ConfigError
from megatron3d.tasks.glue.weights import Origin

_PADDED_VOCABULARY = 128  # a model may have fewer than this many rows beyond its tokens, for speed


def choose_tokenizer(words: DataConfig, origin: Origin, *, override: bool) -> tuple[DataConfig, Tokenizer]:
    """The tokenizer that the options name, else the one that the weights were trained with.

    Files with other content than those of the training are used only by `override`.

    Raises:
        ConfigError: neither names one, or it is not that of the model.
    """
    named = ("tokenizer_type", "vocab_file", "merge_file", "tokenizer_model")
    given = {name: vars(words)[name] for name in named if vars(words)[name] is not None}
    if given.get("vocab_file") and "tokenizer_type" not in given:
        own = origin.data.tokenizer_type or ""
        given["tokenizer_type"] = own if own.startswith("BertWordPiece") else "BertWordPieceLowerCase"
    options = replace(words, **(given or {name: vars(origin.data)[name] for name in named}))
    if options.tokenizer_type is None:
        raise ConfigError(f"{origin.path} names no tokenizer; give --vocab-file, the vocab.txt it was trained with.")
    files = (options.vocab_file, options.merge_file, options.tokenizer_model)
    tokenizer = TokenizerSpec(options.tokenizer_type, *files, vocab_size=origin.model.vocab_size).build()
    if not override and options.vocab_file is not None and origin.data.vocab_file is not None:
        _check_vocabulary(Path(options.vocab_file), Path(origin.data.vocab_file), origin)
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


def _check_vocabulary(given: Path, own: Path, origin: Origin) -> None:
    """Another vocabulary may be as large as the model's own, where that one is still at hand to compare."""
    if given == own or not own.is_file():
        return
    with given.open(encoding="utf-8") as ours, own.open(encoding="utf-8") as theirs:
        for number, (here, there) in enumerate(zip(ours, theirs), 1):
            if here.rstrip() != there.rstrip():
                raise ConfigError(
                    f"--vocab-file {given} is another vocabulary than {own}, which the model in {origin.path} was "
                    f"trained with: line {number} is {here.rstrip()!r} instead of {there.rstrip()!r}; leave the option "
                    "out."
                )
