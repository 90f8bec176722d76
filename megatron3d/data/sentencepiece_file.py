"""A sentencepiece model as a tokenizer: ids and text are those of the sentencepiece library itself.

Two things name such a file: the kinds SentencePieceTokenizer, GPTSentencePieceTokenizer and Llama2Tokenizer
(`tokenizer.py`), which never read a special token out of a text, and a Hugging Face directory whose class runs the
library (`hf_sentencepiece.py`), where a special token's name in a text is the token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import sentencepiece

from megatron3d.data.tokenizer_interface import SpecialIds, Tokenizer
from megatron3d.errors import DataError

_NOTHING: Mapping[str, int] = MappingProxyType({})


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model; the end of a document is the model's end of sentence."""

    library = "sentencepiece"

    def __init__(
        self,
        path: Path,
        *,
        option: str = "--tokenizer-model ",
        special: SpecialIds | None = None,
        found_in_texts: Mapping[str, int] = _NOTHING,
    ) -> None:
        """Load the model.

        Args:
            path: the .model file.
            option: what stands before the path in messages.
            special: the special ids; None takes those of the model.
            found_in_texts: names that stand for one id wherever they are in a text.

        Raises: DataError if the file is no sentencepiece model.
        """
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise DataError(f"{option}{path} cannot be read as a sentencepiece model ({error}).") from error
        super().__init__(self._model.get_piece_size(), self._own_special_ids() if special is None else special)
        self._found_in_texts = dict(found_in_texts)
        self._names = {id: name for name, id in found_in_texts.items()}
        longest_first = sorted(found_in_texts, key=len, reverse=True)
        self._splitter = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None

    def encode(self, text: str) -> list[int]:
        """The ids of `text`."""
        if self._splitter is None:
            return self._model.encode(text)
        ids: list[int] = []
        for part in self._splitter.split(text):
            ids += [self._found_in_texts[part]] if part in self._found_in_texts else self._model.encode(part)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, computed by one thread."""
        if self._splitter is None:
            return self._model.encode(list(texts), num_threads=1)
        return super().encode_batch(texts)

    def pieces(self, text: str) -> list[str]:
        """The pieces that `text` is cut into."""
        return self._model.encode(text, out_type=str)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`."""
        texts, run = [], []
        for id in map(int, ids):
            if id in self._names:
                texts += [self._model.decode(run), self._names[id]]
                run = []
            else:
                run.append(id)
        return "".join([*texts, self._model.decode(run)])

    def id_of(self, *names: str) -> int | None:
        """The id of the first of `names` that is a piece of the model."""
        unknown = self._model.unk_id()
        ids = ((name, self._model.piece_to_id(name)) for name in names)
        return next((id for name, id in ids if id != unknown or name == self._model.id_to_piece(unknown)), None)

    def _own_special_ids(self) -> SpecialIds:
        return SpecialIds(
            eod=_valid(self._model.eos_id()),
            bos=_valid(self._model.bos_id()),
            pad=_valid(self._model.pad_id()),
            cls=self.id_of("<CLS>", "[CLS]"),
            sep=self.id_of("<SEP>", "[SEP]"),
            mask=self.id_of("<MASK>", "[MASK]"),
        )


def parse_model(path: Path) -> Any:
    """What a model file holds: pieces, and how it was trained. Raises: DataError if it is no sentencepiece model."""
    # Few runs read one themselves, and protobuf takes longer to import than the library.
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue] protobuf makes it
    try:
        model.ParseFromString(path.read_bytes())
    except (OSError, DecodeError) as error:
        raise DataError(f"{path} cannot be read as a sentencepiece model ({error}); fetch it again") from error
    return model


def _valid(id: int) -> int | None:
    """`id`, or None for the library's -1 that says there is none."""
    return None if id < 0 else id
