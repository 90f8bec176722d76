"""Text to token ids and back, under Megatron-LM's names for the kinds of tokenizer; no network is ever used.

Ids are those that Megatron-LM (core 0.12 and later) gives for the same files: no special token is added to a text,
and none is read out of it unless the tokenizer file itself says so. The work is done by the `tokenizers` and
`sentencepiece` libraries; what is here is how each kind is put together and which ids have a meaning.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from megatron3d.data.library_errors import as_data_error
from megatron3d.data.tiktoken_file import TikTokenModel, TikTokenOptions
from megatron3d.data.vocabulary_files import read_bpe, read_word_pieces
from megatron3d.errors import ConfigError, DataError
from megatron3d.files.json_text import parse_object

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
DEFAULT_TIKTOKEN = TikTokenOptions()
END_OF_TEXT = "<|endoftext|>"
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<EOD>")


@dataclass(frozen=True)
class SpecialIds:
    """The ids that mean something beyond text; None where a tokenizer has no such token."""

    eod: int | None = None
    bos: int | None = None
    pad: int | None = None
    cls: int | None = None
    sep: int | None = None
    mask: int | None = None


class Tokenizer(ABC):
    """A tokenizer: `vocab_size` ids from 0 on, and the special ones among them."""

    def __init__(self, vocab_size: int, special: SpecialIds) -> None:
        """Keep the number of ids (before any padding) and the special ids."""
        self.vocab_size = vocab_size
        self.eod, self.bos, self.pad = special.eod, special.bos, special.pad
        self.cls, self.sep, self.mask = special.cls, special.sep, special.mask

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without special tokens."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens appear by their names where they have one."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text; libraries that can use all cores do."""
        return [self.encode(text) for text in texts]

    def word_continuations(self) -> list[bool] | None:
        """For each id whether its piece goes on with the word before it; None where pieces do not say so."""
        return None


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
    BertWordPieceCase: `vocab_file` (vocab.txt). HuggingFaceTokenizer: `tokenizer_model`, a tokenizer.json or a
    directory with one. SentencePieceTokenizer, GPTSentencePieceTokenizer and Llama2Tokenizer: `tokenizer_model`, a
    .model file. TikTokenizer: `tokenizer_model`, a JSON file of ranks. ByteTokenizer: nothing. NullTokenizer:
    `vocab_size`.

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
        return _hugging_face(_required_file(tokenizer_type, "--tokenizer-model", tokenizer_model))
    if tokenizer_type in ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"):
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
    raise ConfigError(f"--tokenizer-type {tokenizer_type} is not known; the kinds are {', '.join(TOKENIZER_TYPES)}.")


class LibraryTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library."""

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

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`."""
        return self._library.decode(list(ids), skip_special_tokens=False)

    def word_continuations(self) -> list[bool] | None:
        """True for the pieces of a word-piece model that begin with its mark, ## in BERT."""
        model = self._library.model
        if not isinstance(model, models.WordPiece):
            return None
        pieces = (self._library.id_to_token(id) for id in range(self.vocab_size))
        return [piece is not None and piece.startswith(model.continuing_subword_prefix) for piece in pieces]


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model; the end of a document is the model's end of sentence."""

    def __init__(self, path: Path) -> None:
        """Load the model. Raises: DataError if the file is none."""
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise DataError(f"--tokenizer-model {path} cannot be read as a sentencepiece model ({error}).") from error
        special = SpecialIds(
            eod=self._valid(self._model.eos_id()),
            bos=self._valid(self._model.bos_id()),
            pad=self._valid(self._model.pad_id()),
            cls=self._piece("<CLS>", "[CLS]"),
            sep=self._piece("<SEP>", "[SEP]"),
            mask=self._piece("<MASK>", "[MASK]"),
        )
        super().__init__(self._model.get_piece_size(), special)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`."""
        return self._model.encode(text)

    def pieces(self, text: str) -> list[str]:
        """The pieces that `text` is cut into."""
        return self._model.encode(text, out_type=str)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`."""
        return self._model.decode([int(id) for id in ids])

    def _valid(self, id: int) -> int | None:
        """`id`, or None for the library's -1 that says there is none."""
        return None if id < 0 else id

    def _piece(self, *names: str) -> int | None:
        """The id of the first of `names` that is a piece of the model."""
        ids = (self._model.piece_to_id(name) for name in names)
        return next((id for id in ids if id != self._model.unk_id()), None)


class TikTokenizer(Tokenizer):
    """Megatron-LM's tokenizer of that name; the end of a document is </s>."""

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


def _hugging_face(path: Path) -> Tokenizer:
    """A tokenizer.json; special ids from the configuration beside it, else the end of text by its usual names."""
    directory = path if path.is_dir() else path.parent
    file = directory / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError(
            f"--tokenizer-model {path} has no tokenizer.json; give a directory that has one, or the files that are "
            f"there with --tokenizer-type GPT2BPETokenizer, SentencePieceTokenizer or BertWordPieceLowerCase."
        )
    with as_data_error(f"--tokenizer-model {file} cannot be read as a tokenizer.json", "copy or fetch it again"):
        library = tokenizers.Tokenizer.from_file(str(file))
    library.no_truncation()
    library.no_padding()
    names = _special_names(directory)
    end = names.get("eos_token") or next((name for name in _END_NAMES if library.token_to_id(name) is not None), None)
    ids = {key: library.token_to_id(name) for key, name in names.items()}
    special = SpecialIds(
        eod=None if end is None else library.token_to_id(end),
        bos=ids.get("bos_token"),
        pad=ids.get("pad_token"),
        cls=ids.get("cls_token"),
        sep=ids.get("sep_token"),
        mask=ids.get("mask_token"),
    )
    return LibraryTokenizer(library, special)


def _special_names(directory: Path) -> dict[str, str]:
    """The names of special tokens in the configuration files of a Hugging Face directory, as far as there are any."""
    names: dict[str, str] = {}
    for file in (directory / "special_tokens_map.json", directory / "tokenizer_config.json"):
        if not file.is_file():
            continue
        try:
            values = parse_object(file.read_bytes())
        except (OSError, ValueError) as error:
            raise DataError(f"{file} cannot be read as JSON ({error}); repair or remove it.") from error
        for key in ("eos_token", "bos_token", "pad_token", "cls_token", "sep_token", "mask_token"):
            value = values.get(key)
            name = value.get("content") if isinstance(value, dict) else value
            if isinstance(name, str):
                names[key] = name
    return names


def _required_file(tokenizer_type: str, flag: str, value: str | None) -> Path:
    """The path of an option that this kind of tokenizer cannot do without."""
    if not value:
        raise ConfigError(f"--tokenizer-type {tokenizer_type} needs {flag}; give the path of its file.")
    path = Path(value)
    if not path.exists():
        raise DataError(f"{flag} {value} cannot be found; nothing is downloaded, give the path of a local file.")
    return path
