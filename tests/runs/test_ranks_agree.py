"""Ranks to whom a file system shows different things: one decision, or one error on all of them before training."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron3d.comm.agree import disagreements
from tests.dist.pool import Pool
from tests.runs.harness import MOCK, ROOT, TINY, Ended, on_rank, random_documents, run_ok, steps, words, write_tokens

FALL_BACK = "--fall-back-to-previous-checkpoint"


def in_own_place(rank: int, world_size: int, folder: str, argv: Sequence[str], script: Path | None = None) -> Ended:
    """Body for the pool: relative paths mean another file on every rank, as if their file systems differed."""
    with contextlib.chdir(Path(folder) / f"rank{rank}"):
        return on_rank(rank, world_size, argv, *([script] if script else []))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 3 and 6, and those of a run with another learning rate."""
    folder = tmp_path_factory.mktemp("trained")
    run_ok(MOCK, "--save-interval 3 --save", folder / "save")
    run_ok(MOCK, "--lr 1e-2 --save-interval 3 --save", folder / "other")
    return folder


@pytest.fixture
def places(trained: Path, tmp_path: Path) -> Path:
    """A folder for each of two ranks with a copy of the checkpoints."""
    for rank in (0, 1):
        shutil.copytree(trained / "save", tmp_path / f"rank{rank}" / "save")
    return tmp_path


RESUME = words(MOCK, "--train-iters 8 --load save --metrics-file m.jsonl")


def _ended(pool: Pool, places: Path, argv: Sequence[str], code: int, script: Path | None = None) -> list[Ended]:
    found = pool.run(2, in_own_place, str(places), argv, script)
    for one in found:
        assert one.code == code, one.out + one.err
    return found


def test_one_rank_decides_which_checkpoint_is_the_latest(pool: Pool, places: Path) -> None:
    (places / "rank1" / "save" / "latest").write_text("iter_0000003\n")
    first, _ = _ended(pool, places, RESUME, 0)
    assert "starting from save/iter_0000006" in first.out
    mixed = [record["loss"] for record in steps(places / "rank0" / "m.jsonl")]
    shutil.copy(places / "rank0" / "save" / "latest", places / "rank1" / "save" / "latest")
    _ended(pool, places, RESUME, 0)
    assert [record["loss"] for record in steps(places / "rank0" / "m.jsonl")] == mixed


@pytest.mark.parametrize("mode", ["", "--finetune", "--zero-stage 3", "--pipeline-model-parallel-size 2"])
def test_a_rank_that_sees_another_checkpoint_is_named_on_all_ranks(
    pool: Pool, trained: Path, places: Path, mode: str
) -> None:
    """Same name, same step, other weights: the run would train on a mixture of both."""
    shutil.rmtree(places / "rank1" / "save")
    shutil.copytree(trained / "other", places / "rank1" / "save")
    for ended in _ended(pool, places, [*RESUME, *words(mode)], 4):
        ended.says(
            "the ranks do not see the same checkpoint",
            "rank 0 sees save/iter_0000006 at step 6",
            "rank 1 sees save/iter_0000006 at step 6",
            "nothing was loaded",
        )


def test_a_rank_that_sees_no_checkpoint_is_named_and_all_fall_back_together(pool: Pool, places: Path) -> None:
    shutil.rmtree(places / "rank1" / "save" / "iter_0000006")
    for ended in _ended(pool, places, RESUME, 4):
        ended.says("rank 0 sees save/iter_0000006 at step 6", "rank 1 sees no checkpoint save/iter_0000006", FALL_BACK)
    first, _ = _ended(pool, places, [*RESUME, FALL_BACK], 0)
    assert "starting from save/iter_0000003" in first.out
    assert [record["step"] for record in steps(places / "rank0" / "m.jsonl")] == [4, 5, 6, 7, 8]


def test_a_document_that_is_damaged_for_one_rank_is_an_error_for_all(pool: Pool, places: Path) -> None:
    path = places / "rank1" / "save" / "iter_0000006" / "state.json"
    path.write_text(path.read_text().replace("6", "7"))
    for ended in _ended(pool, places, RESUME, 4):
        ended.says("state.json was changed or damaged", "iter_0000003 is the one before")


def test_ranks_with_different_config_files_are_named_before_the_mesh_is_built(pool: Pool, places: Path) -> None:
    """Two ranks with different layouts would wait for each other in groups that the other one does not have."""
    for rank, tp in enumerate((2, 1)):
        (places / f"rank{rank}" / "c.json").write_text(f'{{"tensor_model_parallel_size": {tp}, "lr": 1e-3}}')
    base = words(MOCK.replace("--lr 3e-3", ""))
    first, _ = _ended(pool, places, [*base, "--config", "c.json"], 2)
    first.says("The ranks do not agree on --tensor-model-parallel-size: rank 0 has 2; rank 1 has 1")
    assert "on --lr:" not in first.err


def test_what_may_differ_by_machine_may_differ(pool: Pool, places: Path) -> None:
    for rank in (0, 1):
        (places / f"rank{rank}" / "c.json").write_text(f'{{"metrics_file": "m{rank}", "num_workers": {rank}}}')
    base = words(MOCK.replace("--num-workers 0", ""))
    _ended(pool, places, [*base, "--config", "c.json"], 0)


