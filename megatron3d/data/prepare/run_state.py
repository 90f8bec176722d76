"""How far a preprocessing has come, on the disk: where `--resume` begins.

The state is a small JSON file beside the output, `{prefix}.resume.json`. It is written, whole or not at all, after
everything that it counts is on the disk, and names what the output depends on: the options, the tokenizer by content,
and the input files by size and time of change. A run with other ones must not continue from it. It is there from the
start of a run, so that what a killed run leaves is always known, and stays beside the finished output as the record of
what that was made with. A digest of its own content shows damage and changes by hand.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron3d.data.hf_description import described_files
from megatron3d.data.partial_files import Extent
from megatron3d.data.prepare.encode import EncodeRequest
from megatron3d.data.prepare.shard import Shard
from megatron3d.data.prepare.spans import Position
from megatron3d.errors import ConfigError, DataError
from megatron3d.files.fields import Fields
from megatron3d.files.json_text import parse_object
from megatron3d.storage.durable import flush_to_disk
from megatron3d.storage.refusals import storage_errors

FORMAT = 2
# What has another name on the command line than its field; and what the bytes of the output do not depend on.
_OPTIONS = {"special_tokens": "--tokenizer-hf-include-special-tokens", "language": "--lang"}
_WITHOUT_EFFECT = ("encoder",)
_FILES = ("vocab_file", "merge_file", "tokenizer_model")


@dataclass(frozen=True)
class RunCounts:
    """What has been read and written: documents, texts without a token, sequences, and bad records by reason."""

    num_documents: int = 0
    num_empty: int = 0
    num_sequences: int = 0
    num_records: int = 0
    rejects_by_reason: Mapping[str, int] = field(default_factory=dict)
    first_reject: str = ""


@dataclass(frozen=True)
class RunState:
    """The place in the input, how much of each output belongs to what lies before it, and the counts.

    `is_read` says that the input is at its end; then the outputs may have their names already. `is_published` says
    that all of them have.
    """

    position: Position = field(default_factory=Position)
    extents: tuple[Extent, ...] = ()
    rejects_bytes: int = 0
    counts: RunCounts = field(default_factory=RunCounts)
    input_bytes: int = 0
    is_read: bool = False
    is_published: bool = False


@dataclass(frozen=True)
class RunRecord:
    """What a state file holds: all that the output depends on, the names of the token files without their endings,
    which lie beside it, and the state."""

    identity: Mapping[str, str]
    outputs: tuple[str, ...]
    state: RunState


def state_path(prefix: str, shard: Shard) -> Path:
    """Where the state of a run lies."""
    return Path(f"{prefix}{shard.suffix}.resume.json")


def run_identity(request: EncodeRequest, files: Sequence[Path], shard: Shard, *, max_line_bytes: int) -> dict[str, str]:
    """All that the output depends on, by the names that users know. Raises: DataError if a file cannot be read."""
    found = {"--shard": str(shard), "--max-line-bytes": str(max_line_bytes), "input files": str(len(files))}
    found |= _options(asdict(request))
    return found | {f"input file {number}": _file_identity(file) for number, file in enumerate(files)}


def changed_files(identity: Mapping[str, str], files: Sequence[Path]) -> list[Path]:
    """Those of `files` that are gone or other ones than when `run_identity` was asked about all of them."""

    def is_changed(number: int, file: Path) -> bool:
        return not os.path.exists(file) or identity[f"input file {number}"] != _file_identity(file)

    return [file for number, file in enumerate(files) if is_changed(number, file)]


def save_state(path: Path, run: RunRecord) -> None:
    """Write the state; what it counts must be on the disk. Raises: StorageError."""
    body = {"run": dict(run.identity), "outputs": [*run.outputs], "state": asdict(run.state)}
    content = {"format": FORMAT, **body, "digest": _digest_of(body)}
    beside = _beside(path)
    with storage_errors("write", path, way_out="give another --output-prefix"):
        with open(beside, "wb") as stream:
            stream.write((json.dumps(content, indent=1) + "\n").encode())
            flush_to_disk(stream)
        beside.replace(path)


def remove_state(path: Path) -> None:
    """Remove a state, and what a killed run left of one that it was writing. Raises: StorageError."""
    with storage_errors("remove", path, way_out="give another --output-prefix"):
        _beside(path).unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def load_state(path: Path) -> RunRecord:
    """What an earlier run wrote. Raises: DataError if the file is damaged or was changed by hand."""
    try:
        stored = Fields(parse_object(path.read_bytes()), "the file")
        if stored.integer("format") != FORMAT:
            raise ValueError(f"its format is {stored.integer('format')}, and {FORMAT} can be read")
        identity = Fields(stored.entries("run"), "run")
        run = RunRecord(
            {name: identity.text(name) for name in stored.entries("run")}, stored.texts("outputs"), _state(stored)
        )
        if stored.text("digest") != _digest_of({name: stored.get(name) for name in ("run", "outputs", "state")}):
            raise ValueError("its digest is of another content, so it is damaged or was changed by hand")
        return run
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); run again without --resume.") from error


def require_same_run(path: Path, saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raises: ConfigError naming all that differs."""
    differences = [
        f"  {name}: {saved.get(name, 'not given')} then, {now.get(name, 'not given')} now"
        for name in dict.fromkeys((*saved, *now))
        if saved.get(name) != now.get(name)
    ]
    if differences:
        raise ConfigError(
            "\n".join(
                [
                    f"--resume: {path} is of a run that would write something else:",
                    *differences,
                    "Give the same options and input, or leave out --resume to start again.",
                ]
            )
        )


