"""What a user can get wrong: a sentence with the option or file, its value and what to do, and the right exit code."""

from __future__ import annotations

import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron3d.checkpoint.directory import hold_directory, verify
from tests.runs.harness import (
    MOCK,
    TINY,
    VOCAB_SIZE,
    exit_status,
    losses,
    random_documents,
    run,
    run_ok,
    steps,
    words,
    write_tokens,
)

# options added to a run that works, number of ranks, and what the sentence must hold
WRONG_OPTIONS = {
    "heads that tensor parallelism does not divide": (
        "--tensor-model-parallel-size 3 --ffn-hidden-size 96", 3,
        ("--num-attention-heads 4 is not a multiple of --tensor-model-parallel-size 3", "use"),
    ),
    "groups that tensor parallelism does not divide": (
        "--tensor-model-parallel-size 4 --hidden-size 48 --num-attention-heads 12 --group-query-attention "
        "--num-query-groups 3", 4,
        ("--num-query-groups 3 does not divide --tensor-model-parallel-size 4, nor does that divide it", "use"),
    ),
    "an FFN that tensor parallelism does not divide": (
        "--tensor-model-parallel-size 4 --ffn-hidden-size 90", 4,
        ("--ffn-hidden-size 90 is not a multiple of --tensor-model-parallel-size 4", "1 or 2"),
    ),
    "more stages than layers": (
        "--pipeline-model-parallel-size 4", 4,
        ("--pipeline-model-parallel-size 4", "--num-layers 2", "at most 2 stages"),
    ),
    "a global batch that is no multiple": (
        "--global-batch-size 30", 8,
        ("--global-batch-size 30 is not a multiple of micro-batch 2 x data-parallel 8 = 16", "use 16 or 32"),
    ),
    "a world that does not factor": (
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2", 6,
        ("6 ranks", "tensor 2 x pipeline 2 = 4", "4 or 8"),
    ),
    "a sequence longer than the positions": (
        "--max-position-embeddings 8", 1,
        ("--seq-length 16 is longer than --max-position-embeddings 8", "--seq-length 8"),
    ),
    "iterations and samples": (
        "--train-samples 80", 1,
        ("--train-iters 6", "--train-samples 80", "give only one"),
    ),
    "an unknown flag": ("--num-layer-s 4", 1, ("--num-layer-s", "--num-layers")),
    "two precisions": ("--bf16 --fp16", 1, ("--bf16 and --fp16", "only one")),
    "a split without training": ("--split 0,1,1", 1, ("--split 0,1,1", "training", "more than 0")),
    "a finetuning without a source": ("--finetune", 1, ("--finetune", "--load")),
    "an option of another order of work": (
        "--pipeline-schedule zigzag", 1, ("--pipeline-schedule zigzag", "1f1b"),
    ),
    "a wrong vocabulary id for the end": (
        "--eod-token 101", 1, ("--eod-token 101", "101 ids", "0 to 100"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_OPTIONS.values(), ids=WRONG_OPTIONS.keys())
def test_wrong_options_are_refused_with_value_and_fix(case: tuple[str, int, tuple[str, ...]]) -> None:
    options, world_size, fragments = case
    ended = run(words(MOCK, options), world_size=world_size)
    assert ended.code == 2, ended.err
    ended.says(*fragments)
    assert "Traceback" not in ended.err


def test_several_problems_are_reported_together() -> None:
    argv = words(
        MOCK, "--tensor-model-parallel-size 3 --max-position-embeddings 8 --clip-grad -1 --global-batch-size 9"
    )
    ended = run(argv, world_size=3)
    assert ended.code == 2
    ended.says("--num-attention-heads 4", "--max-position-embeddings 8", "--clip-grad -1", "--global-batch-size 9")


def test_only_rank_0_says_what_is_wrong_with_the_options() -> None:
    assert run(words(MOCK, "--train-samples 80"), rank=1, world_size=2).err == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_refused(tmp_path: Path) -> None:
    ended = run(words(MOCK, "--device cuda", "--save", tmp_path))
    assert ended.code == 2
    ended.says("--device cuda needs a GPU", "use --device cpu")
    assert exit_status(tmp_path)["code"] == 2


def test_an_exit_status_of_an_earlier_run_does_not_outlive_wrong_options(tmp_path: Path) -> None:
    """A launcher that requeues on 75 would otherwise do so for ever."""
    assert run(words(MOCK, "--exit-interval 2 --save", tmp_path)).code == 75
    assert exit_status(tmp_path)["code"] == 75
    assert run(words(MOCK, "--exit-interval 2 --seq-length 0 --save", tmp_path)).code == 2
    assert exit_status(tmp_path)["code"] == 2
    assert "--seq-length 0" in exit_status(tmp_path)["reason"]


# --- Data -------------------------------------------------------------------------------------------------------------


def _data_run(prefix: Path, options: str = "") -> list[str]:
    return words(TINY, options, "--data-path", prefix)


def test_missing_data_is_refused_with_both_file_names(tmp_path: Path) -> None:
    ended = run(_data_run(tmp_path / "nothing"))
    assert ended.code == 3
    ended.says(f"{tmp_path}/nothing.bin", f"{tmp_path}/nothing.idx", "tools/preprocess_data.py")


def test_truncated_tokens_are_refused_with_the_byte_range(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "corpus", random_documents(1))
    tokens = tmp_path / "corpus.bin"
    tokens.write_bytes(tokens.read_bytes()[:1000])
    ended = run(_data_run(prefix, "--split 1"))
    assert ended.code == 3
    ended.says(f"{tokens} holds 1000 bytes", "truncated", "preprocess it again")


def test_an_index_with_wrong_magic_is_refused(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "corpus", random_documents(1))
    index = tmp_path / "corpus.idx"
    index.write_bytes(b"NOTANIDX\0" + index.read_bytes()[9:])
    ended = run(_data_run(prefix))
    assert ended.code == 3
    ended.says(f"{index} is no token index", "NOTANIDX", "tools/preprocess_data.py")


def test_an_empty_corpus_is_refused(tmp_path: Path) -> None:
    ended = run(_data_run(write_tokens(tmp_path / "empty", [])))
    assert ended.code == 3
    ended.says("leaves no training document", f"{tmp_path}/empty", "which has 0")


def test_a_split_without_training_documents_is_refused(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "corpus", random_documents(1, count=5))
    ended = run(_data_run(prefix, "--split 1,99,0"))
    assert ended.code == 3
    ended.says("--split 1,99,0 leaves no training document", str(prefix), "which has 5", "larger first share")


def test_a_corpus_shorter_than_a_sample_is_refused(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "corpus", [[1, 2, 3]])
    ended = run(_data_run(prefix, "--split 1"))
    assert ended.code == 3
    ended.says("3 tokens", "--seq-length 16 needs 17", "lower --seq-length")


def test_a_token_id_outside_the_vocabulary_names_file_document_and_offset(tmp_path: Path) -> None:
    documents = random_documents(1)
    documents[3][5] = VOCAB_SIZE
    prefix = write_tokens(tmp_path / "corpus", documents)
    save = tmp_path / "save"
    ended = run(words(TINY, "--train-iters 40 --split 1 --data-path", prefix, "--save", save))
    assert ended.code == 3
    ended.says(
        f"{prefix}.bin, document 3, sequence 3, token 5", "token id 101", "vocabulary of 101", "use the tokenizer",
        "rank 0 of 1", "after step",
    )  # fmt: skip
    status = exit_status(save)
    assert (status["code"], status["rank"]) == (3, 0)
    assert "token id 101" in status["reason"]


# --- Checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 2, 4 and 6; tests copy it."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    run_ok(MOCK, "--save-interval 2 --save", folder)
    return folder


@pytest.fixture
def checkpoints(saved: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoints that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def test_loading_from_a_directory_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no checkpoint")
    ended = run(words(MOCK, "--load", tmp_path))
    assert ended.code == 4
    ended.says(f"--load {tmp_path}", "no finished checkpoint", "notes.txt", "--ckpt-step")


def test_loading_from_no_directory_at_all_is_refused(tmp_path: Path) -> None:
    ended = run(words(MOCK, "--load", tmp_path / "gone"))
    assert ended.code == 4
    ended.says(f"--load {tmp_path}/gone is not a directory", "--save")


def test_a_step_that_is_not_there_is_refused_with_those_that_are(checkpoints: Path) -> None:
    ended = run(words(MOCK, "--ckpt-step 3 --load", checkpoints))
    assert ended.code == 4
    ended.says("--ckpt-step 3", "steps 2, 4, 6")


def test_a_vocabulary_larger_than_the_checkpoints_is_refused(checkpoints: Path) -> None:
    ended = run(words(MOCK, "--vocab-size 150 --load", checkpoints))
    assert ended.code == 4
    ended.says("--vocab-size: checkpoint 101, this run 150", "Give the options of the checkpoint")
    assert "--fall-back" not in ended.err, "an earlier checkpoint has the same vocabulary"
    again = run(words(MOCK, "--vocab-size 150 --fall-back-to-previous-checkpoint --load", checkpoints))
    assert (again.code, again.err) == (4, ended.err)


def test_another_model_is_refused_with_all_options_that_differ(checkpoints: Path) -> None:
    ended = run(words(MOCK, "--hidden-size 64 --load", checkpoints))
    assert ended.code == 4
    ended.says("--hidden-size: checkpoint 32, this run 64", "--kv-channels: checkpoint 8, this run 16")


def test_the_state_of_another_optimizer_is_refused(checkpoints: Path) -> None:
    ended = run(words(MOCK, "--optimizer sgd --load", checkpoints))
    assert ended.code == 4
    ended.says("--optimizer adam", "sgd", "--no-load-optim")


def _flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [_flip_a_byte, Path.unlink], ids=["flipped bit", "missing file"])
def test_a_damaged_shard_is_named_and_the_checkpoint_before_is_taken_only_when_told(
    checkpoints: Path, damage: object, tmp_path: Path
) -> None:
    shard = checkpoints / "iter_0000006" / "rank00000.safetensors"
    damage(shard)
    metrics = tmp_path / "metrics.jsonl"
    again = words(MOCK, "--train-iters 8 --metrics-file", metrics, "--save", checkpoints)
    ended = run(again)
    assert ended.code == 4
    ended.says(str(shard), "--fall-back-to-previous-checkpoint", "iter_0000004")
    assert not metrics.exists()
    assert exit_status(checkpoints)["code"] == 4
    ended = run([*again, "--fall-back-to-previous-checkpoint"])
    assert ended.code == 0, ended.err
    assert f"starting from {checkpoints}/iter_0000004" in ended.out
    assert str(shard) in ended.out + ended.err, "falling back must say why"
    assert (checkpoints / "latest").read_text().strip() == "iter_0000008"


def test_falling_back_overwrites_what_the_damaged_checkpoint_has_put_into_offload_files(
    checkpoints: Path, tmp_path: Path
) -> None:
    _flip_a_byte(checkpoints / "iter_0000006" / "rank00000.safetensors")
    argv = words(MOCK, "--zero-stage 3 --train-iters 8 --fall-back-to-previous-checkpoint --load", checkpoints)
    plain, offloaded = tmp_path / "plain.jsonl", tmp_path / "offloaded.jsonl"
    flags = words("--offload-optimizer nvme --offload-params nvme --offload-dir", tmp_path / "files")
    for metrics, options in ((plain, []), (offloaded, flags)):
        ended = run([*argv, *options, "--metrics-file", str(metrics)])
        assert ended.code == 0, ended.err
    assert [one["loss"] for one in steps(plain)] == [one["loss"] for one in steps(offloaded)]


def test_a_changed_run_state_is_refused(checkpoints: Path) -> None:
    state = checkpoints / "iter_0000006" / "state.json"
    state.write_text(state.read_text().replace('"step": 6', '"step": 5'))
    ended = run(words(MOCK, "--load", checkpoints))
    assert ended.code == 4
    ended.says(str(state), "changed or damaged", "--ckpt-step")


# --- Storage ----------------------------------------------------------------------------------------------------------


def _goes_on_from(checkpoints: Path, step: int) -> None:
    """Fail unless the checkpoint of this step is the latest, whole, and a run resumes from it."""
    assert (checkpoints / "latest").read_text().strip() == f"iter_{step:07d}"
    assert verify(checkpoints / f"iter_{step:07d}") == []
    assert not list(checkpoints.glob(".tmp-*"))
    ended = run(words(MOCK, "--train-iters 8 --load", checkpoints))
    assert ended.code == 0, ended.err
    assert f"starting from {checkpoints}/iter_{step:07d}" in ended.out


def test_a_save_that_the_system_refuses_leaves_the_checkpoint_before_whole(checkpoints: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        ended = run(words(MOCK, "--train-iters 8 --save", checkpoints))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ended.code == 7
    ended.says("rank00000.safetensors", "File too large", "earlier checkpoints are untouched", "ulimit -f")
    assert exit_status(checkpoints)["code"] == 7
    assert exit_status(checkpoints)["step"] == 8
    _goes_on_from(checkpoints, 6)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own that holds one checkpoint and a half."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        command = ["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", str(place)]
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting is not permitted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_ends_the_run_with_the_first_checkpoint_whole(small_disk: Path) -> None:
    save = small_disk / "checkpoints"
    ended = run(words(MOCK, "--save-interval 3 --save", save))
    assert ended.code == 7
    ended.says("No space left on device", "earlier checkpoints are untouched", "free space there")
    assert exit_status(save)["code"] == 7
    _goes_on_from(save, 3)


def test_a_read_only_disk_ends_the_run_and_says_that_no_status_can_be_written(small_disk: Path) -> None:
    save = small_disk / "checkpoints"
    run_ok(MOCK, "--train-iters 2 --save", save)
    (save / "exit_status.json").unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    ended = run(words(MOCK, "--save", save))
    assert ended.code == 7
    ended.says("Read-only file system", "make --save writable", "the exit status could not be written")
    _goes_on_from(save, 2)


def test_a_metrics_file_on_a_full_disk_does_not_end_the_run(small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(640 * 1024 - 4096))
    ended = run(words(MOCK, "--train-iters 60 --metrics-file", small_disk / "metrics.jsonl"))
    assert ended.code == 0
    ended.says("--metrics-file", "No space left on device", "Training continues", "records between steps")
    assert "step 60/60" in ended.out
    assert ended.err.count("No space left") == 1


def test_a_metrics_file_that_can_never_be_written_ends_the_run_at_its_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ended = run(words(MOCK, "--metrics-file", tmp_path / "file" / "metrics.jsonl"))
    assert ended.code == 7
    ended.says("--metrics-file", "cannot be written", "name another file")
    assert "step 1/" not in ended.out


def test_a_resume_that_fails_leaves_the_step_of_the_checkpoint(tmp_path: Path) -> None:
    run_ok(MOCK, "--train-iters 4 --save", tmp_path)
    assert exit_status(tmp_path)["step"] == 4
    for fault, code in (("--global-batch-size 7", 2), ("--ckpt-step 3", 4), ("--train-iters 6", 4)):
        if fault.endswith("6"):
            (tmp_path / "iter_0000004" / "index.json").write_text("{")
        assert run(words(MOCK, fault, "--save", tmp_path)).code == code
        assert (exit_status(tmp_path)["code"], exit_status(tmp_path)["step"]) == (code, 4), fault


def test_a_directory_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    save = tmp_path / "save"
    with hold_directory(save):
        ended = run(words(MOCK, "--save", save))
        assert ended.code == 8
        ended.says(f"--save {save} is in use by another run", "process", "give another --save directory")
        assert {path.name for path in save.iterdir()} == {".lock"}, "the directory belongs to the other run"
    run_ok(MOCK, "--train-iters 1 --save", save)


# --- Numbers ----------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_step(tmp_path: Path) -> None:
    ended = run(words(MOCK, "--lr 1e30 --optimizer sgd --clip-grad 0 --save", tmp_path, "--save-interval 1"))
    assert ended.code == 5
    ended.says("not finite", "lower --lr (now 1e+30)", "rank 0 of 1", "after step")
    assert exit_status(tmp_path)["code"] == 5


def test_a_loss_that_is_not_finite_is_written_where_the_run_shall_go_on(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    run_ok(
        MOCK, "--lr 1e30 --optimizer sgd --clip-grad 0 --no-check-for-nan-in-loss-and-grad --metrics-file", metrics
    )  # fmt: skip
    assert losses(metrics)[-1] is None
