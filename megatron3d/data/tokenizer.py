"""Text to token ids and back, under Megatron-LM's names for the kinds of tokenizer; no network is ever used.

Ids are those that Megatron-LM (core 0.12 and later) gives for the same files: no special token is added to a text,
and none is read out of it unless the tokenizer file itself says so. The work is done by the `tokenizers` and
`sentencepiece` libraries; what is here is how each kind is put together and which ids have a meaning. A directory in
Hugging Face's layout describes its tokenizer itself: `hf_tokenizer.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, normalizers, pre_tokenizers

from megatron3d.data.hf_tokenizer import described_tokenizer
from megatron3d.data.library_errors import as_data_error
from megatron3d.data.sentencepiece_file import SentencePieceTokenizer
from megatron3d.data.tiktoken_file import TikTokenModel, TikTokenOptions
from megatron3d.data.tokenizer_interface import LibraryTokenizer, SpecialIds, Tokenizer
from megatron3d.data.vocabulary_files import read_bpe, read_word_pieces
from megatron3d.errors import ConfigError, DataError

TOKENIZER_TYPES = (
    "GPT2BPETokenizer",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
    "TikTokenizer",
    "BertWordPieceLowerCase",
    "BertWordPieceCase",
    "ByteTokenizer",
    "NullTokenizer",
)
SENTENCEPIECE_KINDS = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
DEFAULT_TIKTOKEN = TikTokenOptions()
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class TokenizerSpec:
    """Which tokenizer, as the options name it; small enough to send to another process."""

    tokenizer_type: str
    vocab_file: str | None = None
    merge_file: str | None = None
    tokenizer_model: str | None = None
    vocab_size: int | None = None
    tiktoken: TikTokenOptions = DEFAULT_TIKTOKEN

    def build(self) -> Tokenizer:
        """The tokenizer; Raises as `build_tokenizer` does."""
        return build_tokenizer(
            self.tokenizer_type,
            vocab_file=self.vocab_file,
            merge_file=self.merge_file,
            tokenizer_model=self.tokenizer_model,
            vocab_size=self.vocab_size,
            tiktoken=self.tiktoken,
        )


def build_tokenizer(
    tokenizer_type: str,
    *,
    vocab_file: str | None = None,
    merge_file: str | None = None,
    tokenizer_model: str | None = None,
    vocab_size: int | None = None,
    tiktoken: TikTokenOptions = DEFAULT_TIKTOKEN,
) -> Tokenizer:
    """The tokenizer of that kind from its files.

    GPT2BPETokenizer: `vocab_file` (vocab.json) and `merge_file` (merges.txt). BertWordPieceLowerCase and
    BertWordPieceCase: `vocab_file` (vocab.txt). HuggingFaceTokenizer: `tokenizer_model`, a directory that describes its
    tokenizer or a tokenizer.json, or `vocab_file`, a file of such a directory. SentencePieceTokenizer,
    GPTSentencePieceTokenizer and Llama2Tokenizer: `tokenizer_model`, a .model file. TikTokenizer: `tokenizer_model`, a
    JSON file of ranks. ByteTokenizer: nothing. NullTokenizer: `vocab_size`.

    Raises: ConfigError for an unknown kind or an option that it needs and lacks; DataError for a file that is missing
    or cannot be read as what it should be.
    """
    if tokenizer_type == "GPT2BPETokenizer":
        vocab = _required_file(tokenizer_type, "--vocab-file", vocab_file)
        return _gpt2_bpe(vocab, _required_file(tokenizer_type, "--merge-file", merge_file))
    if tokenizer_type in ("BertWordPieceLowerCase", "BertWordPieceCase"):
        vocab = _required_file(tokenizer_type, "--vocab-file", vocab_file)
        return _bert_word_piece(vocab, lower_case=tokenizer_type == "BertWordPieceLowerCase")
    if tokenizer_type == "HuggingFaceTokenizer":
        if tokenizer_model is None and vocab_file is not None:
            return described_tokenizer(_required_file(tokenizer_type, "--vocab-file", vocab_file).parent)
        return described_tokenizer(_required_file(tokenizer_type, "--tokenizer-model", tokenizer_model))
    if tokenizer_type in SENTENCEPIECE_KINDS:
        return SentencePieceTokenizer(_required_file(tokenizer_type, "--tokenizer-model", tokenizer_model))
    if tokenizer_type == "TikTokenizer":
        path = _required_file(tokenizer_type, "--tokenizer-model", tokenizer_model)
        return TikTokenizer(TikTokenModel(path, tiktoken, vocab_size))
    if tokenizer_type == "ByteTokenizer":
        return ByteTokenizer()
    if tokenizer_type == "NullTokenizer":
        if vocab_size is None or vocab_size < 1:
            raise ConfigError(f"--tokenizer-type NullTokenizer needs --vocab-size from 1 up, not {vocab_size}.")
        return NullTokenizer(vocab_size)
    raise unknown_kind(tokenizer_type)


def unknown_kind(tokenizer_type: str) -> ConfigError:
    """The error of a kind of tokenizer that is none of `TOKENIZER_TYPES`."""
    return ConfigError(f"--tokenizer-type {tokenizer_type} is not known; the kinds are {', '.join(TOKENIZER_TYPES)}.")


def existing_file(flag: str, value: str) -> Path:
    """The path that an option names. Raises: DataError if nothing is there."""
    path = Path(value)
    if not path.exists():
        raise DataError(f"{flag} {value} cannot be found; nothing is downloaded, give the path of a local file.")
    return path


class TikTokenizer(Tokenizer):
    """Megatron-LM's tokenizer of that name; the end of a document is </s>."""

    library = "tokenizers"

    def __init__(self, model: TikTokenModel) -> None:
        """Wrap the model of a file."""
        super().__init__(model.vocab_size, SpecialIds(eod=model.eod, bos=model.bos))
        self._model = model

    def encode(self, text: str) -> list[int]:
        """The ids of `text`."""
        return self._model.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, computed on all cores."""
        return self._model.encode_batch(texts)

    def as_json(self) -> str:
        """The model of the file, without the special tokens."""
        return self._model.as_json()

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`."""
        return self._model.decode(ids)


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, and id 256 for the end of a document; needs no file and knows every language."""

    def __init__(self) -> None:
        """257 ids."""
        super().__init__(257, SpecialIds(eod=256))

    def encode(self, text: str) -> list[int]:
        """The bytes of `text` in UTF-8."""
        return list(text.encode("utf-8"))

    def encode_arrays(self, texts: Sequence[str], dtype: np.dtype) -> tuple[NDArray, NDArray[np.int64]]:
        """The bytes of all texts in a row, and how many each has."""
        rows = [text.encode("utf-8") for text in texts]
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        return np.frombuffer(b"".join(rows), dtype=np.uint8).astype(dtype), lengths

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the bytes among `ids`; bytes that are no UTF-8 become U+FFFD."""
        return bytes(id for id in ids if id < 256).decode("utf-8", errors="replace")


