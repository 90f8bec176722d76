"""The command that verifies checkpoints: exit codes, one line for what is whole, a sentence for each problem."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron3d.checkpoint.save import save_checkpoint
from tests.checkpoint.layouts import SPECS, SmallLayout, merged
from tools import verify_checkpoint

Run = Callable[..., tuple[int, list[str], str]]
SHARD = "rank00000.safetensors"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A --save directory with checkpoints of steps 10, 20 and 30."""
    for step in (10, 20, 30):
        tensors = merged(SmallLayout(tp=2, dp=2))
        documents = {"run": {"hidden_size": 6}, "state": {"step": step}}
        save_checkpoint(
            tmp_path / "save", step, tensors, documents=documents, keep_last=None, group=None, rank=0, world_size=1
        )
    return tmp_path / "save"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the tool; its exit code, the lines of its output, and what it wrote to standard error."""

    def call(*words: object) -> tuple[int, list[str], str]:
        code = verify_checkpoint.main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return call


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_the_latest_is_verified_and_said_to_be_whole_in_one_line(run: Run, root: Path) -> None:
    code, (line,), err = run(root)
    assert code == 0 and err == ""
    assert line.startswith(f"{root / 'iter_0000030'} is whole: step 30, {len(SPECS)} tensors in ")
    assert re.search(r"of 1 files, 2 documents, [\d.]+ kB; every byte agrees .* \([\d.]+ s, [\d.]+ [kMG]?B/s\)$", line)


def test_one_step_one_directory_or_all_are_verified_at_the_level_asked_for(run: Run, root: Path) -> None:
    for words in ((root, "--ckpt-step", 20), (root / "iter_0000020",)):
        code, (line,), _ = run(*words, "--level", "headers")
        assert code == 0 and line.startswith(f"{root / 'iter_0000020'} is whole") and line.endswith("index agree")
    code, lines, _ = run(root, "--all", "--level", "sizes")
    assert code == 0 and [line.partition(" is whole")[0][-2:] for line in lines] == ["10", "20", "30"]


def test_each_problem_is_a_sentence_and_the_code_is_4(run: Run, root: Path) -> None:
    flip(root / "iter_0000010" / SHARD, -1)
    (root / "iter_0000020" / "run.json").write_text("{}")
    shutil.rmtree(root / "iter_0000030")
    (root / "iter_0000040").mkdir()
    code, lines, err = run(root, "--all")
    assert code == 4 and err == ""
    assert [re.sub(r".*(iter_\d+|latest)\b", r"\1", line.split(" ")[0 if "not a" in line else 2]) for line in lines]
    text = "\n".join(lines)
    for part in (
        "iter_0000040 is not a checkpoint: it has no index.json",
        "latest names 'iter_0000030', which is not a checkpoint",
        f"iter_0000010/{SHARD} is damaged at tensor",
        "iter_0000020/run.json: 2 bytes instead of",
    ):
        assert part in text
    assert len(lines) == 4


def test_a_flipped_bit_is_found_by_the_full_level_alone(run: Run, root: Path) -> None:
    flip(root / "iter_0000030" / SHARD, -1)
    assert run(root, "--level", "headers")[0] == 0
    code, (line,), _ = run(root)
    assert code == 4 and "checksum" in line


def test_a_damaged_index_is_one_problem_of_that_checkpoint(run: Run, root: Path) -> None:
    (root / "iter_0000020" / "index.json").write_text("[" * 100_000)
    code, lines, _ = run(root, "--all")
    assert code == 4 and sum("is whole" in line for line in lines) == 2
    assert any("iter_0000020/index.json is not the index of a checkpoint" in line for line in lines)


def test_a_checkpoint_under_the_name_of_another_step_is_not_whole(run: Run, root: Path) -> None:
    (root / "iter_0000030").rename(root / "iter_0000040")
    (root / "latest").write_text("iter_0000040")
    code, (line,), _ = run(root, "--level", "sizes")
    assert code == 4
    assert f"{root / 'iter_0000040'} has the checkpoint of step 30; rename it to iter_0000030" in line


def test_an_empty_directory_a_missing_step_and_options_that_exclude_each_other_are_refused(
    run: Run, root: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    for words, expected, message in (
        ((tmp_path / "empty",), 4, f"error: {tmp_path / 'empty'} has no file named latest"),
        ((tmp_path / "empty", "--all"), 4, "it is empty"),
        ((tmp_path / "nowhere",), 4, "is not a directory"),
        ((root, "--ckpt-step", 15), 4, "it holds checkpoints of steps 10, 20, 30"),
        ((root, "--all", "--ckpt-step", 10), 2, "--all and --ckpt-step 10 exclude each other"),
    ):
        code, lines, err = run(*words)
        assert (code, lines) == (expected, []) and message in err and "--load" not in err


def test_progress_says_how_much_of_the_checkpoint_was_read(
    run: Run, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_checkpoint, "_PROGRESS_INTERVAL_S", 0.0)
    _, _, err = run(root)
    shares = [float(found) for found in re.findall(r"iter_0000030: ([\d.]+)% of [\d.]+ kB, [\d.]+ .?B/s", err)]
    assert shares == sorted(shares) and len(shares) > len(SPECS)
    index = json.loads((root / "iter_0000030" / "index.json").read_text())
    header_bytes = int.from_bytes((root / "iter_0000030" / SHARD).read_bytes()[:8], "little") + 8
    total = sum(index["files"].values()) + sum(one["size_bytes"] for one in index["documents"].values())
    assert shares[-1] == pytest.approx(100 * (total - header_bytes) / total, abs=0.1), "all but the header of the file"


def test_nothing_is_changed(run: Run, root: Path) -> None:
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in root.rglob("*")}
    os.chmod(root, 0o555)
    assert run(root, "--all")[0] == 0
    os.chmod(root, 0o755)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in root.rglob("*")} == before


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("latest", "latest cannot be read (.*not a regular file"),
        ("iter_0000030/index.json", "latest names 'iter_0000030', which is not a checkpoint"),
        ("iter_0000030/run.json", "run.json is missing (it is not a regular file"),
        (f"iter_0000030/{SHARD}", f"{SHARD} is damaged: 0 bytes"),
    ],
)
def test_a_pipe_in_the_place_of_a_file_is_a_problem_and_nobody_waits_for_its_writer(
    root: Path, run: Run, name: str, sentence: str
) -> None:
    (root / name).unlink()
    os.mkfifo(root / name)
    code, out, err = run(root)
    assert code == 4
    said = "\n".join([*out, err])
    assert re.search(re.escape(sentence).replace(r"\.\*", ".*"), said), said