def test_ranks_with_different_data_or_tokenizers_are_named(pool: Pool, places: Path) -> None:
    for rank in (0, 1):
        folder = places / f"rank{rank}"
        write_tokens(folder / "data", random_documents(rank))
        tokens = "{" + ", ".join(f'"t{number}": {number}' for number in range(101)) + "}"
        (folder / "vocab.json").write_text(tokens)
        (folder / "merges.txt").write_text("#version: 0.2\n")
    argv = words(TINY, "--data-path data --vocab-file vocab.json --merge-file merges.txt")
    for ended in _ended(pool, places, argv, 3):
        ended.says("The ranks do not agree on corpus 0 of --data-path: rank 0 has share all, digest")
        assert "tokenizer" not in ended.err
    for ending in (".bin", ".idx"):
        shutil.copy(places / "rank0" / f"data{ending}", places / "rank1" / f"data{ending}")
    vocabulary = places / "rank1" / "vocab.json"
    vocabulary.write_text(vocabulary.read_text().replace("t7", "u7"))
    for ended in _ended(pool, places, argv, 3):
        ended.says("The ranks do not agree on the tokenizer: rank 0 has")
    shutil.copy(places / "rank0" / "vocab.json", vocabulary)
    _ended(pool, places, argv, 0)


def _with_blend(rank: int, world_size: int, blends: Sequence[Sequence[str]]) -> Ended:
    """Body for the pool: every rank has a blend of its own."""
    return on_rank(rank, world_size, [*words(TINY, "--data-path"), *blends[rank]])


def test_ranks_with_different_shares_of_a_blend_are_named_and_the_place_of_its_files_is_free(
    pool: Pool, tmp_path: Path
) -> None:
    a, b = (str(write_tokens(tmp_path / name, random_documents(seed))) for name, seed in (("a", 1), ("b", 2)))
    moved = str(write_tokens(tmp_path / "moved", random_documents(1)))
    for ended in pool.run(2, _with_blend, [["0.3", a, "0.7", b], ["0.7", a, "0.3", b]]):
        assert ended.code == 3, ended.out + ended.err
        ended.says(
            "The ranks do not agree on corpus 0 of --data-path: rank 0 has share 3/10, digest",
            "rank 1 has share 7/10, digest",
        )
    for ended in pool.run(2, _with_blend, [["0.3", a, "0.7", b], ["3", moved, "7", b]]):
        assert ended.code == 0, ended.out + ended.err


def test_a_rank_whose_save_is_another_directory_is_named_before_the_first_step(pool: Pool, places: Path) -> None:
    argv = words(MOCK, "--save new --metrics-file m.jsonl")
    for ended in _ended(pool, places, argv, 7):
        ended.says(
            f"--save new is not one directory for all ranks: what rank 0 makes in {places}/rank0/new on",
            f"is not seen by rank 1 ({places}/rank1/new on",
        )
    assert not (places / "rank0" / "m.jsonl").exists()
    assert [path.name for path in (places / "rank0" / "new").iterdir() if path.name.startswith(".tmp")] == []


def test_one_directory_under_two_names_is_one_directory(pool: Pool, places: Path) -> None:
    (places / "rank0" / "new").mkdir()
    (places / "rank1" / "new").symlink_to(places / "rank0" / "new")
    _ended(pool, places, words(MOCK, "--save new"), 0)
    assert not list((places / "rank0" / "new").glob(".tmp*"))


def test_generation_does_not_mix_checkpoints_or_prompts(pool: Pool, places: Path) -> None:
    script = ROOT / "tools" / "generate_text.py"
    argv = words("--load save --tokenizer-type NullTokenizer --greedy --max-new-tokens 2 --device cpu --prompts-file p")
    argv += ["--tensor-model-parallel-size", "2"]
    for rank in (0, 1):
        (places / f"rank{rank}" / "p").write_text("1 2 3\n")
    _ended(pool, places, argv, 0, script)
    (places / "rank1" / "p").write_text("1 2 4\n")
    first, _ = _ended(pool, places, argv, 2, script)
    first.says("The ranks do not agree on the prompts: rank 0 has")
    (places / "rank1" / "p").write_text("1 2 3\n")
    (places / "rank1" / "save" / "latest").write_text("iter_0000003\n")
    for ended in _ended(pool, places, argv, 4, script):
        ended.says("rank 0 sees save/iter_0000006 at step 6", "rank 1 sees save/iter_0000003 at step 3")


def test_a_disagreement_names_the_ranks_of_each_value() -> None:
    values = [{"--lr": "1"}, {"--lr": "1"}, {"--lr": "2"}, {"--lr": "1"}, {}]
    (sentence,) = disagreements(values)
    values = "ranks 0-1, 3 have 1; rank 2 has 2; rank 4 has nothing"
    assert sentence.startswith(f"The ranks do not agree on --lr: {values}.")
    assert disagreements([{"a": "1"}, {"a": "1"}]) == []
