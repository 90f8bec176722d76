"""What a Hugging Face directory says of its tokenizer, read from its JSON files and judged nowhere.

    tokenizer_config.json        the class, its settings, the special tokens, tokens added beyond the vocabulary
    special_tokens_map.json      special tokens of directories from before `added_tokens_decoder`
    added_tokens.json            added tokens of such directories
    config.json                  the class or the kind of model, where tokenizer_config.json names no class
    generation_config.json       the ids that end a text; else those of config.json

Which file counts where several speak is transformers' rule (`PreTrainedTokenizerBase._from_pretrained`). What follows
from all this is in `hf_tokenizer.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import AddedToken

from megatron3d.errors import DataError
from megatron3d.files.json_text import is_whole_number, kind_of, parse_object

# What makes the ids: vocabularies, and what describes them.
VOCABULARY_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model")
SETTING_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# What belongs to a model beside its weights and makes no ids: how chats are written, how texts are generated.
GENERATION_CONFIG = "generation_config.json"
COMPANION_FILES = (GENERATION_CONFIG, "chat_template.jinja", "chat_template.json")
COMPANION_FOLDER = "additional_chat_templates"
MODEL_CONFIG = "config.json"
_KEPT_OF_MODEL_CONFIG = ("model_type", "tokenizer_class", "bos_token_id", "eos_token_id", "pad_token_id")

_CLASS_OF_MODEL_TYPE: Mapping[str, str] = MappingProxyType(
    {"bert": "BertTokenizer", "megatron-bert": "BertTokenizer", "gpt2": "GPT2Tokenizer"}
)
_BERT_TOKENS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
_END_OF_TEXT: dict[str, str] = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
# Special tokens that a class has although no file names them.
_TOKENS_OF_CLASS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "BertTokenizer": _BERT_TOKENS,
        "GPT2Tokenizer": _END_OF_TEXT,
        "GPTNeoXTokenizer": _END_OF_TEXT,
        "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        "BertGenerationTokenizer": {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            "sep_token": "<::::>",
        },
    }
)
# Classes that are BertTokenizer under another name.
_SAME_CLASS: dict[str, str] = dict.fromkeys(
    ("ElectraTokenizer", "DistilBertTokenizer", "MobileBertTokenizer", "ConvBertTokenizer", "SqueezeBertTokenizer"),
    "BertTokenizer",
)
_MOST_IDS = 2**31 - 1  # ids are kept in int32
_GENERIC = ("PreTrainedTokenizer", "TokenizersBackend", "PythonBackend")
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Description:
    """What the files say.

    Attributes:
        directory: where they lie.
        tokenizer_class: transformers' class without "Fast"; None where it is the general one, or nothing names any.
        settings: the values of `tokenizer_config.json`.
        numbered: tokens added under an id, by id.
        named: special tokens by their part, such as eos_token; those that the class implies are in `implied`.
        implied: special tokens that no file names and the class has.
        extra: further special tokens.
        ends: ids at which generation stops; empty where neither configuration says so.
    """

    directory: Path
    tokenizer_class: str | None
    settings: Mapping[str, Any]
    numbered: Mapping[int, AddedToken]
    named: Mapping[str, AddedToken]
    implied: Mapping[str, str]
    extra: tuple[AddedToken, ...]
    ends: tuple[int, ...]

    def flag(self, name: str, default: bool) -> bool:
        """A setting that is true or false. Raises: DataError if it is something else."""
        value = self.settings.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise DataError(
                f"{self.directory / 'tokenizer_config.json'}: {name} is {value!r:.60} and must be true or false; "
                "repair it"
            )
        return value

    def name_of(self, part: str) -> str | None:
        """The token that plays this part, such as eos_token."""
        return self.named[part].content if part in self.named else self.implied.get(part)


def read_description(directory: Path) -> Description:
    """Read the files of `directory`, as far as they are there.

    Raises:
        DataError: a file is no JSON object, or a value in it is not what it must be.
    """
    config = json_object(directory / "tokenizer_config.json")
    model = json_object(directory / MODEL_CONFIG)
    tokenizer_class = _class_of(directory, config, model)
    speaks_for_added_tokens = "added_tokens_decoder" in config
    values = config if speaks_for_added_tokens else config | json_object(directory / "special_tokens_map.json")
    source = directory / "tokenizer_config.json"
    parts = [part for part in values if part.endswith("_token") and part not in _NAMED]
    special = {part: values[part] for part in _NAMED if values.get(part) is not None}
    special |= {part: values[part] for part in parts if isinstance(values[part], str | dict)}
    named = {part: _added_token(value, source, is_special=True) for part, value in special.items()}
    extra = tuple(_added_token(value, source, is_special=True) for value in _extra_tokens(values, source))
    if speaks_for_added_tokens:
        numbered = _numbered(config["added_tokens_decoder"], source)
    else:
        names = {token.content for token in (*named.values(), *extra)}
        numbered = _numbered_of_old(json_object(directory / "added_tokens.json"), names, directory)
    implied = _TOKENS_OF_CLASS.get(tokenizer_class or "", {})
    implied = {part: name for part, name in implied.items() if part not in values}
    ends = end_token_ids(directory)
    return Description(directory, tokenizer_class, config, numbered, named, implied, extra, ends)


def end_token_ids(directory: Path) -> tuple[int, ...]:
    """The ids at which generation stops: of generation_config.json, else of config.json; none where neither says so.

    Raises:
        DataError: a file is no JSON object, or the value is neither an id nor a list of ids.
    """
    for name in (GENERATION_CONFIG, MODEL_CONFIG):
        value = json_object(directory / name).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(is_whole_number(id, 0, _MOST_IDS) for id in ids):
            raise DataError(
                f"{directory / name}: eos_token_id is {value!r:.60} and must be a token id or a list of them; repair it"
            )
        return tuple(dict.fromkeys(ids))
    return ()


def tokenizer_files(directory: Path) -> dict[str, bytes]:
    """The files that make the ids of the tokenizer in `directory`, by name; none if there is no vocabulary.

    `config.json` is among them with the values alone that concern a tokenizer: its kind of model stands for a class
    where nothing names one.

    Raises:
        DataError: a file cannot be read.
    """
    names = (*VOCABULARY_FILES, *SETTING_FILES)
    found = {name: _content(directory / name) for name in names if (directory / name).is_file()}
    if not any(name in found for name in VOCABULARY_FILES):
        return {}
    model = json_object(directory / MODEL_CONFIG)
    kept = {name: model[name] for name in _KEPT_OF_MODEL_CONFIG if name in model}
    return found | ({MODEL_CONFIG: (json.dumps(kept, indent=2) + "\n").encode()} if kept else {})


def described_files(path: Path) -> dict[str, bytes]:
    """The files of the tokenizer that `path` describes, by name: a directory, or a file in the form of `tokenizer.json`
    with what lies beside it; none if there is none.

    Raises:
        DataError: a file cannot be read.
    """
    if not path.exists():
        return {}
    files = tokenizer_files(path if path.is_dir() else path.parent)
    return files if path.is_dir() else files | {"tokenizer.json": _content(path)}


def companion_files(directory: Path) -> dict[str, bytes]:
    """What lies beside a tokenizer and makes no ids, by path within `directory`: generation, chat templates.

    Raises:
        DataError: a file cannot be read.
    """
    paths = [directory / name for name in COMPANION_FILES] + sorted((directory / COMPANION_FOLDER).glob("*.jinja"))
    return {str(path.relative_to(directory)): _content(path) for path in paths if path.is_file()}


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} of the tokenizer cannot be read ({error.strerror}); make it readable") from error


def json_object(path: Path) -> dict[str, Any]:
    """The values of a JSON file; none if it is not there. Raises: DataError if it is no JSON object."""
    try:
        return parse_object(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}); repair or remove it") from error


def _class_of(directory: Path, config: Mapping[str, Any], model: Mapping[str, Any]) -> str | None:
    found = config.get("tokenizer_class") or model.get("tokenizer_class")
    if found is None:
        kind = model.get("model_type")
        return _CLASS_OF_MODEL_TYPE.get(kind) if isinstance(kind, str) else None
    if not isinstance(found, str):
        raise DataError(f"{directory}: tokenizer_class is {found!r:.60} and must be the name of a class; repair it")
    plain = found.removesuffix("Fast")
    return None if plain in _GENERIC else _SAME_CLASS.get(plain, plain)


def _extra_tokens(values: Mapping[str, Any], source: Path) -> Iterator[Any]:
    for key in ("additional_special_tokens", "extra_special_tokens"):
        found = values.get(key) or []
        if not isinstance(found, list | dict):
            raise DataError(f"{source}: {key} holds {kind_of(found)} and must hold a list of tokens; repair it")
        yield from found.values() if isinstance(found, dict) else found


def _numbered(decoder: Any, source: Path) -> dict[int, AddedToken]:
    """`added_tokens_decoder`: id -> token."""
    if not isinstance(decoder, dict) or not all(_is_id(id) for id in decoder):
        raise DataError(f"{source}: added_tokens_decoder must be an object with token ids as its keys; repair it")
    return {int(id): _added_token(token, source, is_special=False) for id, token in decoder.items()}


def _is_id(text: str) -> bool:
    """Whether a key of an object is a token id; the length first, for int() refuses thousands of digits."""
    return text.isascii() and text.isdecimal() and len(text) <= len(str(_MOST_IDS)) and int(text) <= _MOST_IDS


def _numbered_of_old(encoder: Mapping[str, Any], special: set[str], directory: Path) -> dict[int, AddedToken]:
    """`added_tokens.json`: token -> id."""
    bad = [token for token, id in encoder.items() if not is_whole_number(id, 0, _MOST_IDS)]
    if bad:
        raise DataError(
            f"{directory / 'added_tokens.json'}: {bad[0]!r:.40} has the id {encoder[bad[0]]!r:.40}; repair it"
        )
    return {
        id: AddedToken(token, special=token in special, normalized=token not in special)
        for token, id in encoder.items()
    }


def _added_token(value: Any, source: Path, *, is_special: bool) -> AddedToken:
    """A token as a string, or as an object with how it is found in a text."""
    if isinstance(value, str):
        return AddedToken(value, special=is_special, normalized=not is_special)
    try:
        known = {key: value[key] for key in ("single_word", "lstrip", "rstrip", "normalized") if key in value}
        return AddedToken(value["content"], special=is_special or bool(value.get("special")), **known)
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{source}: {value!r:.80} is no description of a token; repair it") from error
