"""Parts of a corpus for many machines: merged in order they are what one machine writes; and the same from Ray."""

from __future__ import annotations

import gzip
import importlib
import json
import random
from pathlib import Path
from types import ModuleType

import pytest

from megatron3d.data.prepare.corpus import read_batches
from megatron3d.data.prepare.executors import Ray
from megatron3d.data.prepare.inputs import find_inputs
from megatron3d.data.prepare.shard import Shard, shard_spans

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return importlib.import_module("tools.preprocess_data")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lines, compressed lines, rows and text documents, each with lines of very different lengths."""
    folder, chance = tmp_path_factory.mktemp("corpus"), random.Random(7)
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "d.txt", "e.jsonl", "f.jsonl.gz"):
        texts = [f"{name} {number} " + "x" * chance.choice([0, 0, 3, 40, 3000]) for number in range(60)]
        content = "\n\n".join(json.dumps({"text": text}) for text in texts).encode()
        if name.endswith(".gz"):
            content = gzip.compress(content, mtime=0)
        if name == "c.parquet":
            arrow, parquet = pytest.importorskip("pyarrow"), importlib.import_module("pyarrow.parquet")
            parquet.write_table(arrow.table({"text": texts}), folder / name, row_group_size=17)
        else:
            (folder / name).write_bytes(content)
    with open(folder / "e.jsonl", "ab") as stream:
        stream.write(b"\nno JSON\n")
    return folder


def words_of(corpus: Path, prefix: Path) -> list[str]:
    words = f"--input {corpus}/* --output-prefix {prefix} --tokenizer-type ByteTokenizer --max-bad-fraction 0.5"
    return words.split()


@pytest.fixture(scope="module")
def whole(corpus: Path, tool: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, ...]:
    """The .bin, the .idx and the rejects' first bytes of one run over everything."""
    prefix = tmp_path_factory.mktemp("whole") / "out"
    assert tool.main(words_of(corpus, prefix)) == 0
    return outputs(prefix)


def outputs(prefix: Path) -> tuple[bytes, ...]:
    return tuple(Path(f"{prefix}_text_document.{ending}").read_bytes() for ending in ("bin", "idx"))


@pytest.mark.parametrize("count", [2, 3, 16])
def test_merged_shards_are_what_one_run_writes(
    corpus: Path, tool: ModuleType, whole: tuple[bytes, ...], tmp_path: Path, count: int, capsys: Captured
) -> None:
    prefix = tmp_path / "out"
    for index in reversed(range(count)):
        assert tool.main([*words_of(corpus, prefix), "--shard", f"{index}/{count}"]) == 0
    name = f"{prefix}_text_document"
    assert f"tools/merge_datasets.py --shards {name} --output-prefix {name}" in capsys.readouterr().out
    assert Path(f"{name}-00000-of-{count:05d}.idx").exists()
    rejected = [json.loads(path.read_text())["record"] for path in tmp_path.glob("out_rejects-*.jsonl")]
    assert rejected == ["no JSON"]
    merge = importlib.import_module("tools.merge_datasets")
    assert merge.main(["--shards", name, "--output-prefix", name]) == 0
    assert outputs(prefix) == whole


def test_every_record_is_in_one_shard_whatever_their_number(corpus: Path) -> None:
    files = find_inputs([f"{corpus}/*"], note=print)

    def records(count: int) -> list[bytes]:
        found = []
        for index in range(count):
            for batch in read_batches(shard_spans(files, Shard(index, count)), ["text"]):
                found += [str(record).encode() for record in batch.records]
        return found

    whole = records(1)
    assert len(whole) == 5 * 60 + 2
    for count in (*range(2, 40), 1000):
        assert records(count) == whole, count


def test_a_shard_that_cannot_be_is_refused(corpus: Path, tool: ModuleType, tmp_path: Path, capsys: Captured) -> None:
    for text, message in (
        ("2/2", "--shard 2/2: shards count from 0, so of 2 the last is 1/2."),
        ("1", "--shard 1 is not of the form i/n, such as 0/16"),
        ("-1/2", "--shard -1/2 is not of the form i/n"),
        ("0/0", "--shard 0/0: there is at least 1 shard."),
    ):
        assert tool.main([*words_of(corpus, tmp_path / "out"), f"--shard={text}"]) == 2
        assert message in capsys.readouterr().err


def test_a_missing_shard_is_named_and_not_left_out(
    corpus: Path, tool: ModuleType, tmp_path: Path, capsys: Captured
) -> None:
    merge, name = importlib.import_module("tools.merge_datasets"), f"{tmp_path}/out_text_document"
    words = ["--shards", name, "--output-prefix", name]
    assert merge.main(words) == 3 and f"there is no {name}-00000-of-N.idx" in capsys.readouterr().err
    for index in (0, 2):
        assert tool.main([*words_of(corpus, tmp_path / "out"), "--shard", f"{index}/4"]) == 0
    assert merge.main(words) == 3
    printed = capsys.readouterr().err
    assert f"2 of 4 shards are not finished, the first of them {name}-00001-of-00004; run" in printed
    assert tool.main([*words_of(corpus, tmp_path / "out"), "--shard", "0/3"]) == 0
    assert merge.main(words) == 3 and "there are shards of 3 and of 4" in capsys.readouterr().err


def test_without_ray_a_sentence_says_how_to_install_it(
    corpus: Path, tool: ModuleType, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(importlib.import_module("sys").modules, "ray", None)
    assert tool.main([*words_of(corpus, tmp_path / "out"), "--executor", "ray"]) == 2
    assert "--executor ray: ray is not installed; run: " in (printed := capsys.readouterr().err) and "[ray]" in printed


@pytest.mark.slow
def test_ray_writes_what_one_process_writes(
    corpus: Path, tool: ModuleType, whole: tuple[bytes, ...], tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="needs ray")
    assert tool.main([*words_of(corpus, tmp_path / "out"), "--executor", "ray", "--workers", "2"]) == 0
    assert outputs(tmp_path / "out") == whole
    with pytest.raises(ValueError, match="invalid literal"):
        list(Ray(workers=1).map_in_order(int, ["1", "x"]))
