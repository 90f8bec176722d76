"""What data, tokenizer, a curriculum's indexes and the user's own code are, by content: digests that a checkpoint
stores and a resumed run compares.

Paths say little: a file may move, or another may take its name. The digest of a token file covers the sizes of `.idx`
and `.bin` and their bytes: all of them up to 1 MiB, beyond that 64 blocks of 16 KiB at equal distances, the header
and the end among them, so that terabytes cost 2 MiB of reading. A change between the blocks that keeps both sizes is
not seen. A tokenizer's files are read whole, and so is the file of an architecture of the user's own.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from megatron3d.config.resume import Difference, Effect
from megatron3d.config.sections.data import DataConfig
from megatron3d.config.sections.data_efficiency import CurriculumConfig
from megatron3d.data.blend import Corpus, parse_data_path, read_data_args_file
from megatron3d.data.curriculum.metrics import directory_name
from megatron3d.data.hf_description import described_files
from megatron3d.data.tiktoken_file import tiktoken_options
from megatron3d.data.tokenizer import SENTENCEPIECE_KINDS
from megatron3d.errors import ConfigError, DataError
from megatron3d.files.user_code import code_digest, is_user_code

BLOCK_BYTES, NUM_BLOCKS = 16 << 10, 64
# In a `Difference`, as the names of options.
TOKENIZER, CODE, INDEXES = "the tokenizer", "the code of --architecture", "the indexes of --curriculum-metric"


@dataclass(frozen=True)
class CorpusContent:
    """One corpus of a data option: where it lay, its share of the samples ("by size" without weights), its digest."""

    prefix: str
    share: str
    digest: str | None


@dataclass(frozen=True)
class TokenizerContent:
    """A tokenizer: its kind, where its files lay, and the digest of their content."""

    kind: str
    files: tuple[str, ...]
    digest: str


@dataclass(frozen=True)
class CodeContent:
    """An architecture of the user's own: its name with the path of its file, and the digest of that file."""

    name: str
    digest: str


@dataclass(frozen=True)
class IndexContent:
    """The index of one metric of a curriculum: where it lay, and its digest, None if it cannot be read."""

    path: str
    digest: str | None


