"""Resuming a preprocessing: from any record of any format, from any step of publishing, and only the same run."""

from __future__ import annotations

import dataclasses
import gzip
import importlib
import json
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from megatron3d.data.partial_files import partial_paths
from megatron3d.data.prepare import columns, lines, output
from megatron3d.data.prepare.encode import EncodeRequest
from megatron3d.data.prepare.output import PreprocessOutput
from megatron3d.data.prepare.preprocess import PreprocessProgress, RunOptions, preprocess
from megatron3d.data.prepare.run_state import RunRecord, load_state, save_state
from megatron3d.data.prepare.spans import Position
from megatron3d.data.tokenizer import TokenizerSpec
from megatron3d.errors import ConfigError, DataError, StorageError
from megatron3d.storage import atomic

REQUEST = EncodeRequest(TokenizerSpec("ByteTokenizer"), ("text", "title"), append_eod=True)
TEXTS = ["first", "", "zweiter: über", "日本 🙂"] + [f"text {n} " * (n % 7) for n in range(120)]
OUTPUTS = sorted([f"out_{key}_document.{end}" for key in REQUEST.json_keys for end in ("bin", "idx")])


def write_corpus(folder: Path) -> list[Path]:
    """The same documents as lines, compressed lines and rows, with a bad record and blank lines among the lines."""
    lines = [json.dumps({"text": text, "title": text[:3]}).encode() for text in TEXTS]
    lines[50:50] = [b"", b'{"text": "no title"}', b"\r"]
    files = [folder / name for name in ("a.jsonl", "b.jsonl.gz", "c.parquet")]
    files[0].write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    files[1].write_bytes(gzip.compress(b"\r\n".join(lines)))
    arrow = pytest.importorskip("pyarrow")
    table = arrow.table({"text": TEXTS, "title": TEXTS})
    importlib.import_module("pyarrow.parquet").write_table(table, files[2], row_group_size=33)
    return files


def run(files: list[Path], prefix: Path, report: Callable[[PreprocessProgress], None] | None = None, **options: object):
    """A run in this process, with the lines that it noted."""
    notes: list[str] = []
    chosen = dataclasses.replace(RunOptions(checkpoint_s=0, limits=LIMITS), **options)
    done = preprocess(
        files, str(prefix), request=REQUEST, options=chosen, report=report or (lambda _: None), note=notes.append
    )
    return done, notes


