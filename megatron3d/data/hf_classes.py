"""The tokenizers that transformers' classes build from a vocabulary, for directories without a `tokenizer.json`.

A `tokenizer.json` says how texts are cut; a bare vocabulary does not, and the class that the directory names must be
known. Each function here puts one class together out of the `tokenizers` library, as transformers 5 does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from megatron3d.data.hf_description import Description
from megatron3d.data.library_errors import as_data_error
from megatron3d.data.sentencepiece_file import parse_model
from megatron3d.data.vocabulary_files import read_bpe, read_word_pieces
from megatron3d.errors import DataError

_CONTROL, _USER_DEFINED = 3, 4  # kinds of sentencepiece's pieces that are found in a text before it is cut
_UNIGRAM = 1  # a kind of sentencepiece's models


def build_by_class(description: Description) -> tokenizers.Tokenizer:
    """The tokenizer of a directory by its class and its vocabulary.

    Raises:
        DataError: the class is not named or not known here, a file of it is missing, or a file is damaged.
    """
    directory, name = description.directory, description.tokenizer_class
    known = ", ".join(f"{name} ({' and '.join(files)})" for name, (files, _) in _BUILDERS.items())
    remedy = (
        f"known without one are {known}; write tokenizer.json with transformers: "
        f"AutoTokenizer.from_pretrained({str(directory)!r}).save_pretrained({str(directory)!r})"
    )
    if name is None:
        raise DataError(
            f"{directory} has no tokenizer.json, and neither tokenizer_config.json nor config.json names the class of "
            f"its tokenizer, so its texts could be cut in several ways; name it as tokenizer_class ({remedy})"
        )
    if name not in _BUILDERS:
        raise DataError(f"{directory} has a {name} and no tokenizer.json; {remedy}")
    files, build = _BUILDERS[name]
    missing = [file for file in files if not (directory / file).is_file()]
    if missing:
        raise DataError(f"{directory} has a {name} and no {' and no '.join(missing)}; fetch what is missing")
    names = " and ".join(str(directory / file) for file in files)
    with as_data_error(f"{names} cannot be read as the vocabulary of a {name}", "fetch it again"):
        return build(description)


def is_unigram_read_as_bpe(description: Description) -> bool:
    """Whether sentencepiece would cut texts otherwise than the class does: LlamaTokenizer takes every model as BPE."""
    path = description.directory / "tokenizer.model"
    if description.tokenizer_class != "LlamaTokenizer" or not path.is_file():
        return False
    return _sentencepiece(description).trainer_spec.model_type == _UNIGRAM


def _bert(description: Description) -> tokenizers.Tokenizer:
    unknown = description.name_of("unk_token")
    path = description.directory / "vocab.txt"
    vocab = read_word_pieces(path, options=False)
    library = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=unknown or "[UNK]"))
    if unknown is None or library.token_to_id(unknown) is None:
        raise DataError(f"{path} has no line {unknown}, which stands for unknown words; it is another vocabulary")
    if not description.flag("do_basic_tokenize", True):
        raise DataError(f"{description.directory}: do_basic_tokenize false leaves words uncut; there is no such class")
    library.normalizer = bert_normalizer(description)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece(prefix="##")
    return library


def bert_normalizer(description: Description) -> normalizers.BertNormalizer:
    """Case, accents and Chinese characters as the settings say; accents follow the case where nothing is said."""
    accents = "strip_accents"
    return normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=description.flag("tokenize_chinese_chars", True),
        strip_accents=None if description.settings.get(accents) is None else description.flag(accents, False),
        lowercase=description.flag("do_lower_case", True),
    )


def _gpt2(description: Description) -> tokenizers.Tokenizer:
    directory = description.directory
    vocab, merges = read_bpe(directory / "vocab.json", directory / "merges.txt", options=False)
    library = tokenizers.Tokenizer(models.BPE(vocab, merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=description.flag("add_prefix_space", False))
    library.decoder = decoders.ByteLevel()
    return library


def _llama(description: Description) -> tokenizers.Tokenizer:
    """BPE over the pieces of a sentencepiece model, which are merged in the order of their ids."""
    pieces = _sentencepiece(description).pieces
    vocab = {piece.piece: id for id, piece in enumerate(pieces)}
    library = tokenizers.Tokenizer(models.BPE(vocab, merges_of(vocab), fuse_unk=True, byte_fallback=True))
    adds_space = description.flag("add_prefix_space", True)
    scheme = "never" if not adds_space else "always" if description.flag("legacy", False) else "first"
    library.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    library.decoder = decoders.Sequence([*steps, *([decoders.Strip(content=" ", left=1)] if adds_space else [])])
    library.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL)
            for piece in pieces
            if piece.type in (_CONTROL, _USER_DEFINED)
        ]
    )
    return library


def merges_of(vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, by the id of what they make, then by their lengths, then by their ids."""
    found = []
    for piece, id in vocab.items():
        pairs = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        kept = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
        found += [(id, left, right) for left, right in sorted(kept, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))]
    found.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])))
    return [(left, right) for _, left, right in found]


def _sentencepiece(description: Description) -> Any:
    return parse_model(description.directory / "tokenizer.model")


_Builder = Callable[[Description], tokenizers.Tokenizer]
# Class -> the files it is made of, and how.
_BUILDERS: Mapping[str, tuple[tuple[str, ...], _Builder]] = MappingProxyType(
    {
        "BertTokenizer": (("vocab.txt",), _bert),
        "GPT2Tokenizer": (("vocab.json", "merges.txt"), _gpt2),
        "LlamaTokenizer": (("tokenizer.model",), _llama),
    }
)