@dataclass(frozen=True)
class Content:
    """What a run reads. `corpora` maps "all" (cut by --split), "train", "valid" and "test" to corpora in order."""

    corpora: Mapping[str, tuple[CorpusContent, ...]]
    tokenizer: TokenizerContent | None
    code: CodeContent | None = None
    indexes: tuple[IndexContent, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values for `content.json`; `content_from_json` takes them back."""
        return asdict(self)

    @property
    def training(self) -> tuple[CorpusContent, ...]:
        """The corpora of the training data."""
        return self.corpora.get("all") or self.corpora.get("train", ())

    def digests(self) -> dict[str, str]:
        """Share and digest of each thing read, by a name for people: what all ranks must agree on, wherever it lies."""
        found = {
            f"corpus {number} of {_OPTIONS[part]}": f"share {one.share}, digest {one.digest or 'unknown'}"
            for part, corpora in self.corpora.items()
            for number, one in enumerate(corpora)
        }
        if self.tokenizer is not None:
            found[TOKENIZER] = self.tokenizer.digest
        if self.code is not None:
            found[CODE] = self.code.digest
        for number, one in enumerate(self.indexes):
            found[f"number {number} of {INDEXES}"] = one.digest or "unknown"
        return found


_TRAINING = ("all", "train")
_OPTIONS = {
    "all": "--data-path",
    "train": "--train-data-path",
    "valid": "--valid-data-path",
    "test": "--test-data-path",
}


def content_of(
    data: DataConfig,
    *,
    vocab_size: int | None,
    architecture: str = "",
    curriculum: CurriculumConfig | None = None,
) -> Content:
    """Read what the digests need of the files that the options name; `architecture` is that of the model.

    Raises: DataError if a file cannot be read; ConfigError if the words of a data option cannot be understood.
    """
    corpora = {
        part: tuple(
            CorpusContent(one.prefix, share, corpus_digest(one.prefix))
            for one, share in _with_shares(found, data.data_temperature)
        )
        for part, found in _corpora(data).items()
    }
    tokenizer = tokenizer_content(data, vocab_size=vocab_size)
    return Content(corpora, tokenizer, code_content(architecture), tuple(index_contents(curriculum)))


def code_content(architecture: str) -> CodeContent | None:
    """The code of an architecture of the user's own, None of the project's. Raises: ConfigError if it is not there."""
    return CodeContent(architecture, code_digest(architecture)) if is_user_code(architecture) else None


def index_contents(curriculum: CurriculumConfig | None) -> Iterator[IndexContent]:
    """The indexes of a curriculum, if there is one. What is missing or damaged is an error where they are opened."""
    if curriculum is None:
        return
    files = {
        str(folder): [folder / name for name in ("order.u32", "order.u64", "value.f32")]
        for directory in curriculum.curriculum_index
        for metric in curriculum.curriculum_metric
        for folder in [Path(directory) / directory_name(metric)]
    }
    files |= {
        prefix: [Path(f"{prefix}{ending}") for ending in (".idx", ".bin")]
        for prefix in curriculum.curriculum_deepspeed_index
    }
    for name, parts in files.items():
        try:
            yield IndexContent(name, _digest_of({part.name: part for part in parts if part.exists()}))
        except OSError:
            yield IndexContent(name, None)


def content_of_paths(data: DataConfig) -> Content:
    """What the options of an earlier run say without its files: paths and shares, no digest."""
    corpora = {
        part: tuple(CorpusContent(one.prefix, share, None) for one, share in _with_shares(found, data.data_temperature))
        for part, found in _corpora(replace(data, data_args_path=None)).items()
    }
    return Content(corpora, None)


def content_from_json(stored: Mapping[str, Any]) -> Content:
    """The content that `to_json` gave."""
    corpora = {part: tuple(CorpusContent(**one) for one in found) for part, found in stored["corpora"].items()}
    tokenizer = stored["tokenizer"]
    if tokenizer is not None:
        tokenizer = TokenizerContent(tokenizer["kind"], tuple(tokenizer["files"]), tokenizer["digest"])
    code = stored.get("code")
    indexes = tuple(IndexContent(**one) for one in stored.get("indexes", ()))
    return Content(corpora, tokenizer, None if code is None else CodeContent(code["name"], code["digest"]), indexes)


def corpus_digest(prefix: str) -> str:
    """The digest of a token file's `.idx` and `.bin`, see above. Raises: DataError if one cannot be read."""
    try:
        return _digest_of({ending: Path(f"{prefix}{ending}") for ending in (".idx", ".bin")})
    except OSError as error:
        named = f"{error.filename} cannot be read ({error.strerror})"
        raise DataError(f"{named}; give the prefix of readable files.") from error


def _digest_of(files: Mapping[str, Path]) -> str:
    """The digest of files by their labels: their sizes and blocks, see above. Raises: OSError if one cannot be read."""
    found = hashlib.sha256()
    for label, path in files.items():
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            found.update(f"{label} {size}\n".encode())
            for offset in block_offsets(size):
                found.update(os.pread(file.fileno(), BLOCK_BYTES, offset))
    return found.hexdigest()


def block_offsets(size: int) -> Sequence[int]:
    """Where the blocks begin that stand for a file of this size."""
    if size <= NUM_BLOCKS * BLOCK_BYTES:
        return range(0, size, BLOCK_BYTES)
    return [number * (size - BLOCK_BYTES) // (NUM_BLOCKS - 1) for number in range(NUM_BLOCKS)]


def tokenizer_content(data: DataConfig, *, vocab_size: int | None) -> TokenizerContent | None:
    """The tokenizer that the options name, by content; None if they name none. Raises: DataError as above."""
    kind = data.tokenizer_type
    if kind is None:
        return None
    found = hashlib.sha256()
    if kind == "NullTokenizer":
        found.update(f"{vocab_size}".encode())
    if kind == "TikTokenizer":
        found.update(f"{vocab_size} {tiktoken_options(data)}".encode())
    paths = []
    for role, path, content in _described_files(data) if kind == "HuggingFaceTokenizer" else _named_files(data):
        found.update(f"{role} {len(content)}\n".encode())
        found.update(content)
        paths.append(str(path))
    return TokenizerContent(kind, tuple(paths), found.hexdigest())


def _named_files(data: DataConfig) -> Iterator[tuple[str, Path, bytes]]:
    """(what it is for, path, content) of each file that an option names for the kind of tokenizer."""
    kind = data.tokenizer_type or ""
    options: dict[str, str | None] = {}
    if kind == "GPT2BPETokenizer":
        options = {"vocabulary": data.vocab_file, "merges": data.merge_file}
    elif kind.startswith("BertWordPiece"):
        options = {"vocabulary": data.vocab_file}
    elif kind in (*SENTENCEPIECE_KINDS, "TikTokenizer"):
        options = {"model": data.tokenizer_model}
    for role, value in options.items():
        path = Path(value or "")
        try:
            yield role, path, path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} of the tokenizer cannot be read ({error.strerror}); name its file.") from error


def _described_files(data: DataConfig) -> Iterator[tuple[str, Path, bytes]]:
    """The same of a directory that describes its tokenizer: all files that make ids, and what config.json adds."""
    path = Path(data.tokenizer_model) if data.tokenizer_model else Path(data.vocab_file or "").parent
    files = described_files(path)
    if not files:
        raise DataError(f"{path} of the tokenizer cannot be read (it has no file of one); name its directory.")
    folder = path if path.is_dir() else path.parent
    for name, content in files.items():
        yield name, path if name == "tokenizer.json" and folder != path else folder / name, content


# --- Comparing --------------------------------------------------------------------------------------------------------


def content_differences(saved: Content, now: Content, *, continues: bool = True) -> list[Difference]:
    """In what two runs read different things; files that only moved are no difference (see `moved`).

    Nor are corpora of the training data in another order. Other weights of the same corpora are reported, because a
    resumed run continues each of them (`blend_history.py`). Where it cannot (`continues`), both change its samples.
    """
    found = []
    for part in ("all", "train", "valid", "test"):
        ours, theirs = now.corpora.get(part, ()), saved.corpora.get(part, ())
        may_change = continues and part in _TRAINING
        if not same_corpora(theirs, ours) and not (may_change and _blend(theirs) == _blend(ours)):
            is_reported = part not in _TRAINING or (may_change and _digests(theirs) == _digests(ours))
            effect = Effect.REPORTED if is_reported else Effect.SAMPLES
            found.append(Difference(effect, f"the data of {_OPTIONS[part]}", _shown(theirs), _shown(ours)))
    found += tokenizer_differences(saved, now) + code_differences(saved.code, now.code)
    return found + _index_differences(saved.indexes, now.indexes)


def _index_differences(saved: Sequence[IndexContent], now: Sequence[IndexContent]) -> list[Difference]:
    """The same of a curriculum's indexes; whether there is one, and of which metrics, is compared by the options."""
    pairs = list(zip(saved, now))
    if all(theirs.digest == ours.digest or None in (theirs.digest, ours.digest) for theirs, ours in pairs):
        return []
    shown = (" ".join(f"{one.path} ({(one.digest or 'unknown')[:8]})" for one in side) for side in (saved, now))
    return [Difference(Effect.SAMPLES, INDEXES, *shown)]


def code_differences(saved: CodeContent | None, now: CodeContent | None) -> list[Difference]:
    """The same of the user's own code, where both are known: whether it computes another function nobody can tell."""
    if saved is None or now is None or saved.digest == now.digest:
        return []
    return [Difference(Effect.REPORTED, CODE, *(f"{one.name} ({one.digest[:8]})" for one in (saved, now)))]


def tokenizer_differences(saved: Content, now: Content) -> list[Difference]:
    """The same of the tokenizer alone: one difference, or none."""
    both = (saved.tokenizer, now.tokenizer)
    if saved.tokenizer is not None and now.tokenizer is not None:
        if same_tokenizer(saved.tokenizer, now.tokenizer):
            return []
        shown = (_shown_tokenizer(one) for one in both if one is not None)
        return [Difference(Effect.SAMPLES, TOKENIZER, *shown)]
    if saved.tokenizer == now.tokenizer:
        return []
    return [Difference(Effect.REPORTED, "--tokenizer-type", *("none" if one is None else one.kind for one in both))]


def moved(saved: Content, now: Content) -> list[str]:
    """A line for each file that has the same content at another path."""
    pairs = []
    for part, ours in now.corpora.items():
        theirs = saved.corpora.get(part, ())
        if same_corpora(theirs, ours):
            pairs += [(a.prefix, b.prefix) for a, b in zip(theirs, ours, strict=True) if a.digest is not None]
    if saved.tokenizer and now.tokenizer and same_tokenizer(saved.tokenizer, now.tokenizer):
        pairs += list(zip(saved.tokenizer.files, now.tokenizer.files))
    if saved.code and now.code and saved.code.digest == now.code.digest:
        pairs.append((saved.code.name, now.code.name))
    pairs += [(a.path, b.path) for a, b in zip(saved.indexes, now.indexes) if a.digest == b.digest is not None]
    return [f"{old} has moved to {new}, with the same content" for old, new in pairs if old != new]


def same_tokenizer(saved: TokenizerContent, now: TokenizerContent) -> bool:
    """Whether two tokenizers are of one kind and made of equal files."""
    kinds = {"sentencepiece" if one.kind in SENTENCEPIECE_KINDS else one.kind for one in (saved, now)}
    return len(kinds) == 1 and saved.digest == now.digest


def require_same_tokenizer(saved: Content | None, data: DataConfig, vocab_size: int, *, source: Path) -> None:
    """Refuse files of a tokenizer with other content than those that the model in `source` was trained with.

    A tokenizer of another kind, which a user names on purpose, is not compared; nor is one where the checkpoint is of
    a version that stored no content.

    Raises: ConfigError if they differ; DataError if a file cannot be read.
    """
    if saved is None or saved.tokenizer is None or data.tokenizer_type != saved.tokenizer.kind:
        return
    now = tokenizer_content(data, vocab_size=vocab_size)
    if now is not None and not same_tokenizer(saved.tokenizer, now):
        raise ConfigError(
            f"the tokenizer {' '.join(now.files)} (digest {now.digest[:8]}) has other content than that with which the "
            f"model in {source} was trained, then {' '.join(saved.tokenizer.files)} (digest "
            f"{saved.tokenizer.digest[:8]}); give the files of the training, or use these ones by --override-tokenizer"
        )


def same_corpora(saved: Sequence[CorpusContent], now: Sequence[CorpusContent]) -> bool:
    """Whether two lists of corpora are equal, as far as digests are known."""
    if [one.share for one in saved] != [one.share for one in now]:
        return False
    return all(a.digest == b.digest or None in (a.digest, b.digest) for a, b in zip(saved, now, strict=True))


def _blend(corpora: Sequence[CorpusContent]) -> list[tuple[str, str]]:
    """Digests and shares whatever the order of the corpora."""
    return sorted((one.digest or one.prefix, one.share) for one in corpora)


def _digests(corpora: Sequence[CorpusContent]) -> list[str]:
    return sorted(one.digest or one.prefix for one in corpora)


def _corpora(data: DataConfig) -> dict[str, tuple[Corpus, ...]]:
    words, flag = data.data_path, "--data-path"
    if data.data_args_path is not None:
        words, flag = read_data_args_file(data.data_args_path)
    by_part = {
        "all": (words, flag),
        "train": (data.train_data_path, "--train-data-path"),
        "valid": (data.valid_data_path, "--valid-data-path"),
        "test": (data.test_data_path, "--test-data-path"),
    }
    return {part: parse_data_path(words, flag) for part, (words, flag) in by_part.items() if words}


def _with_shares(corpora: Sequence[Corpus], temperature: float) -> Iterator[tuple[Corpus, str]]:
    """Each corpus with its share of the whole; the weight of a single corpus says nothing."""
    total = sum((one.weight for one in corpora if one.weight is not None), Fraction())
    for one in corpora:
        by_size = "by size" if temperature == 1 else f"by size, temperature {temperature:g}"
        yield one, "all" if len(corpora) == 1 else by_size if one.weight is None else str(one.weight / total)


def _shown(corpora: Sequence[CorpusContent]) -> str:
    parts = (f"{one.prefix} ({one.share}{_short(one.digest)})" for one in corpora)
    return " ".join(parts) or "none"


def _shown_tokenizer(one: TokenizerContent) -> str:
    return f"{' '.join((one.kind, *one.files))} ({one.digest[:8]})"


def _short(digest: str | None) -> str:
    return "" if digest is None else f", {digest[:8]}"