def _file_identity(file: Path) -> str:
    """A file by name, size and time of change. Raises: OSError."""
    status = file.stat()
    return f"{os.path.abspath(file)} of {status.st_size} bytes, changed at {status.st_mtime_ns / 1e9:.6f}"


def _beside(path: Path) -> Path:
    """Where a state is written before it takes its name; one run at a time does so, that which has the token files."""
    return path.with_name(f"{path.name}.partial")


def _state(stored: Fields) -> RunState:
    """The state by its fields. Raises: ValueError."""
    state = Fields(stored.entries("state"), "state")
    position, counts = Fields(state.get("position"), "position"), Fields(state.get("counts"), "counts")
    reasons = Fields(counts.get("rejects_by_reason"), "rejects_by_reason")
    return RunState(
        Position(*(position.integer(name) for name in ("span", "num_read", "byte"))),
        tuple(
            Extent(*(row.integer(name) for name in ("bin_bytes", "num_sequences", "num_documents")))
            for row in state.rows("extents")
        ),
        state.integer("rejects_bytes"),
        RunCounts(
            counts.integer("num_documents"),
            counts.integer("num_empty"),
            counts.integer("num_sequences"),
            counts.integer("num_records"),
            {name: reasons.integer(name) for name in counts.entries("rejects_by_reason")},
            counts.text("first_reject"),
        ),
        state.integer("input_bytes"),
        state.flag("is_read"),
        state.flag("is_published"),
    )


def _options(values: Mapping[str, Any]) -> dict[str, str]:
    """Options by flag, those of nested values too; files by the digest of their content."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if name in _WITHOUT_EFFECT:
            continue
        flag = _OPTIONS.get(name, f"--{name.replace('_', '-')}")
        if name in _FILES and value is not None:
            found[flag] = f"content {_digest(Path(value), is_described=name == 'tokenizer_model')}"
        elif name == "splitting":
            found |= {"--split-sentences": str(value is not None)} | _options(value or {})
        elif isinstance(value, Mapping):
            found |= _options(value)
        elif isinstance(value, tuple):
            found[flag] = " ".join(map(str, value))
        else:
            found[flag] = str(value)
    return found


def _digest_of(body: Mapping[str, Any]) -> str:
    """The digest of what a state file holds, in whichever order and layout."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _digest(path: Path, *, is_described: bool) -> str:
    """The digest of a file, or of all files of a tokenizer that a directory or `tokenizer.json` describes."""
    if is_described and (path.is_dir() or path.suffix == ".json"):
        files = described_files(path)
    else:
        files = {path.name: path.read_bytes()}
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name} {len(files[name])}\n".encode() + files[name])
    return digest.hexdigest()[:16]
