"""From a batch of records to arrays of token ids: what a worker does, whichever process it is.

What is wanted comes as an `EncodeRequest`, which is small enough to be sent to any process; what is sent back are numpy
arrays in the dtype of the token file, never lists of numbers. Who runs this, and who writes the result:
`preprocess.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron3d.data.indexed import token_dtype
from megatron3d.data.prepare.abbreviations import language_rules
from megatron3d.data.prepare.array_messages import WithArrays
from megatron3d.data.prepare.encoder import Encoder, build_encoder, choose_encoder
from megatron3d.data.prepare.lines import LineBlock, as_records
from megatron3d.data.prepare.records import Document, RawBatch, Reject, parse_documents
from megatron3d.data.prepare.sentences import split_sentences
from megatron3d.data.prepare.spans import Position
from megatron3d.data.tokenizer import Tokenizer, TokenizerSpec
from megatron3d.errors import DataError


@dataclass(frozen=True)
class SentenceSplitting:
    """How texts are cut into sentences: by the rules of a language; `keep_newlines` keeps line ends in sentences."""

    language: str = "english"
    keep_newlines: bool = False


@dataclass(frozen=True)
class EncodeRequest:
    """What every worker needs to know. Without `splitting` a text is one sequence; with `special_tokens` each sequence
    has what the tokenizer's description puts before and behind a text. The `encoder` is one that was chosen."""

    tokenizer: TokenizerSpec
    json_keys: tuple[str, ...]
    append_eod: bool
    splitting: SentenceSplitting | None = None
    special_tokens: bool = False
    encoder: Encoder = Encoder.REFERENCE


@dataclass(frozen=True)
class EncodedKey:
    """The tokens of one key of one batch in a row, and how they are cut into sequences and documents."""

    tokens: NDArray
    sequence_lengths: NDArray[np.int64]
    sequences_per_document: NDArray[np.int64]

    @property
    def arrays(self) -> tuple[NDArray, ...]:
        """All three, in the order of the fields."""
        return self.tokens, self.sequence_lengths, self.sequences_per_document


@dataclass(frozen=True)
class EncodedBatch(WithArrays):
    """What a worker sends back: `num_documents` good records under each key, the bad ones in order, and where in the
    input the next batch begins."""

    keys: tuple[EncodedKey, ...]
    num_documents: int
    text_bytes: int
    input_bytes: int
    end: Position
    rejects: tuple[Reject, ...] = ()

    def arrays(self) -> tuple[NDArray, ...]:
        """Those of each key."""
        return tuple(array for key in self.keys for array in key.arrays)

    def with_arrays(self, arrays: Sequence[NDArray]) -> EncodedBatch:
        """The same with other arrays."""
        return replace(self, keys=tuple(EncodedKey(*arrays[first : first + 3]) for first in range(0, len(arrays), 3)))


def encode_batch(request: EncodeRequest, block: RawBatch | LineBlock) -> EncodedBatch:
    """Split, parse and encode one batch; this is what a worker does.

    Raises: DataError naming file and line for a text that the tokenizer refuses; or as `as_records`.
    """
    batch = as_records(block)
    tokenizer = _encoder_of(request.tokenizer, request.encoder)
    parsed = parse_documents(batch, request.json_keys)
    text_bytes, keys = 0, []
    for documents in parsed.documents:
        text_bytes += sum(_num_bytes(sentence) for document in documents for sentence in document.sentences)
        if request.splitting is not None:
            documents = [_split(document, request.splitting) for document in documents]
        keys.append(_encode_documents(tokenizer, documents, request))
    num_documents = len(batch.records) - len(parsed.rejects)
    return EncodedBatch(tuple(keys), num_documents, text_bytes, batch.input_bytes, batch.end, parsed.rejects)


