"""Train a byte-level BPE tokenizer on a corpus and write the files that GPT tokenizers are read from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron3d.data.prepare.corpus import iterate_texts
from megatron3d.data.prepare.rejects import BadRecordLimits
from megatron3d.data.tokenizer import END_OF_TEXT
from megatron3d.errors import ConfigError, DataError
from megatron3d.storage.atomic import write_text_atomically
from megatron3d.storage.refusals import storage_errors

MIN_VOCAB_SIZE = 257


def train_byte_level_bpe(
    files: Sequence[Path],
    key: str,
    *,
    vocab_size: int,
    min_frequency: int = 2,
    show_progress: bool = False,
    limits: BadRecordLimits | None = None,
    note: Callable[[str], None] | None = None,
) -> tokenizers.Tokenizer:
    """A byte-level BPE of at most `vocab_size` ids: <|endoftext|> (id 0), the 256 bytes, and merges in order of count.

    A small corpus may hold fewer pairs that occur `min_frequency` times than were asked for; the vocabulary is then
    smaller. `limits` says how many bad records the corpus may have (None: the default ones), of which `note` takes a
    line.

    Raises: ConfigError if `vocab_size` leaves no room for the bytes; DataError if the corpus has no text or too many
    bad records.
    Source: R. Sennrich, B. Haddow, A. Birch, Neural Machine Translation of Rare Words with Subword Units (2016), on
    the bytes of UTF-8 as in GPT-2 (Radford et al. 2019, section 2.2).
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"--vocab-size {vocab_size} is too small: 256 bytes and {END_OF_TEXT} take {MIN_VOCAB_SIZE}; give more."
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=show_progress,
    )
    texts = counted(iterate_texts(files, key, limits=limits, note=note), files, key)
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


def write_tokenizer(tokenizer: tokenizers.Tokenizer, directory: Path) -> list[Path]:
    """Write tokenizer.json, its configuration, and GPT-2's vocab.json and merges.txt; the paths.

    The first two are what HuggingFaceTokenizer reads, the last two GPT2BPETokenizer; both give the same ids.
    Raises: StorageError if the directory cannot be written.
    """
    text = tokenizer.to_str(pretty=True)
    model = json.loads(text)["model"]
    merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    vocab = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    contents = {
        "vocab.json": json.dumps(vocab, ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + "".join(f"{merge}\n" for merge in merges),
        "tokenizer_config.json": json.dumps(config, indent=2),
        "tokenizer.json": text,
    }
    with storage_errors("write the tokenizer", directory, way_out="name another directory"):
        for name, content in contents.items():
            write_text_atomically(directory / name, content)
    return [directory / name for name in contents]


def counted(texts: Iterator[str], files: Sequence[Path], key: str) -> Iterator[str]:
    """The texts themselves. Raises: DataError at the end if none of them had a character."""
    num_characters = 0
    for text in texts:
        num_characters += len(text)
        yield text
    if num_characters == 0:
        raise DataError(f"The corpus {', '.join(map(str, files))} has no text under the key {key!r}; check --input.")
