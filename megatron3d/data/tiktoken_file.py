"""Megatron-LM's `TikTokenizer`: byte-level BPE from a JSON file of ranks, without the tiktoken package.

The file is a list of `{"rank", "token_bytes" (base64), "token_str"}`: first the 256 bytes, then one token for each
merge. Ids are the ranks behind a block of special tokens, of which unnamed ones are called <SPECIAL_n>. tiktoken merges
at each step the two neighbours whose union has the lowest rank; the `tokenizers` library does the same if every way to
cut a token into two tokens is a merge, in the order of the tokens' ranks.

Source: Megatron-LM `megatron/training/tokenizer/tokenizer.py`, `CustomTikTokenizer`, for format, ids and patterns;
tiktoken `src/lib.rs`, `_byte_pair_merge`, for the order of merges.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from megatron3d.config.sections.data import DataConfig
from megatron3d.errors import ConfigError, DataError

DEFAULT_VOCAB_SIZE = 2**17  # where --vocab-size is not given, at most
_NEEDED_TOKENS = ("<unk>", "<s>", "</s>")
PATTERNS: Mapping[str, str] = MappingProxyType(
    {
        "v1": r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
        "v2": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    }
)


@dataclass(frozen=True)
class TikTokenOptions:
    """What the options say of a TikTokenizer besides its file: the pattern that cuts words, and the special tokens."""

    pattern: str = "v2"
    num_special_tokens: int = 1000
    special_tokens: tuple[str, ...] = ()


def tiktoken_options(data: DataConfig) -> TikTokenOptions:
    """The options of a run."""
    return TikTokenOptions(data.tiktoken_pattern, data.tiktoken_num_special_tokens, data.tiktoken_special_tokens)


def add_tiktoken_arguments(group: argparse._ArgumentGroup) -> None:
    """The flags of a tool that go with a TikTokenizer; `tiktoken_from_arguments` reads them."""
    group.add_argument("--tiktoken-pattern", choices=tuple(PATTERNS), default="v2", help="how words are cut")
    group.add_argument(
        "--tiktoken-num-special-tokens", type=int, default=1000, metavar="N", help="ids before those of the file"
    )
    group.add_argument("--tiktoken-special-tokens", nargs="+", default=(), metavar="TOKEN", help="names of the first")


def tiktoken_from_arguments(args: argparse.Namespace) -> TikTokenOptions:
    """The options that `add_tiktoken_arguments` declared."""
    return TikTokenOptions(args.tiktoken_pattern, args.tiktoken_num_special_tokens, tuple(args.tiktoken_special_tokens))


class TikTokenModel:
    """Text to ids and back; special tokens are never read out of a text.

    Attributes:
        vocab_size: ids, of special tokens and others.
        special_tokens: names of the ids from 0 on; the first `num_named_tokens` are named by the options.
        bos, eod: the ids of <s> and </s>.
        pattern: the expression that cuts a text into words.
        tokens: the bytes of the ids behind the special ones.
    """

    def __init__(self, path: Path, options: TikTokenOptions, vocab_size: int | None) -> None:
        """Read the file; of its tokens the first ones are kept, so that there are `vocab_size` ids in all.

        Raises:
            ConfigError: the special tokens are unusable, or leave no room in the vocabulary.
            DataError: the file is not of this format, or has too few tokens.
        """
        special = _special_tokens(options)
        tokens = _read_tokens(path)
        size = min(DEFAULT_VOCAB_SIZE, len(tokens) + len(special)) if vocab_size is None else vocab_size
        if not len(special) < size <= len(tokens) + len(special):
            raise ConfigError(
                f"--vocab-size {size} does not go with the {len(tokens)} tokens of {path} and "
                f"--tiktoken-num-special-tokens {len(special)}; use --vocab-size {len(tokens) + len(special)}, or one "
                f"between {len(special) + 256} and that."
            )
        self.vocab_size = size
        self.special_tokens = tuple(special)
        self.num_named_tokens = len(options.special_tokens or _NEEDED_TOKENS)
        self.bos, self.eod = special.index("<s>"), special.index("</s>")
        self.pattern = PATTERNS[options.pattern]
        self.tokens = tuple(tokens[: size - len(special)])
        self._library = byte_pair_library(self.tokens, first_id=len(special), pattern=self.pattern)
        self._bytes_by_id = [*(name.encode() for name in special), *self.tokens]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, computed on all cores."""
        return [encoding.ids for encoding in self._library.encode_batch_fast(list(texts), add_special_tokens=False)]

    def as_json(self) -> str:
        """The model in the form of tokenizer.json, without the special tokens, which no text is cut into."""
        return self._library.to_str()

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens appear by their names, bytes that are no UTF-8 become U+FFFD."""
        pieces = (self._bytes_by_id[id] for id in ids if 0 <= id < self.vocab_size)
        return b"".join(pieces).decode("utf-8", errors="replace")


def _special_tokens(options: TikTokenOptions) -> list[str]:
    """The names of all special tokens, in the order of their ids."""
    named = list(options.special_tokens or _NEEDED_TOKENS)
    missing = [name for name in _NEEDED_TOKENS if name not in named]
    if missing or len(set(named)) < len(named):
        raise ConfigError(
            f"--tiktoken-special-tokens {' '.join(named)} must name each token once, and {', '.join(_NEEDED_TOKENS)} "
            "among them; correct it."
        )
    if len(named) > options.num_special_tokens:
        raise ConfigError(
            f"--tiktoken-num-special-tokens {options.num_special_tokens} is less than the {len(named)} named special "
            f"tokens; use at least {len(named)}."
        )
    return [*named, *(f"<SPECIAL_{number}>" for number in range(len(named), options.num_special_tokens))]


def _read_tokens(path: Path) -> list[bytes]:
    """The bytes of each token, in the order of their ranks."""
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"--tokenizer-model {path} cannot be read as the JSON of a TikTokenizer ({error}).") from error
    if not isinstance(parsed, list) or len(parsed) < 256:
        raise DataError(
            f"--tokenizer-model {path} is no vocabulary of a TikTokenizer: that is a JSON list of at least 256 tokens."
        )
    tokens = [_token(path, rank, entry) for rank, entry in enumerate(parsed)]
    wrong = next((rank for rank in range(256) if tokens[rank] != bytes([rank])), None)
    if wrong is not None:
        raise DataError(f"--tokenizer-model {path}: token {wrong} must be the byte {wrong}, not {tokens[wrong]!r}.")
    if len(set(tokens)) < len(tokens):
        raise DataError(f"--tokenizer-model {path} has {len(tokens) - len(set(tokens))} tokens twice; repair it.")
    return tokens


def _token(path: Path, rank: int, entry: Any) -> bytes:
    try:
        if entry["rank"] != rank:
            raise ValueError(f"rank {entry['rank']}")
        return base64.b64decode(entry["token_bytes"], validate=True)
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise DataError(
            f"--tokenizer-model {path}: entry {rank} is no token of that rank with base64 token_bytes ({error})."
        ) from error


def byte_pair_library(
    tokens: Sequence[bytes], *, first_id: int, pattern: str, special_tokens: Sequence[str] = ()
) -> tokenizers.Tokenizer:
    """tiktoken's model in the `tokenizers` library, which writes bytes as letters of GPT-2's alphabet.

    Args:
        tokens: the bytes of each token, in the order of their ranks.
        first_id: the id of the first.
        pattern: the expression that cuts a text into words.
        special_tokens: names of ids below `first_id` from 0 on, or of those above all others; part of the vocabulary,
            and no text is cut into them.

    Raises: DataError if the name of a special token is that of another token in this alphabet.
    """
    letters = byte_letters()
    ids = {"".join(letters[byte] for byte in token): first_id + rank for rank, token in enumerate(tokens)}
    if taken := [name for name in special_tokens if name in ids]:
        raise DataError(
            f"the special token {taken[0]} is also the text of token {ids[taken[0]]}, and a tokenizer.json has one id "
            "for each name; leave the tokenizer out (--no-tokenizer)"
        )
    merges = [
        (token[:cut], token[cut:])
        for token in ids
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    first_special = 0 if first_id else len(tokens)
    vocab = ids | {name: first_special + number for number, name in enumerate(special_tokens)}
    # A whole word that is a token is one, even where no order of merges leads to it.
    library = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    return library


def byte_letters() -> list[str]:
    """The letter that stands for each byte: itself where it is visible, else one from U+0100 on.

    Source: GPT-2 `encoder.py`, `bytes_to_unicode`.
    """
    visible = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(256 + hidden.index(byte)) for byte in range(256)]
