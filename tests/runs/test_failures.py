"""A rank that fails: it says which rank, layout and step, the others end soon, and nobody waits for ever."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from megatron3d.checkpoint.directory import hold_directory
from megatron3d.config.sections.data import DataConfig
from megatron3d.data.build import build_gpt_data
from megatron3d.data.stream import SampleStream
from tests.runs.harness import (
    MOCK,
    TINY,
    VOCAB_SIZE,
    Fault,
    Launcher,
    exit_status,
    random_documents,
    words,
    write_tokens,
)

# Every failed job must be over long before the collective timeout of 10 minutes; a loaded machine is slow to start.
PROMPT_S = 60.0
THREE_D = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"


@pytest.mark.parametrize(
    ("options", "world_size"),
    [("", 2), ("--pipeline-model-parallel-size 2", 2), (THREE_D, 4)],
    ids=["DP2", "PP2", "TP2PP2"],
)
def test_a_killed_rank_ends_all_others_promptly(
    launcher: Launcher, tmp_path: Path, options: str, world_size: int
) -> None:
    argv = words(MOCK, options, "--save", tmp_path)
    with launcher.job(argv, world_size, fault=Fault(rank=1, step=3, kind="kill")) as job:
        codes = job.wait(timeout_s=PROMPT_S)
        assert codes.pop(1) == -signal.SIGKILL
        assert codes == [6] * (world_size - 1)
        for rank in {0, *range(2, world_size)}:
            assert f"rank {rank} of {world_size} (TP" in job.said(rank)
            assert "after step 2): a collective failed, so another rank is gone or stuck" in job.said(rank)
    assert (exit_status(tmp_path)["code"], exit_status(tmp_path)["step"]) == (6, 2)


def test_a_rank_that_raises_names_rank_layout_and_step_and_its_cause_is_kept(
    launcher: Launcher, tmp_path: Path
) -> None:
    argv = words(MOCK, "--pipeline-model-parallel-size 2 --save", tmp_path)
    with launcher.job(argv, 2, fault=Fault(rank=1, step=3, kind="raise")) as job:
        assert job.wait(timeout_s=PROMPT_S) == [6, 1]
        assert "error (on rank 1 of 2 (TP1 x PP2 x DP1: pp 1), after step 2): RuntimeError: a fault was" in job.said(1)
        assert "Traceback" in job.said(1)
    status = exit_status(tmp_path)
    assert (status["code"], status["rank"], status["step"]) == (1, 1, 2)
    assert "a fault was injected here" in status["reason"]


def _data_that_breaks_late(prefix: Path, *, rank: int, step: int) -> None:
    """A corpus with one id outside the vocabulary, in a sample that data-parallel rank `rank` of 2 reads in `step`."""
    documents = random_documents(1, count=60)
    write_tokens(prefix, documents)
    stream = _stream(prefix)
    first = (step - 1) * 8 + rank * 4
    seen = {place for number in range(step * 8) if not first <= number < first + 4 for place in _tokens(stream, number)}
    mine = [place for number in range(first, first + 4) for place in _tokens(stream, number)]
    place = next(place for place in mine if place not in seen)
    document, offset = divmod(place, 61)
    documents[document][offset] = VOCAB_SIZE + 7
    write_tokens(prefix, documents)


def _stream(prefix: Path) -> SampleStream:
    data = build_gpt_data(
        DataConfig(data_path=(str(prefix),), split="1"), seq_length=16, vocab_size=VOCAB_SIZE, eod_token=None
    )
    assert data.train is not None
    return data.train


def _tokens(stream: SampleStream, number: int) -> list[int]:
    """Where in the row of all tokens a sample lies, from the place that `locate` returns."""
    words_of = stream.locate(number, 0).replace(",", "").split()
    document, token = int(words_of[words_of.index("document") + 1]), int(words_of[-1])
    start = document * 61 + token
    return list(range(start, start + 17))


@pytest.mark.parametrize("num_workers", [0, 2], ids=["read in the loop", "read ahead"])
def test_data_that_breaks_late_on_one_rank_ends_the_job_with_the_place(
    launcher: Launcher, tmp_path: Path, num_workers: int
) -> None:
    prefix = tmp_path / "corpus"
    _data_that_breaks_late(prefix, rank=1, step=4)
    options = f"--train-iters 20 --split 1 --num-workers {num_workers}"
    argv = words(TINY, options, "--data-path", prefix, "--save", tmp_path / "save")
    with launcher.job(argv, 2) as job:
        assert job.wait(timeout_s=PROMPT_S) == [6, 3]
        assert "error (on rank 1 of 2 (TP1 x PP1 x DP2: dp 1), after step 3)" in job.said(1)
        assert f"{prefix}.bin, document" in job.said(1)
        assert f"token id {VOCAB_SIZE + 7} is outside the vocabulary of {VOCAB_SIZE}" in job.said(1)
        assert "Traceback" not in job.said(1)
        assert "rank 1 failed: DataError; saved at" in job.said(0)
    assert (tmp_path / "save" / "latest").read_text() == "iter_0000003\n", "what was learned until then is saved"
    status = exit_status(tmp_path / "save")
    assert (status["code"], status["rank"], status["step"]) == (3, 1, 3)


def test_a_token_file_cut_short_while_training_is_a_sentence_and_what_was_learned_is_saved(
    launcher: Launcher, tmp_path: Path
) -> None:
    prefix, metrics = write_tokens(tmp_path / "corpus", random_documents(1, count=60)), tmp_path / "metrics.jsonl"
    argv = words(TINY, "--train-iters 100000 --split 1 --num-workers 2 --log-interval 100 --data-path", prefix)
    with launcher.job([*argv, *words("--metrics-file", metrics, "--save", tmp_path / "save")], 2) as job:
        job.wait_for_step(metrics, 2)
        os.truncate(f"{prefix}.bin", 100)
        assert 3 in job.wait(timeout_s=PROMPT_S)
        assert f"{prefix}.bin ends at byte 100, and bytes" in job.said(0) + job.said(1)
    status = exit_status(tmp_path / "save")
    assert status["code"] == 3
    assert (tmp_path / "save" / "latest").read_text() == f"iter_{status['step']:07d}\n"


def test_a_save_directory_that_is_removed_is_held_again_before_the_next_save(
    launcher: Launcher, tmp_path: Path
) -> None:
    save, metrics = tmp_path / "save", tmp_path / "metrics.jsonl"
    argv = words(MOCK, "--train-iters 100000 --log-interval 1000 --metrics-file", metrics, "--save", save)
    with launcher.job(argv, 2) as job:
        job.wait_for_step(metrics, 2)
        shutil.rmtree(save)
        job.signal(signal.SIGTERM, 0)
        assert job.wait(timeout_s=PROMPT_S) == [75, 75]
        assert f"--save {save} was removed while this run was saving there; it was made again" in job.said(0)
    assert (save / "latest").read_text() == f"iter_{exit_status(save)['step']:07d}\n"


def test_a_save_directory_that_another_run_has_taken_meanwhile_is_left_to_it(
    launcher: Launcher, tmp_path: Path
) -> None:
    save, metrics = tmp_path / "save", tmp_path / "metrics.jsonl"
    argv = words(MOCK, "--train-iters 100000 --log-interval 1000 --metrics-file", metrics, "--save", save)
    with launcher.job(argv, 2) as job:
        job.wait_for_step(metrics, 2)
        shutil.rmtree(save)
        with hold_directory(save):
            job.signal(signal.SIGTERM, 0)
            assert job.wait(timeout_s=PROMPT_S) == [8, 8]
            assert f"--save {save} is in use by another run (process {os.getpid()}" in job.said(0)
            assert [path.name for path in save.iterdir()] == [".lock"]


def test_a_rank_that_hangs_is_found_by_the_collective_timeout(launcher: Launcher, tmp_path: Path) -> None:
    timeout_s = 8.0
    argv = words(MOCK, f"--distributed-timeout-minutes {timeout_s / 60} --save", tmp_path)
    with launcher.job(argv, 2, fault=Fault(rank=1, step=3, kind="hang")) as job:
        began_s = time.monotonic()
        assert job.wait(0, timeout_s=PROMPT_S) == [6]
        assert time.monotonic() - began_s > 0.9 * timeout_s, "it must have been the timeout"
        said = job.said(0)
        assert "rank 0 of 2 (TP1 x PP1 x DP2: dp 0), after step 2): a collective failed" in said
        assert "over batch (ranks 0, 1) was not finished within --distributed-timeout-minutes" in said
        assert "all 2 ranks answer a roll call, but not all are in a collective: rank 1 is at runs/harness.py" in said
        assert "step_or_fail" in job.said(1), "the hanging rank must write its stacks too"
    assert (exit_status(tmp_path)["code"], exit_status(tmp_path)["rank"]) == (6, 0)


def test_a_rank_that_is_stuck_in_c_ends_with_the_rank_and_collective_it_waits_for(
    launcher: Launcher, tmp_path: Path
) -> None:
    argv = words(MOCK, "--distributed-timeout-minutes 0.05 --save", tmp_path)
    (tmp_path / "flight_recorder_rank_1.json").write_text("of an earlier run")
    with launcher.job(argv, 2, fault=Fault(rank=0, step=3, kind="stuck")) as job:
        # gloo's wait of rank 1 ends first; rank 0, which no exception reaches, answers its roll call.
        assert job.wait(1, 0, timeout_s=PROMPT_S) == [6, 6]
        assert "rank 0 waits in all_reduce over batch (ranks 0, 1)" in job.said(1)
        said = job.said(0)
    assert "rank 0 of 2 (TP1 x PP1 x DP2: dp 0), after step 2): a collective failed" in said
    assert "all_reduce over batch (ranks 0, 1) was not finished within --distributed-timeout-minutes" in said
    assert "Current thread" in said and "_get_stuck" in said, "the stacks show where it is stuck"
    status = exit_status(tmp_path)
    assert status["code"] == 6 and "all_reduce over batch (ranks 0, 1)" in status["reason"] and status["step"] == 2
    record = tmp_path / "flight_recorder_rank_0.json"
    assert record.exists() or torch.__version__ < "2.12", "torch 2.11 records nothing of gloo"
    if record.exists():
        assert any("all_reduce" in one["profiling_name"] for one in json.loads(record.read_text())["entries"])
    assert not (tmp_path / "flight_recorder_rank_1.json").exists()


@pytest.mark.parametrize(
    ("options", "world_size", "stopped"),
    [("", 2, 1), pytest.param(THREE_D, 4, 2, marks=pytest.mark.slow)],
    ids=["DP2", "TP2PP2"],
)
def test_a_rank_that_is_stopped_is_named_with_the_collective_that_waited(
    launcher: Launcher, tmp_path: Path, options: str, world_size: int, stopped: int
) -> None:
    metrics = tmp_path / "metrics.jsonl"
    argv = words(MOCK, options, "--train-iters 100000 --distributed-timeout-minutes 0.05 --log-interval 100")
    with launcher.job([*argv, *words("--metrics-file", metrics, "--save", tmp_path / "save")], world_size) as job:
        job.wait_for_step(metrics, 2)
        job.signal(signal.SIGSTOP, stopped)
        others = [rank for rank in range(world_size) if rank != stopped]
        assert job.wait(*others, timeout_s=PROMPT_S) == [6] * len(others)
        naming = [rank for rank in others if f"rank {stopped} did not answer a roll call" in job.said(rank)]
        assert naming, "\n\n".join(job.said(rank) for rank in others)
        pattern = rf"over \w+ \(ranks .*\b{stopped}\b.*\) was not finished"
        assert any(re.search(pattern, job.said(rank)) for rank in naming)
        for rank in naming:
            assert "Current thread" in job.said(rank) and "in wait" in job.said(rank)
    reason = exit_status(tmp_path / "save")["reason"]
    assert f"rank {stopped} did not answer a roll call, and {world_size - 1} of {world_size} ranks did" in reason


@pytest.mark.slow
def test_a_stopped_rank_that_hosts_the_store_is_still_reported(launcher: Launcher, tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    argv = words(
        MOCK, "--train-iters 100000 --distributed-timeout-minutes 0.05 --log-interval 100 --metrics-file", metrics
    )
    with launcher.job(argv, 2) as job:
        job.wait_for_step(metrics, 2)
        job.signal(signal.SIGSTOP, 0)
        assert job.wait(1, timeout_s=PROMPT_S) == [6], job.said(1)
        assert "no answer from the store, which rank 0 hosts" in job.said(1)
        assert re.search(r"over \w+ \(ranks 0, 1\) was not finished", job.said(1))


def test_a_second_signal_ends_a_run_that_hangs(launcher: Launcher, tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    argv = words(MOCK, "--metrics-file", metrics, "--save", tmp_path / "save")
    with launcher.job(argv, 1, fault=Fault(rank=0, step=3, kind="hang")) as job:
        job.wait_for_step(metrics, 2)
        job.signal(signal.SIGTERM)
        time.sleep(2.2)  # within 2 s a second signal counts as the same one, relayed
        job.signal(signal.SIGTERM)
        assert job.wait(timeout_s=PROMPT_S) == [143]
        assert "Second SIGTERM" in job.said(0)
    status = exit_status(tmp_path / "save")
    assert (status["code"], status["step"]) == (143, 2)


def test_wrong_options_end_every_rank_with_the_code_and_one_says_why(launcher: Launcher) -> None:
    with launcher.job(words(MOCK, "--global-batch-size 6"), 2) as job:
        assert job.wait() == [2, 2]
        assert "--global-batch-size 6 is not a multiple" in job.said(0)
        assert job.said(1) == ""
