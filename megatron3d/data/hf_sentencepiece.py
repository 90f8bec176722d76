"""Directories whose class runs the sentencepiece library itself: BertGenerationTokenizer, with its spiece.model.

transformers has this class for one kind of model, but it suits any: it adds nothing to what sentencepiece does, except
that the name of a special token within a text is that token. `hf-export` writes such a directory for a sentencepiece
model that no tokenizer.json can hold.

Source: transformers `tokenization_utils_sentencepiece.py`, `SentencePieceBackend`.
"""

from __future__ import annotations

from megatron3d.data.hf_description import Description
from megatron3d.data.sentencepiece_file import SentencePieceTokenizer
from megatron3d.data.tokenizer_interface import SpecialIds, Tokenizer
from megatron3d.errors import DataError

SENTENCEPIECE_CLASS = "BertGenerationTokenizer"
SENTENCEPIECE_FILE = "spiece.model"


def run_by_sentencepiece(description: Description) -> Tokenizer:
    """The tokenizer of such a directory.

    Raises:
        DataError: spiece.model is missing or damaged, or a special token is none of its pieces.
    """
    path = description.directory / SENTENCEPIECE_FILE
    if not path.is_file():
        raise DataError(
            f"{description.directory} has a {SENTENCEPIECE_CLASS} and no {SENTENCEPIECE_FILE}; fetch what is missing"
        )
    plain = SentencePieceTokenizer(path, option="")
    named = {**description.implied, **{part: token.content for part, token in description.named.items()}}
    ids = {name: _id_of(name, plain, description) for name in named.values()}
    for id, token in description.numbered.items():
        ids[token.content] = _id_of(token.content, plain, description, expected=id)
    ids |= {token.content: _id_of(token.content, plain, description) for token in description.extra}
    for token in (*description.numbered.values(), *description.named.values(), *description.extra):
        if token.lstrip or token.rstrip or token.single_word:
            raise DataError(
                f"{description.directory}: the special token {token.content!r} takes spaces beside it or stands as a "
                f"word alone (lstrip, rstrip, single_word), which is not read here for a {SENTENCEPIECE_CLASS}; set "
                "these to false"
            )
    by_part = {part: ids[name] for part, name in named.items()}
    special = SpecialIds(
        eod=by_part.get("eos_token", next(iter(description.ends), None)),
        bos=by_part.get("bos_token"),
        pad=by_part.get("pad_token"),
        cls=by_part.get("cls_token"),
        sep=by_part.get("sep_token"),
        mask=by_part.get("mask_token"),
        ends=description.ends,
    )
    found_in_texts = {} if description.flag("split_special_tokens", False) else ids
    return SentencePieceTokenizer(path, option="", special=special, found_in_texts=found_in_texts)


def _id_of(name: str, plain: SentencePieceTokenizer, description: Description, expected: int | None = None) -> int:
    """The id of a special token. Raises: DataError if it is no piece of the model, or not that of the `expected` id."""
    id = plain.id_of(name)
    if id is None or expected not in (None, id):
        found = "no piece" if id is None else f"piece {id} and not {expected}"
        raise DataError(
            f"{description.directory}: the special token {name!r} is {found} of {SENTENCEPIECE_FILE}, and the ids of a "
            f"{SENTENCEPIECE_CLASS} are taken from there alone; correct it in tokenizer_config.json (null: no such "
            "token)"
        )
    return id