class NullTokenizer(Tokenizer):
    """Ids written as decimal numbers; the end of a document is `vocab_size`, one more id, as in Megatron-LM."""

    def __init__(self, vocab_size: int) -> None:
        """`vocab_size` ids of text and one for the end of a document."""
        super().__init__(vocab_size + 1, SpecialIds(eod=vocab_size))

    def encode(self, text: str) -> list[int]:
        """The numbers of `text`. Raises: DataError for a word that is no id below the vocabulary size."""
        words = text.split()
        # The length first: int() refuses numbers of thousands of digits by an error of its own.
        longest = len(str(self.vocab_size))
        bad = [
            word
            for word in words
            if not (word.isascii() and word.isdigit() and len(word.lstrip("0")) <= longest)
            or int(word.lstrip("0") or "0") >= self.vocab_size
        ]
        if bad:
            raise DataError(f"the NullTokenizer reads ids from 0 to {self.vocab_size - 1}, not {bad[0]!r:.40}")
        return [int(word.lstrip("0") or "0") for word in words]

    def decode(self, ids: Sequence[int]) -> str:
        """The numbers, with a space between."""
        return " ".join(str(id) for id in ids)


def _gpt2_bpe(vocab_file: Path, merge_file: Path) -> Tokenizer:
    """Byte-level BPE from GPT-2's two files; the end of a document is <|endoftext|>."""
    vocab, merges = read_bpe(vocab_file, merge_file)
    what = (
        f"--vocab-file {vocab_file} and --merge-file {merge_file} cannot be read as GPT-2's vocab.json and merges.txt"
    )
    with as_data_error(what, "give the two files of one tokenizer"):
        library = tokenizers.Tokenizer(models.BPE(vocab, merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    return LibraryTokenizer(library, SpecialIds(eod=library.token_to_id(END_OF_TEXT)))


def _bert_word_piece(vocab_file: Path, *, lower_case: bool) -> Tokenizer:
    """BERT's word pieces; lower case also strips accents, as in BERT."""
    vocab = read_word_pieces(vocab_file)
    missing = [name for name in ("[UNK]", "[CLS]", "[SEP]", "[MASK]", "[PAD]") if name not in vocab]
    if missing:
        raise DataError(f"--vocab-file {vocab_file} is no BERT vocabulary: it has no line {', '.join(missing)}.")
    library = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer(lowercase=lower_case)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece(prefix="##")
    cls, sep, mask, pad = (library.token_to_id(name) for name in ("[CLS]", "[SEP]", "[MASK]", "[PAD]"))
    return LibraryTokenizer(library, SpecialIds(cls=cls, sep=sep, mask=mask, pad=pad))


def _required_file(tokenizer_type: str, flag: str, value: str | None) -> Path:
    """The path of an option that this kind of tokenizer cannot do without."""
    if not value:
        raise ConfigError(f"--tokenizer-type {tokenizer_type} needs {flag}; give the path of its file.")
    return existing_file(flag, value)
