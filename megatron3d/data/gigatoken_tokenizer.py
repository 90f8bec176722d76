"""The gigatoken library: the ids of a tokenizer of the `tokenizers` library many times as fast, where it has that kind.

It is an optional package with its own implementation of byte-level BPE, so the ids are the same by test and not by
construction: who uses it compares them first (`prepare/encoder.py`).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron3d.data.library_errors import as_data_error
from megatron3d.data.tokenizer_interface import SpecialIds, Tokenizer
from megatron3d.errors import ConfigError, DataError, install_extra

# Characters. The library keeps every word that it has met, which takes 8 bytes for each byte of new words, and has no
# limit for that; so it is built again, which takes 0.2 s, as often as keeps its memory within bounds.
_RENEWED_AFTER = 1 << 30


class GigatokenTokenizer(Tokenizer):
    """The ids of `reference`, found by gigatoken in the thread that asks; all else is left to `reference`."""

    library = "gigatoken"

    def __init__(self, reference: Tokenizer) -> None:
        """Give the tokenizer to the library.

        Raises: ConfigError if the library is not installed, DataError if it does not have this kind of tokenizer.
        """
        super().__init__(
            reference.vocab_size,
            SpecialIds(
                eod=reference.eod,
                bos=reference.bos,
                pad=reference.pad,
                cls=reference.cls,
                sep=reference.sep,
                mask=reference.mask,
                ends=reference.ends,
                prefix=reference.prefix,
                suffix=reference.suffix,
            ),
        )
        try:
            self._package = importlib.import_module("gigatoken")
        except ImportError as error:
            raise ConfigError(f"gigatoken is not installed; run: {install_extra('gigatoken')}") from error
        if (description := reference.as_json()) is None:
            raise DataError("gigatoken does not have this kind of tokenizer: it has byte-level BPE")
        self._reference, self._description = reference, description
        self._library, self._num_characters = self._built(), 0

    def encode(self, text: str) -> list[int]:
        """The ids of `text`."""
        return self._encoded(text).tolist()

    def encode_arrays(self, texts: Sequence[str], dtype: np.dtype) -> tuple[NDArray, NDArray[np.int64]]:
        """The ids of all texts in a row, in `dtype`, and how many each text has.

        The library's own batches come as arrays of a further package, whose import takes longer than ours of all
        else and whose building longer than the calls that they save; and they may use threads, which a forked process
        does not have.
        """
        rows = [self._encoded(text) for text in texts]
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        ids = np.concatenate(rows, dtype=dtype, casting="unsafe") if rows else np.empty(0, dtype)
        return ids, lengths

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`."""
        return self._reference.decode(ids)

    def _built(self) -> Any:
        """The tokenizer in the library. Raises: DataError if that does not have this kind."""
        try:
            with as_data_error("it refuses the tokenizer", "use another encoder"):
                return self._package.Tokenizer.from_json(self._description)
        except DataError as error:
            reason = str(error.__cause__).split("\n")[0]  # a place in its sources follows
            raise DataError(f"gigatoken does not have this kind of tokenizer: {reason:.200}") from error

    def _encoded(self, text: str) -> NDArray:
        """The ids as the library gives them."""
        if self._num_characters >= _RENEWED_AFTER:
            self._library, self._num_characters = self._built(), 0
        self._num_characters += len(text)
        return self._library.encode(text)
