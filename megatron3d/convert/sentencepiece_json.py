"""Sentencepiece models of Llama's kind as a tokenizer.json: BPE with byte pieces and without a table of characters.

The `tokenizers` library can be sentencepiece for these alone. Elsewhere it departs for some texts: its table of
characters (nmt_nfkc) takes the shortest entry of a cluster instead of the longest, its unigram model adds in another
precision, and a text is cut at user-defined symbols before its spaces are marked. Even here one thing differs: of two
pairs that make the same piece, sentencepiece joins the leftmost and `tokenizers` the one that comes first in its list.
So the result is compared with sentencepiece, on every piece and on many strings of pieces, and not used if it differs.

Source: sentencepiece `src/bpe_model.cc` and `src/normalizer.cc`; transformers `convert_slow_tokenizer.py`,
`LlamaConverter`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers

from megatron3d.data.hf_classes import merges_of
from megatron3d.data.sentencepiece_file import parse_model
from megatron3d.errors import DataError

_BPE = 2  # of TrainerSpec.ModelType
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # of SentencePiece.Type
_SPACE = "\u2581"
_NAMES = {"cls_token": ("<CLS>", "[CLS]"), "sep_token": ("<SEP>", "[SEP]"), "mask_token": ("<MASK>", "[MASK]")}
_NUM_STRINGS = 20_000


@dataclass(frozen=True)
class SentencePieceModel:
    """A model file: its bytes, what it holds, the names of its special tokens by transformers' parts, and whether it
    has pieces for single bytes."""

    content: bytes
    model: Any
    names: Mapping[str, str]
    has_bytes: bool


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read a model file. Raises: DataError if it is none."""
    model, content = parse_model(path), path.read_bytes()
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise DataError(f"{path} cannot be read as a sentencepiece model ({error}); copy it again") from error
    ids = {
        "unk_token": processor.unk_id(),
        "bos_token": processor.bos_id(),
        "eos_token": processor.eos_id(),
        "pad_token": processor.pad_id(),
    }
    names = {part: processor.id_to_piece(id) for part, id in ids.items() if id >= 0}
    for part, spellings in _NAMES.items():
        found = [name for name in spellings if processor.piece_to_id(name) != processor.unk_id()]
        names |= {part: found[0]} if found else {}
    return SentencePieceModel(content, model, names, any(piece.type == _BYTE for piece in model.pieces))


def as_tokenizer_json(found: SentencePieceModel) -> tokenizers.Tokenizer | None:
    """The model in the `tokenizers` library, without added tokens; None where that would give other ids."""
    if not _may_be_equal(found):
        return None
    spec = found.model.normalizer_spec
    vocab = {piece.piece: id for id, piece in enumerate(found.model.pieces)}
    pieces = {piece.piece: id for id, piece in enumerate(found.model.pieces) if piece.type == _NORMAL}
    library = tokenizers.Tokenizer(
        models.BPE(vocab, merges_of(pieces), unk_token=found.names["unk_token"], fuse_unk=True, byte_fallback=True)
    )
    mark = [normalizers.Replace(" ", _SPACE)]
    library.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), *mark] if spec.add_dummy_prefix else mark)
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    library.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else steps)
    texts = list(_strings(found))
    theirs = sentencepiece.SentencePieceProcessor(model_proto=found.content).encode(texts)
    ours = [encoding.ids for encoding in library.encode_batch_fast(texts, add_special_tokens=False)]
    return library if ours == theirs else None


def _may_be_equal(found: SentencePieceModel) -> bool:
    spec, training = found.model.normalizer_spec, found.model.trainer_spec
    return (
        training.model_type == _BPE
        and found.has_bytes
        and not spec.precompiled_charsmap
        and not spec.remove_extra_whitespaces
        and spec.escape_whitespaces
        and not training.treat_whitespace_as_suffix
        and all(piece.type in (_NORMAL, _UNKNOWN, _CONTROL, _BYTE) for piece in found.model.pieces)
    )


def _strings(found: SentencePieceModel) -> Iterator[str]:
    """Texts that show a difference if there is one: each piece, repeated too, and random strings of a few pieces."""
    pieces = [piece.piece.replace(_SPACE, " ") for piece in found.model.pieces if piece.type == _NORMAL]
    yield from pieces
    for piece in pieces:
        if len(set(piece)) == 1:  # pairs that overlap: how a long run of one character is cut
            yield from (piece[0] * number for number in range(1, 40))
    generator = random.Random(0)
    for _ in range(_NUM_STRINGS):
        yield "".join(generator.choices(pieces, k=generator.randrange(1, 9)))
    yield from ("", " ", "\n", "\x00", "\t\r\n", "\U0001f642\U0001f3fd", "\u2581 \u2581", "\ufeffe\u0301\u2028")