LIMITS = dataclasses.replace(RunOptions().limits, max_fraction=0.1)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def interrupt(progress: PreprocessProgress) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "_BLOCK_LINES", 19)
    monkeypatch.setattr(columns, "_ROWS", 19)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_corpus(tmp_path_factory.mktemp("in"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, files: list[Path]) -> dict[str, bytes]:
    """What a run that nobody ended writes."""
    folder = tmp_path_factory.mktemp("whole")
    run(files, folder / "out")
    found = contents(folder)
    assert sorted(found) == sorted([*OUTPUTS, "out.resume.json", "out_rejects.jsonl"])
    return found


@pytest.mark.usefixtures("small_batches")
def test_a_run_that_is_ended_after_each_batch_is_resumed_to_the_same_bytes(
    tmp_path: Path, files: list[Path], whole: dict[str, bytes]
) -> None:
    num_runs, notes = 0, []
    while num_runs < 100:
        try:
            done, more = run(files, tmp_path / "ended/out", interrupt, resume=True)
        except KeyboardInterrupt as error:
            num_runs += 1
            assert "documents are kept beside" in error.__notes__[0]
            assert not {path.suffix for path in (tmp_path / "ended").iterdir()} & {".bin", ".idx", ".jsonl"}
            continue
        notes += more
        break
    assert num_runs > 20 and done is not None and done.num_documents == 3 * len(TEXTS)
    assert "2 of 374 records rejected (2 key missing)" in done.rejected
    assert notes == [f"--resume: goes on behind the {done.num_documents} documents that are written."]
    assert contents(tmp_path / "ended") == whole


def test_a_file_that_grows_or_goes_while_it_is_read_is_noted(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    for file in files:
        file.write_text('{"text": "a", "title": "b"}\n')

    def change(progress: PreprocessProgress) -> None:
        if progress.num_documents == 3:
            files[0].write_bytes(files[0].read_bytes() * 2)
            files[2].unlink()

    done, notes = run(files, tmp_path / "out", change)
    assert done is not None and done.num_documents == 3 and done.input_share == 1
    assert [note.split(" has changed since this run began")[0] for note in notes] == [str(files[0]), str(files[2])]


@pytest.mark.usefixtures("small_batches")
def test_a_state_counts_nothing_that_is_not_on_the_disk(
    tmp_path: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill right behind the state must find all that it counts: sizes as the system has them, not as buffered."""
    num_saved = 0

    def check_and_save(path: Path, saved: RunRecord) -> None:
        nonlocal num_saved
        num_saved += saved.state.counts.num_records > 0
        for key, extent in zip(REQUEST.json_keys, saved.state.extents if not saved.state.is_published else ()):
            tokens, lengths, sizes = partial_paths(str(tmp_path / f"out_{key}_document"))[:3]
            counted = (extent.bin_bytes, 4 * extent.num_sequences, 4 * extent.num_documents)
            found = tuple(part.stat().st_size for part in (tokens, lengths, sizes) if part.exists())
            assert found == (counted if saved.state.counts.num_records else ())
        save_state(path, saved)

    monkeypatch.setattr(output, "save_state", check_and_save)
    run(files, tmp_path / "out")
    assert num_saved > 20


def test_a_run_that_is_ended_at_any_rename_is_resumed_to_the_same_bytes(
    tmp_path: Path, files: list[Path], whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the state, two pairs, the list of rejects and what is removed on the way; each of these ends one run."""
    replace, unlink = Path.replace, Path.unlink
    for last in range(20):
        folder, calls = tmp_path / f"ended{last}", []

        def counted(call: Callable[..., object], calls: list[int] = calls, last: int = last) -> Callable[..., object]:
            def counting(path: Path, *words: object, **more: object) -> object:
                calls.append(1)
                if len(calls) == last + 1:
                    raise KeyboardInterrupt
                return call(path, *words, **more)

            return counting

        with monkeypatch.context() as patched:
            patched.setattr(PreprocessOutput, "_publish", _patching_publish(patched, counted, replace, unlink))
            try:
                run(files, folder / "out", checkpoint_s=60)
            except KeyboardInterrupt:
                patched.undo()
                done, notes = run(files, folder / "out", resume=True)
                assert done is not None and notes[0].startswith("--resume: goes on behind the 372 documents")
                assert contents(folder) == whole, last
            else:
                break
    assert last > 5


def _patching_publish(patched: pytest.MonkeyPatch, counted: Callable, replace: Callable, unlink: Callable) -> Callable:
    """`_publish`, in which each renaming and removal is counted."""
    publish = PreprocessOutput._publish

    def patching(output: PreprocessOutput) -> None:
        patched.setattr(Path, "replace", counted(replace))
        patched.setattr(Path, "unlink", counted(unlink))
        publish(output)

    return patching


def test_only_the_same_run_is_resumed_and_all_differences_are_named(
    tmp_path: Path, tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = tmp_path / "c.jsonl"
    lines.write_text("".join(json.dumps({"text": text, "title": "t"}) + "\n" for text in TEXTS))
    with pytest.raises(KeyboardInterrupt):
        run([lines], tmp_path / "out", interrupt)
    before = contents(tmp_path)
    lines.write_text(lines.read_text() + "\n")
    words = ["--input", lines, "--output-prefix", tmp_path / "out", "--tokenizer-type", "NullTokenizer", "--resume"]
    assert tool.main([*map(str, words), "--json-keys", "text", "title", "--split-sentences"]) == 2
    printed = capsys.readouterr().err
    for named in (
        "out.resume.json is of a run that would write something else",
        "--tokenizer-type: ByteTokenizer then, NullTokenizer now",
        "--vocab-size: None then, 786 now",
        "--append-eod: True then, False now",
        "--split-sentences: False then, True now",
        f"input file 0: {lines} of {len(before['c.jsonl'])} bytes",
        "leave out --resume to start again",
    ):
        assert named in printed, named
    assert "--json-keys" not in printed
    after = contents(tmp_path)
    assert {name: after[name] for name in after if name != "c.jsonl"} == {
        name: before[name] for name in before if name != "c.jsonl"
    }


def test_a_complete_output_is_left_as_it_is_and_without_a_state_a_run_begins_at_the_start(
    tmp_path: Path, files: list[Path], whole: dict[str, bytes]
) -> None:
    done, notes = run(files, tmp_path / "new/out", resume=True)
    assert done is not None and notes == [
        f"--resume: there is no {tmp_path}/new/out.resume.json, so this begins at the start."
    ]
    assert contents(tmp_path / "new") == whole
    assert run(files, tmp_path / "new/out", resume=True) == (None, [])


def test_a_complete_output_of_other_options_or_of_unknown_ones_is_refused(
    tmp_path: Path, files: list[Path], whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "out.resume.json"
    run(files, tmp_path / "out")
    with pytest.raises(ConfigError, match="--max-line-bytes: 100000000 then, 1000 now"):
        run(files, tmp_path / "out", resume=True, limits=dataclasses.replace(LIMITS, max_line_bytes=1000))
    with pytest.raises(DataError, match="records rejected"):  # a run that replaces nothing leaves what is known
        run(files, tmp_path / "out", limits=dataclasses.replace(LIMITS, max_fraction=0))
    with monkeypatch.context() as patched:
        patched.setitem(globals(), "REQUEST", dataclasses.replace(REQUEST, json_keys=("text", "title", "meta")))
        with pytest.raises(ConfigError, match="--json-keys: text title then, text title meta now"):
            run(files, tmp_path / "out", resume=True)
    assert contents(tmp_path) == whole
    for name in ("out_text_document.idx", "out_text_document.bin"):
        os.truncate(tmp_path / name, 10)
        with pytest.raises(DataError, match=rf"{name} holds 10 bytes, but \d+ by .*out\.resume\.json: it was changed"):
            run(files, tmp_path / "out", resume=True)
    state.unlink()
    with pytest.raises(ConfigError, match=r"out_text_document\.bin is complete, but there is no .*out\.resume\.json"):
        run(files, tmp_path / "out", resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_a_place_where_the_system_refuses_even_to_look_is_named(
    tmp_path: Path, files: list[Path], resume: bool
) -> None:
    """Such as a folder that is closed to the user, or a name that is too long."""
    with pytest.raises(StorageError, match=r"could not write .*xxx_rejects\.jsonl"):
        run(files, tmp_path / ("x" * 300), resume=resume)


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_was_killed_before_its_first_state_leaves_nothing_to_the_next(
    tmp_path: Path, files: list[Path], whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    """What a kill leaves: the partial files of its own keys. The next run has the same (`resume`), or one of them."""
    with monkeypatch.context() as patched:
        patched.setattr(PreprocessOutput, "_end", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            run(files, tmp_path / "out", interrupt, checkpoint_s=60)
    assert (tmp_path / "out_title_document.lengths.partial").exists()
    if resume:
        _, notes = run(files, tmp_path / "out", resume=True)
        assert notes == [f"--resume: {tmp_path}/out.resume.json counts no document yet, so this begins at the start."]
        assert contents(tmp_path) == whole
    else:
        monkeypatch.setitem(globals(), "REQUEST", dataclasses.replace(REQUEST, json_keys=("text",)))
        run(files, tmp_path / "out")
        names = ["out.resume.json", "out_text_document.bin", "out_text_document.idx"]
        assert sorted(contents(tmp_path)) == names


def test_damage_to_what_an_ended_run_left_is_named(
    tmp_path: Path, files: list[Path], tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(files, tmp_path / "out", interrupt)
    partial, state = tmp_path / "out_title_document.bin.partial", tmp_path / "out.resume.json"
    words = [*map(str, files), "--output-prefix", str(tmp_path / "out"), "--tokenizer-type", "ByteTokenizer"]
    words = ["--input", *words, "--json-keys", "text", "title", "--append-eod", "--resume"]
    os.truncate(partial, partial.stat().st_size - 1)
    assert tool.main(words) == 3
    assert f"{partial} holds {partial.stat().st_size} bytes, but" in capsys.readouterr().err
    text = state.read_text()
    state.write_text(text.replace('"num_read": ', '"num_read": 1'))
    assert tool.main(words) == 3
    assert "its digest is of another content, so it is damaged or was changed by hand" in capsys.readouterr().err
    state.write_text(text.replace('"num_read"', '"number"'))
    assert tool.main(words) == 3
    assert "out.resume.json cannot be read (position has no field 'num_read')" in capsys.readouterr().err
    assert tool.main(words[:-1]) == 0
    assert f"{state} cannot be read, so what it counts is replaced." in capsys.readouterr().err


def test_a_state_at_a_place_where_no_record_begins_is_refused(tmp_path: Path, files: list[Path]) -> None:
    """Such as of an input that was changed and has its size and time again."""
    with pytest.raises(KeyboardInterrupt):
        run(files, tmp_path / "out", interrupt)
    saved, size = load_state(tmp_path / "out.resume.json"), files[0].stat().st_size
    for position, clause in (
        (Position(0, 1, 25), f"it stands at byte 25 of {files[0]}, where no line begins"),
        (Position(0, 1, size + 1), f"it stands at byte {size + 1} of {files[0]}, of which 0 to {size} are read"),
        (Position(3), "it stands in part 3 of the input, counted from 0, which has 3"),
        (Position(2, 125), f"it stands behind row 125 of {files[2]}, of which {len(TEXTS)} are read"),
    ):
        state = dataclasses.replace(saved.state, position=position)
        save_state(tmp_path / "out.resume.json", dataclasses.replace(saved, state=state))
        with pytest.raises(DataError, match=re.escape(f"does not fit the input: {clause}; run again without")):
            run(files, tmp_path / "out", resume=True)


def test_standard_input_is_neither_resumed_nor_sharded(
    tmp_path: Path, tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--input", "-", "--output-prefix", tmp_path / "out", "--tokenizer-type", "ByteTokenizer"]
    assert tool.main([*map(str, words), "--resume", "--shard", "1/2"]) == 2
    printed = capsys.readouterr().err
    assert "--resume: what was read from standard input cannot be read again" in printed
    assert "--shard 1/2: standard input has no parts" in printed and not os.listdir(tmp_path)


@pytest.mark.usefixtures("small_batches")
def test_two_runs_cannot_write_the_same_output(
    tmp_path: Path,
    files: list[Path],
    whole: dict[str, bytes],
    tool: ModuleType,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(atomic, "_WAIT_S", 0)
    words = ["--input", str(files[0]), "--output-prefix", str(tmp_path / "one/out"), "--tokenizer-type"]
    codes, others = [], (["ByteTokenizer"], ["ByteTokenizer", "--split-sentences"])
    run(files, tmp_path / "one/out", lambda _: codes.extend(tool.main([*words, *other]) for other in others))
    assert set(codes) == {8} and "out_rejects.jsonl.partial is being written by another" in capsys.readouterr().err
    assert contents(tmp_path / "one") == whole


@pytest.mark.usefixtures("small_batches")
def test_a_full_disk_keeps_what_was_written_and_the_run_goes_on_when_there_is_room(
    tmp_path: Path, files: list[Path], whole: dict[str, bytes], tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit on the size of files stands for a full disk: both refuse in the middle of a write."""
    words = [*map(str, files), "--output-prefix", str(tmp_path / "full/out"), "--tokenizer-type", "ByteTokenizer"]
    words = ["--input", *words, "--json-keys", "text", "title", "--append-eod", "--max-bad-fraction", "0.1"]
    words += ["--checkpoint-interval", "0"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole["out_text_document.bin"]) // 2, hard))
    try:
        assert tool.main(words) == 7
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in (printed := capsys.readouterr().err) and "with --resume goes on" in printed
    assert json.loads((tmp_path / "full/out.resume.json").read_text())["state"]["counts"]["num_documents"] > 50
    assert tool.main([*words, "--resume"]) == 0
    assert contents(tmp_path / "full") == whole


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return importlib.import_module("tools.preprocess_data")
