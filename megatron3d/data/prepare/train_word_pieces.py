"""Train BERT's word pieces on a corpus and write the `vocab.txt` that BERT tokenizers are read from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from megatron3d.data.prepare.corpus import iterate_texts
from megatron3d.data.prepare.rejects import BadRecordLimits
from megatron3d.data.prepare.train_bpe import counted
from megatron3d.errors import ConfigError
from megatron3d.storage.atomic import write_text_atomically
from megatron3d.storage.refusals import storage_errors

_INSIDE = "##"  # begins a piece that is not the first of its word
SPECIAL_PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_CHARACTERS = 1000  # the most frequent ones get a piece; rarer ones are [UNK]


def train_word_pieces(
    files: Sequence[Path],
    key: str,
    *,
    vocab_size: int,
    min_frequency: int = 2,
    lower_case: bool = True,
    show_progress: bool = False,
    limits: BadRecordLimits | None = None,
    note: Callable[[str], None] | None = None,
) -> tokenizers.Tokenizer:
    """Word pieces, at most `vocab_size` of them: five special ones from id 0, single characters, and longer ones.

    Words are cut out as the tokenizers of `--tokenizer-type BertWordPieceLowerCase` and `BertWordPieceCase` do. Pieces
    are found by joining the most frequent pair again and again, as for a BPE, which is how the library does it and not
    how the authors' unpublished program did; texts are then cut greedily into the longest pieces, as BERT's are.

    `limits` says how many bad records the corpus may have (None: the default ones), of which `note` takes a line.

    Raises: ConfigError if `vocab_size` leaves no room for the special pieces; DataError if the corpus has no text or
    too many bad records.
    Source: J. Devlin et al., BERT (2018), section 3 and the released vocabulary for what a piece is.
    """
    if vocab_size <= len(SPECIAL_PIECES):
        raise ConfigError(
            f"--vocab-size {vocab_size} is too small: {', '.join(SPECIAL_PIECES)} take {len(SPECIAL_PIECES)}; give more"
        )
    texts = counted(iterate_texts(files, key, limits=limits, note=note), files, key)
    alphabet = _alphabet(texts, lower_case=lower_case, limit=min(MAX_CHARACTERS, vocab_size))
    inside = sorted(piece for piece in alphabet if piece.startswith(_INSIDE))
    first = sorted(alphabet - set(inside))
    tokenizer = _empty(lower_case)
    # The library numbers the pieces inside words as a hash table gives them, and decides between equally frequent pairs
    # by those numbers. Named beforehand they have the same numbers each time, and so has everything that follows.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[*SPECIAL_PIECES, *inside],
        initial_alphabet=first,
        limit_alphabet=len(first),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(iterate_texts(files, key, limits=limits), trainer=trainer)
    trained = _empty(lower_case)  # without the marks that pieces named beforehand have: only five are special
    trained.model = models.WordPiece(tokenizer.get_vocab(with_added_tokens=True), unk_token="[UNK]")
    trained.add_special_tokens(list(SPECIAL_PIECES))
    return trained


def _empty(lower_case: bool) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower_case)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _alphabet(texts: Iterator[str], *, lower_case: bool, limit: int) -> set[str]:
    """The most frequent characters of the corpus, those that occur inside words also with their prefix."""
    tokenizer = _empty(lower_case)
    trainer = trainers.WordPieceTrainer(vocab_size=0, limit_alphabet=limit, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return set(tokenizer.get_vocab())


def write_word_pieces(tokenizer: tokenizers.Tokenizer, directory: Path, *, lower_case: bool) -> list[Path]:
    """Write vocab.txt, a piece a line in order of id, and the configuration that transformers reads; the paths.

    Raises: StorageError if the directory cannot be written.
    """
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": lower_case}
    contents = {
        "vocab.txt": "".join(f"{piece}\n" for piece, _ in pieces),
        "tokenizer_config.json": json.dumps(config, indent=2),
    }
    with storage_errors("write the tokenizer", directory, way_out="name another directory"):
        for name, content in contents.items():
            write_text_atomically(directory / name, content)
    return [directory / name for name in contents]