def with_chosen_encoder(
    request: EncodeRequest, first: RawBatch | LineBlock, note: Callable[[str], None]
) -> EncodeRequest:
    """The request with the encoder that the run uses, after a comparison on the texts of its first batch.

    Raises: as `choose_encoder` and `as_records`.
    """
    if request.encoder is Encoder.REFERENCE:
        return request
    parsed = parse_documents(as_records(first), request.json_keys)
    texts = [sentence for documents in parsed.documents for document in documents for sentence in document.sentences]
    chosen = choose_encoder(
        request.encoder,
        tokenizer_of(request.tokenizer),
        texts,
        note,
        build=lambda encoder, _: _encoder_of(request.tokenizer, encoder),  # forked workers find it built
    )
    return replace(request, encoder=chosen)


@functools.lru_cache(maxsize=1)
def tokenizer_of(spec: TokenizerSpec) -> Tokenizer:
    """The tokenizer, built once a process; forked workers find the parent's."""
    return spec.build()


@functools.lru_cache(maxsize=1)
def _encoder_of(spec: TokenizerSpec, encoder: Encoder) -> Tokenizer:
    """What encodes, built once a process; forked workers find the parent's."""
    return build_encoder(encoder, tokenizer_of(spec))


def _num_bytes(text: str) -> int:
    """The bytes of `text` in UTF-8, counted without encoding it where that is its length."""
    return len(text) if text.isascii() else len(text.encode())


def _split(document: Document, splitting: SentenceSplitting) -> Document:
    """A document with its text cut into sentences, unless it came as a list of them."""
    if document.is_split:
        return document
    rules = language_rules(splitting.language)
    sentences = [
        sentence
        for text in document.sentences
        for sentence in split_sentences(text, rules, keep_newlines=splitting.keep_newlines)
    ]
    return Document(document.place, sentences, is_split=True)


def _encode_documents(tokenizer: Tokenizer, documents: Sequence[Document], request: EncodeRequest) -> EncodedKey:
    """Each sentence becomes a sequence unless it is empty; the end-of-document token joins the last of a document."""
    ids, lengths = _encode_texts(tokenizer, documents)
    counts = np.fromiter((len(document.sentences) for document in documents), dtype=np.int64, count=len(documents))
    owners = np.repeat(np.arange(len(documents)), counts)[lengths > 0]
    lengths = lengths[lengths > 0]
    is_last = np.append(owners[1:] != owners[:-1], True)[: len(owners)]
    frame = (tokenizer.prefix, tokenizer.suffix) if request.special_tokens else ((), ())
    if request.append_eod:
        assert tokenizer.eod is not None, "--append-eod without an end-of-document token passed the checks"
    if request.append_eod or any(frame):
        end = (tokenizer.eod,) if request.append_eod else ()
        ids, lengths = _with_tokens(ids, lengths, frame, np.array(end, ids.dtype), is_last)
    return EncodedKey(ids, lengths, np.bincount(owners, minlength=len(documents)).astype(np.int64))


def _encode_texts(tokenizer: Tokenizer, documents: Sequence[Document]) -> tuple[NDArray, NDArray[np.int64]]:
    """The ids of all sentences in a row, and how many each has. Raises: DataError that names the document."""
    sentences = [sentence for document in documents for sentence in document.sentences]
    try:
        return tokenizer.encode_arrays(sentences, token_dtype(tokenizer.vocab_size))
    except DataError:
        for document in documents:
            for sentence in document.sentences:
                try:
                    tokenizer.encode(sentence)
                except DataError as error:
                    raise DataError(f"{document.place}: {error}") from error
        raise


def _with_tokens(
    ids: NDArray,
    lengths: NDArray[np.int64],
    frame: tuple[tuple[int, ...], tuple[int, ...]],
    end: NDArray,
    is_last: NDArray[np.bool_],
) -> tuple[NDArray, NDArray[np.int64]]:
    """Put the two parts of `frame` before and behind each sequence, and `end` behind the last ones of documents."""
    prefix, suffix = (np.array(tokens, ids.dtype) for tokens in frame)
    nothing = end[:0]
    bounds = np.cumsum(lengths)
    rows = [nothing]
    for first, behind, last in zip((bounds - lengths).tolist(), bounds.tolist(), is_last.tolist()):
        rows += (prefix, ids[first:behind], suffix, end if last else nothing)
    return np.concatenate(rows), lengths + len(prefix) + len(suffix) + len(end) * is_last
