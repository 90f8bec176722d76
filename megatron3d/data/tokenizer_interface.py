"""What every tokenizer offers, whatever it is made of; and the wrapper of the `tokenizers` library's.

Which tokenizer a run has is answered in `tokenizer.py`, for a Hugging Face directory in `hf_tokenizer.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import models

from megatron3d.data.library_errors import as_data_error


@dataclass(frozen=True)
class SpecialIds:
    """The ids that mean something beyond text; None or nothing where a tokenizer has no such token.

    Attributes:
        eod: ends a document in training data.
        bos: begins a text.
        pad, cls, sep, mask: those of BERT.
        ends: where generation stops; empty stands for `eod` alone.
        prefix: what the tokenizer's own description puts before a text, such as (bos,).
        suffix: what it puts behind a text.
    """

    eod: int | None = None
    bos: int | None = None
    pad: int | None = None
    cls: int | None = None
    sep: int | None = None
    mask: int | None = None
    ends: tuple[int, ...] = ()
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()


class Tokenizer(ABC):
    """A tokenizer: `vocab_size` ids from 0 on, and the special ones among them.

    Attributes:
        library: the name of the library that finds the ids; None where they need none.
    """

    library: str | None = None

    def __init__(self, vocab_size: int, special: SpecialIds) -> None:
        """Keep the number of ids (before any padding) and the special ids."""
        self.vocab_size = vocab_size
        self.eod, self.bos, self.pad = special.eod, special.bos, special.pad
        self.cls, self.sep, self.mask = special.cls, special.sep, special.mask
        self.ends = special.ends or (() if special.eod is None else (special.eod,))
        self.prefix, self.suffix = special.prefix, special.suffix

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without special tokens."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens appear by their names where they have one."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text; libraries that can use all cores do."""
        return [self.encode(text) for text in texts]

    def encode_arrays(self, texts: Sequence[str], dtype: np.dtype) -> tuple[NDArray, NDArray[np.int64]]:
        """The ids of all texts in a row, in `dtype`, and how many each text has."""
        rows = self.encode_batch(texts)
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        return np.fromiter(chain.from_iterable(rows), dtype=dtype, count=int(lengths.sum())), lengths

    def as_json(self) -> str | None:
        """The tokenizer in the form of tokenizer.json, for other libraries; None if that form does not give its ids."""
        return None

    def word_continuations(self) -> list[bool] | None:
        """For each id whether its piece goes on with the word before it; None where pieces do not say so."""
        return None

    def tokens(self) -> list[str | None] | None:
        """The token of each id, None for gaps; None where ids have no names."""
        return None


class LibraryTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library."""

    library = "tokenizers"

    def __init__(self, library: tokenizers.Tokenizer, special: SpecialIds) -> None:
        """Wrap `library`; added tokens count among the vocabulary, and gaps among the ids do too."""
        vocab = library.get_vocab(with_added_tokens=True)
        super().__init__(max(vocab.values(), default=-1) + 1, special)
        self._library = library

    def encode(self, text: str) -> list[int]:
        """The ids of `text`. The batch form is used for one text too: it skips the offsets that nobody asks for."""
        return self._encodings([text])[0].ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, computed on all cores."""
        return [encoding.ids for encoding in self._encodings(list(texts))]

    def _encodings(self, texts: list[str]) -> list[tokenizers.Encoding]:
        """Raises: DataError for texts that the tokenizer has no ids for."""
        others = " or one of its neighbours" if len(texts) > 1 else ""
        # A model may lack the id that stands for unknown characters.
        with as_data_error(f"the tokenizer cannot encode {''.join(texts[:1])!r:.40}{others}", "repair its files"):
            return self._library.encode_batch_fast(texts, add_special_tokens=False)

    def as_json(self) -> str:
        """The library's own form."""
        return self._library.to_str()

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`."""
        return self._library.decode(list(ids), skip_special_tokens=False)

    def word_continuations(self) -> list[bool] | None:
        """True for the pieces of a word-piece model that begin with its mark, ## in BERT."""
        model = self._library.model
        if not isinstance(model, models.WordPiece):
            return None
        mark = model.continuing_subword_prefix
        return [piece is not None and piece.startswith(mark) for piece in self.tokens()]

    def tokens(self) -> list[str | None]:
        """The token of each id, None for gaps."""
        return [self._library.id_to_token(id) for id in range(self.vocab_size)]
