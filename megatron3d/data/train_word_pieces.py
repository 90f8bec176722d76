"""Train BERT's word pieces on a corpus and write the `vocab.txt` that BERT tokenizers are read from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from megatron3d.data.corpus import iterate_texts
from megatron3d.data.publish import write_text_atomically
from megatron3d.data.train_bpe import counted
from megatron3d.errors import ConfigError

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
) -> tokenizers.Tokenizer:
    """Word pieces, at most `vocab_size` of them: five special ones from id 0, single characters, and longer ones.

    Words are cut out as the tokenizers of `--tokenizer-type BertWordPieceLowerCase` and `BertWordPieceCase` do. Pieces
    are found by joining the most frequent pair again and again, as for a BPE, which is how the library does it and not
    how the authors' unpublished program did; texts are then cut greedily into the longest pieces, as BERT's are.

    Raises: ConfigError if `vocab_size` leaves no room for the special pieces; DataError if the corpus has no text.
    Source: J. Devlin et al., BERT (2018), section 3 and the released vocabulary for what a piece is.
    """
    if vocab_size <= len(SPECIAL_PIECES):
        raise ConfigError(
            f"--vocab-size {vocab_size} is too small: {', '.join(SPECIAL_PIECES)} take {len(SPECIAL_PIECES)}; give more"
        )
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower_case)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(SPECIAL_PIECES),
        limit_alphabet=min(MAX_CHARACTERS, vocab_size),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(counted(iterate_texts(files, key), files, key), trainer=trainer)
    return tokenizer


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
    for name, content in contents.items():
        write_text_atomically(directory / name, content)
    return [directory / name for name in contents]
