"""From a batch of records to arrays of token ids: what a worker does, whichever process it is.

What is wanted comes as an `EncodeRequest`, which is small enough to be sent to any process; what is sent back are numpy
arrays in the dtype of the token file, never lists of numbers. Who runs this, and who writes the result:
`preprocess.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron3d.data.indexed import token_dtype
from megatron3d.data.prepare.abbreviations import language_rules
from megatron3d.data.prepare.records import Document, RawBatch, Reject, parse_documents
from megatron3d.data.prepare.sentences import split_sentences
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
    has what the tokenizer's description puts before and behind a text."""

    tokenizer: TokenizerSpec
    json_keys: tuple[str, ...]
    append_eod: bool
    splitting: SentenceSplitting | None = None
    special_tokens: bool = False


@dataclass(frozen=True)
class EncodedKey:
    """The tokens of one key of one batch in a row, and how they are cut into sequences and documents."""

    tokens: NDArray
    sequence_lengths: NDArray[np.int64]
    sequences_per_document: NDArray[np.int64]


@dataclass(frozen=True)
class EncodedBatch:
    """What a worker sends back: `num_documents` good records under each key, and the bad ones in order."""

    keys: tuple[EncodedKey, ...]
    num_documents: int
    text_bytes: int
    input_bytes: int
    rejects: tuple[Reject, ...] = ()


def encode_batch(request: EncodeRequest, batch: RawBatch) -> EncodedBatch:
    """Parse and encode one batch; this is what a worker does.

    Raises: DataError naming file and line for a text that the tokenizer refuses.
    """
    tokenizer = tokenizer_of(request.tokenizer)
    parsed = parse_documents(batch, request.json_keys)
    text_bytes, keys = 0, []
    for documents in parsed.documents:
        text_bytes += sum(len(sentence.encode()) for document in documents for sentence in document.sentences)
        if request.splitting is not None:
            documents = [_split(document, request.splitting) for document in documents]
        keys.append(_encode_documents(tokenizer, documents, request))
    num_documents = len(batch.records) - len(parsed.rejects)
    return EncodedBatch(tuple(keys), num_documents, text_bytes, batch.input_bytes, parsed.rejects)


@functools.lru_cache(maxsize=1)
def tokenizer_of(spec: TokenizerSpec) -> Tokenizer:
    """The tokenizer, built once a process; forked workers find the parent's."""
    return spec.build()


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
    tokens: list[int] = []
    lengths: list[int] = []
    sizes: list[int] = []
    prefix, suffix = (tokenizer.prefix, tokenizer.suffix) if request.special_tokens else ((), ())
    for document in documents:
        num_before = len(lengths)
        for sentence in document.sentences:
            try:
                ids = tokenizer.encode(sentence)
            except DataError as error:
                raise DataError(f"{document.place}: {error}") from error
            if ids:
                tokens += (*prefix, *ids, *suffix)
                lengths.append(len(prefix) + len(ids) + len(suffix))
        if request.append_eod and len(lengths) > num_before:
            assert tokenizer.eod is not None, "--append-eod without an end-of-document token passed the checks"
            tokens.append(tokenizer.eod)
            lengths[-1] += 1
        sizes.append(len(lengths) - num_before)
    return EncodedKey(
        np.array(tokens, dtype=token_dtype(tokenizer.vocab_size)),
        np.array(lengths, dtype=np.int64),
        np.array(sizes, dtype=np.int64),
    )
