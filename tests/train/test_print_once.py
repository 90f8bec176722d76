"""A sentence of several processes: printed by one, whoever comes first and whoever dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron3d.errors import ConfigError, DataError, PeerError, StopRequested
from megatron3d.train import print_once as module
from megatron3d.train.agent_report import report_to_agent
from megatron3d.train.print_once import print_once
from tests.runs.harness import MOCK, ROOT, SCRIPT, words

pytestmark = pytest.mark.heavy

WRONG = words(MOCK, "--global-batch-size 6")
SENTENCE = "--global-batch-size 6 is not a multiple"


def test_the_first_of_equal_sentences_is_printed_and_different_ones_each(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert print_once("on rank 3: A", key="A", directory=tmp_path)
    assert not print_once("on rank 0: A", key="A", directory=tmp_path)
    assert print_once("on rank 0: B", key="B", directory=tmp_path)
    assert capfd.readouterr().err == "on rank 3: A\non rank 0: B\n"


def test_a_directory_that_cannot_be_written_leaves_every_process_to_print(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert print_once("A", key="A", directory=tmp_path / "absent")
    assert capfd.readouterr().err == "A\nA\n"


def test_a_process_that_dies_before_it_has_printed_leaves_it_to_the_next(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first holds the lock and hangs in its print when it is killed."""
    first = os.fork()
    if first == 0:
        setattr(module, "_print", lambda text: time.sleep(60))  # noqa: B010
        print_once("on rank 1: A", key="A", directory=tmp_path)
        os._exit(1)
    deadline = time.monotonic() + 30
    while not list(tmp_path.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.1)  # from the file to its lock
    second = os.fork()
    if second == 0:
        print_once("on rank 0: A", key="A", directory=tmp_path)
        os._exit(0)
    time.sleep(0.1)
    assert os.waitpid(second, os.WNOHANG) == (0, 0), "the second did not wait for the first"
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    os.waitpid(second, 0)
    assert capfd.readouterr().err == "on rank 0: A\n"


def test_a_sentence_that_a_full_disk_refused_is_left_to_the_next_process(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from megatron3d.process.streams import patient_streams\n"
        "from megatron3d.train.print_once import print_once\n"
        "with patient_streams(): print(print_once('A', key='A', directory=Path(sys.argv[1])))"
    )
    with open("/dev/full", "w") as full:
        said = [
            subprocess.run(
                [sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT
            )
            for errors in (full, subprocess.PIPE, subprocess.PIPE)
        ]
    assert ["True" in one.stdout for one in said] == [False, True, False]
    assert [one.stderr for one in said[1:]] == ["A\n", ""]


def _worker(attempt: Path, rank: int, world_size: int, argv: list[str], **more: str) -> subprocess.Popen[str]:
    """The script as torchrun would start it, with nothing but what needs no torch: importing torch is an error."""
    (attempt / str(rank)).mkdir(parents=True)
    no_torch = attempt.parent / "no_torch"
    (no_torch / "torch").mkdir(parents=True, exist_ok=True)
    (no_torch / "torch" / "__init__.py").write_text("raise ImportError('torch was imported')\n")
    place = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(no_torch), str(ROOT), str(ROOT / "kernels")]),
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_ERROR_FILE": str(attempt / str(rank) / "error.json"),
        **more,
    }
    return subprocess.Popen(
        [sys.executable, *argv], env=place, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )


@pytest.mark.parametrize("attempt", range(3))
def test_ranks_that_are_killed_once_one_has_ended_still_print_a_wrong_option_once(tmp_path: Path, attempt: int) -> None:
    started = [_worker(tmp_path / "attempt_0", rank, 4, [str(SCRIPT), *WRONG]) for rank in range(4)]
    while all(worker.poll() is None for worker in started):
        time.sleep(0.001)
    for worker in started:
        worker.kill()
    said = "".join(worker.communicate()[1] for worker in started)
    assert said.count(SENTENCE) == 1, said
    assert {worker.returncode for worker in started} <= {2, -signal.SIGKILL}


def test_each_attempt_of_an_agent_prints_anew(tmp_path: Path) -> None:
    for attempt in range(2):
        worker = _worker(tmp_path / f"attempt_{attempt}", 0, 2, [str(SCRIPT), *WRONG])
        assert worker.communicate()[1].count(SENTENCE) == 1


@pytest.mark.parametrize("script", ["pretrain_gpt.py", "pretrain_bert.py"])
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--no-such-flag 1", "--no-such-flag"),
        ("--preset nobody", "--preset nobody is not known"),
        ("--config absent.json", "absent.json"),
        ("--num-layers 0", "--num-layers"),
    ],
)
def test_wrong_options_are_answered_without_importing_torch(
    tmp_path: Path, script: str, flags: str, sentence: str
) -> None:
    worker = _worker(tmp_path / "attempt_0", 0, 1, [str(ROOT / script), *words(MOCK, flags)])
    said = worker.communicate()[1]
    assert (worker.returncode, said.count("error:")) == (2, 1), said
    assert sentence in said and "torch was imported" not in said


def test_a_tokenizer_that_is_not_there_is_answered_without_importing_torch(tmp_path: Path) -> None:
    flags = "--tokenizer-type GPT2BPETokenizer --vocab-file absent.json --merge-file absent.txt"
    worker = _worker(tmp_path / "attempt_0", 0, 1, [str(SCRIPT), *words(MOCK, flags)])
    said = worker.communicate()[1]
    assert worker.returncode == 3 and "absent.json" in said, said


def test_the_agents_file_has_the_sentence_and_for_a_bug_the_traceback(tmp_path: Path) -> None:
    handler = pytest.importorskip("torch.distributed.elastic.multiprocessing.errors")
    file = tmp_path / "error.json"
    report_to_agent(ConfigError("--a 1 is wrong"), "on rank 1 of 2", file)
    failure = handler.ProcessFailure(local_rank=1, pid=1, exitcode=2, error_file=str(file))
    assert failure.message["message"] == "ConfigError on rank 1 of 2: --a 1 is wrong"
    assert abs(failure.timestamp - time.time()) < 60
    try:
        raise KeyError("a bug")
    except KeyError as error:
        report_to_agent(error, "on rank 1 of 2", file)
    failure = handler.ProcessFailure(local_rank=1, pid=1, exitcode=1, error_file=str(file))
    assert "Traceback" in failure.message["extraInfo"]["py_callstack"]
    assert [path.name for path in tmp_path.iterdir()] == ["error.json"]


@pytest.mark.parametrize("error", [StopRequested("asked"), PeerError("rank 1 is gone")])
def test_neither_a_stop_nor_a_lost_peer_is_taken_for_the_cause(tmp_path: Path, error: Exception) -> None:
    report_to_agent(error, "on rank 0 of 2", tmp_path / "error.json")
    report_to_agent(DataError("a file is gone"), "on rank 0 of 2", None)
    assert not list(tmp_path.iterdir())
