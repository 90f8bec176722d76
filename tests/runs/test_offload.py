"""Runs with offloaded state: killed anywhere they go on, their checkpoints fit all others, memory is what is saved."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron3d.checkpoint.load import tensor_shapes
from tests.dist.pool import Pool
from tests.runs.harness import MOCK, ROOT, SCRIPT, Fault, Launcher, losses, on_rank, records, run, run_ok, words

# Stages 2 and 3 add every micro-batch's gradients up over the ranks by themselves: fp32 sums in another order.
OTHER_STAGE = 1e-6
FILES = "--offload-optimizer nvme --offload-dir"
ALL_FILES = f"--zero-stage 3 --offload-params nvme {FILES}"


def _options(flags: str, directory: Path) -> list[str | Path]:
    return [flags, directory] if flags.endswith("--offload-dir") else [flags]


# Who dies between two steps has all state written back, as in every run that is killed; what is new is amid a write.
@pytest.mark.parametrize("kind", [pytest.param("kill", marks=pytest.mark.slow), "kill-writing"])
@pytest.mark.parametrize("flags", [f"--zero-stage 1 {FILES}", ALL_FILES], ids=["zero1", "zero3"])
def test_a_run_killed_between_steps_or_amid_a_write_goes_on_bit_for_bit_from_its_checkpoint(
    launcher: Launcher, tmp_path: Path, flags: str, kind: str
) -> None:
    offload = tmp_path / "offload"
    common = words(MOCK, "--train-iters 7 --save-interval 3", *_options(flags, offload))
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    with launcher.job([*common, *words("--metrics-file", whole, "--save", tmp_path / "other")], 2) as job:
        assert job.wait() == [0, 0], job.said(0)
    again = [*common, "--metrics-file", str(killed), "--save", str(tmp_path / "save")]
    with launcher.job(again, 2, fault=Fault(rank=1, step=5, kind=kind)) as job:
        assert job.wait() == [6, -signal.SIGKILL], job.said(0)
    assert list(offload.iterdir()) == [], "a killed run left offloaded state behind"
    with launcher.job(again, 2) as job:
        assert job.wait() == [0, 0], job.said(0)
        assert f"starting from {tmp_path}/save/iter_0000003" in job.said(0)
    assert losses(killed) == losses(whole)


def test_checkpoints_move_between_any_two_settings_and_stages(pool: Pool, tmp_path: Path) -> None:
    """Each setting reads what the one before wrote, two steps each; together they make the run without offloading."""
    settings = ["", f"--zero-stage 1 {FILES}", "--zero-stage 2 --offload-optimizer cpu", ALL_FILES]
    settings += [
        "--zero-stage 3 --offload-optimizer cpu --offload-params cpu",
        f"--zero-stage 2 {FILES}",
        "--zero-stage 1",
    ]
    last = 2 * len(settings)
    plain, moved = tmp_path / "plain.jsonl", tmp_path / "moved.jsonl"
    shape = f"{MOCK} --train-iters {last} --lr-decay-style constant"
    _train(pool, shape, "--metrics-file", plain, "--save", tmp_path / "plain")
    for number, flags in enumerate(settings):
        stop = f"--exit-interval {2 * (number + 1)}"
        options = _options(flags, tmp_path / "offload")
        _train(pool, shape, stop, "--metrics-file", moved, "--save", tmp_path / "moved", *options)
    assert losses(moved) == pytest.approx(losses(plain), rel=OTHER_STAGE)
    found, expected = (tmp_path / name / f"iter_{last:07d}" for name in ("moved", "plain"))
    assert tensor_shapes(found) == tensor_shapes(expected)


def _train(pool: Pool, *options: str | Path) -> None:
    for ended in pool.run(2, on_rank, words(*options)):
        assert ended.code in (0, 75), ended.err


def test_the_start_record_tells_what_is_on_the_device_the_host_and_in_files(tmp_path: Path) -> None:
    held = {}
    for name, flags in {"none": "", "cpu": "--offload-optimizer cpu", "nvme": FILES, "all": ALL_FILES}.items():
        metrics = tmp_path / f"{name}.jsonl"
        run_ok(MOCK, "--train-iters 1 --metrics-file", metrics, *_options(flags, tmp_path))
        (start,) = [record for record in records(metrics) if record.get("event") == "start"]
        held[name] = start["bytes_per_rank"]
    states = 3 * held["none"]["weights"]  # fp32: master weights and two moments
    assert held["cpu"]["optimizer"] == held["nvme"]["optimizer"] == held["all"]["weights"] == 0
    assert states <= held["cpu"]["host"] < 1.01 * states and held["cpu"]["files"] == 0
    assert states <= held["nvme"]["files"]
    assert held["all"]["files"] > held["nvme"]["files"]
    assert "host" not in held["none"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--offload-optimizer nvme", "--offload-optimizer nvme keeps state in files; say where with --offload-dir"),
        ("--offload-params cpu --zero-stage 3", "--offload-params cpu needs the larger optimizer state off the device"),
        ("--offload-optimizer cpu --offload-params cpu", "--zero-stage 0 (the default) does not; use --zero-stage 3"),
        ("--offload-dir /tmp", "--offload-dir /tmp is not used"),
        ("--offload-delayed-update", "give --offload-optimizer cpu or nvme"),
        ("--offload-optimizer cpu --optimizer muon", "does not go with --optimizer muon"),
        ("--offload-optimizer disk", "use one of: none, cpu, nvme"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_starts(options: str, sentence: str) -> None:
    ended = run(words(MOCK, options))
    assert ended.code == 2
    ended.says(sentence)


def test_an_offload_directory_that_cannot_be_written_ends_the_run_with_the_storage_code(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ended = run(words(MOCK, FILES, tmp_path / "file"))
    assert ended.code == 7
    ended.says("could not make the offload file", "--offload-dir")


# --- More state than memory -------------------------------------------------------------------------------------------

# 40 layers of 1.2 M parameters. In fp32 weights, gradients and two moments are 16 bytes each, 755 MiB: more than the
# process may have. In files, only the gradients' 189 MiB stay, and three units' records of 14 MiB.
LIMIT_BYTES = 700 << 20
# Blocks of a megabyte and more go back to the system when they are freed, so that what is measured is what is held.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_ARENA_MAX": "2"}
LARGE = (
    "--num-layers 40 --hidden-size 320 --num-attention-heads 4 --seq-length 16 --micro-batch-size 1 "
    "--global-batch-size 1 --train-iters 2 --lr 1e-3 --vocab-size 101 --make-vocab-size-divisible-by 4 "
    "--hidden-dropout 0 --attention-dropout 0 --log-interval 1 --eval-iters 0 --device cpu --num-workers 0 "
    "--lr-decay-style constant --mock-data"
)


def _run_with_data_limit(limit_bytes: int, *options: str | Path) -> subprocess.CompletedProcess[str]:
    """The script in a process of its own whose private writable memory is limited from its first instruction."""
    code = (
        f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_DATA, ({limit_bytes}, {limit_bytes})); "
        f"sys.argv = sys.argv[1:]; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-c", code, SCRIPT.name, *words(*options)],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=ROOT,
        env=os.environ | GIVES_BACK | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
    )


def test_without_offloading_states_larger_than_the_memory_limit_end_the_run() -> None:
    ended = _run_with_data_limit(LIMIT_BYTES, LARGE, "--zero-stage 3")
    assert ended.returncode == 9, ended.stdout
    assert "memory" in ended.stderr and "Traceback" not in ended.stderr, ended.stderr


@pytest.mark.skipif(
    torch.version.cuda is not None, reason="torch with CUDA maps more private memory than this limit has room for"
)
def test_with_offloading_to_files_the_same_run_trains_and_saves_within_the_same_limit(tmp_path: Path) -> None:
    metrics, save = tmp_path / "metrics.jsonl", tmp_path / "save"
    ended = _run_with_data_limit(
        LIMIT_BYTES, LARGE, "--metrics-file", metrics, "--save", save, ALL_FILES, tmp_path / "offload"
    )
    assert ended.returncode == 0, ended.stderr
    (start,) = [record for record in records(metrics) if record.get("event") == "start"]
    assert 16 * start["parameters"] > LIMIT_BYTES
    assert len(losses(metrics)) == 2
    assert (save / "latest").exists()
    shutil.rmtree(save)  # half a gigabyte that pytest would keep
