"""The command line of generation: what it prints, and what it says when it cannot."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron3d.comm.launch import Launch
from megatron3d.errors import CheckpointError, ConfigError, DataError
from megatron3d.train.launch import RunContext
from tests.inference.trained import EOD, TEXTS, ids
from tools import generate_text

ROOT = Path(__file__).resolve().parents[2]
Checkpoint = Callable[[str], Path]
Run = Callable[..., tuple[str, str]]


@pytest.fixture
def run(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the tool in this process on a checkpoint; returns what it wrote to stdout and to stderr."""

    def call(*words: str, model: str = "gpt2") -> tuple[str, str]:
        argv = ["generate_text.py", "--load", str(checkpoint(model)), "--device", "cpu", *words]
        monkeypatch.setattr(sys, "argv", argv)
        generate_text.main(RunContext(Launch()))
        return capsys.readouterr()

    return call


def test_greedy_text_is_printed_without_its_end_and_the_rate_goes_to_stderr(run: Run) -> None:
    out, err = run("--prompt", "a sti", "--greedy")
    assert out == TEXTS[3] + "\n"
    assert f"{len(TEXTS[3]) - 5 + 1} new tokens in" in err and "tokens/s" in err


def test_json_gives_prompt_ids_token_ids_text_and_why_it_ended(run: Run) -> None:
    out, _ = run("--prompt", "a sti", "--prompt", "all that", "--greedy", "--json", "--max-new-tokens", "25")
    first, second = map(json.loads, out.splitlines())
    assert first == {
        "prompt": "a sti",
        "prompt_ids": ids("a sti"),
        "token_ids": [*ids(TEXTS[3][5:]), EOD],
        "text": TEXTS[3],
        "stopped_by": "end of document",
    }
    assert second["token_ids"] == ids(TEXTS[5][8:33])
    assert second["stopped_by"] == "--max-new-tokens"


def test_the_directory_of_checkpoints_stands_for_its_latest(run: Run, checkpoint: Checkpoint) -> None:
    out, _ = run("--load", str(checkpoint("gpt2").parent), "--prompt", "a sti", "--greedy")
    assert out == TEXTS[3] + "\n"


def test_prompts_of_a_file_follow_those_of_the_command_line(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("time and\n\nall that\n", encoding="utf-8")
    out, _ = run("--prompt", "a sti", "--prompts-file", str(file), "--greedy", "--json", model="llama")
    assert [json.loads(line)["text"] for line in out.splitlines()] == [TEXTS[3], TEXTS[4], TEXTS[5]]


def test_prompts_are_cut_at_line_feeds_alone(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa\u2028sti\r\nall\x85that\x0c\n".encode())
    out, _ = run("--prompts-file", str(file), "--greedy", "--json", "--max-new-tokens", "1")
    assert [json.loads(line)["prompt"] for line in out.split("\n")[:-1]] == ["a\u2028sti", "all\x85that\x0c"]


def test_a_text_that_meets_the_last_position_says_so(run: Run) -> None:
    out, err = run("--prompt", "a sti", "--greedy", "--ignore-eod", "--json")
    assert json.loads(out)["stopped_by"] == "--max-position-embeddings"
    assert "prompt 0 stopped after 43 of 64 new tokens: --max-position-embeddings of the model is 48" in err


def test_rotary_positions_go_on_where_that_is_asked_for(run: Run) -> None:
    words = ("--prompt", "a sti", "--greedy", "--ignore-eod", "--json")
    short, longer = (
        json.loads(run(*words, *more, model="llama")[0]) for more in ((), ("--max-position-embeddings", "56"))
    )
    assert (len(short["token_ids"]), len(longer["token_ids"])) == (43, 51)
    assert longer["token_ids"][:43] == short["token_ids"]


def test_the_same_seed_draws_the_same_text_and_another_seed_another(run: Run) -> None:
    words = ("--prompt", "a", "--temperature", "4", "--top-k", "50", "--top-p", "0.95", "--json")
    first, again, other = (run(*words, "--seed", seed)[0] for seed in ("1", "1", "2"))
    assert first == again != other


def test_the_cache_can_be_left_out_and_bf16_asked_for(run: Run) -> None:
    assert run("--prompt", "a sti", "--greedy", "--no-kv-cache", "--bf16")[0] == TEXTS[3] + "\n"


def test_an_empty_prompt_starts_after_the_end_of_a_document(run: Run) -> None:
    out, _ = run("--prompt", "", "--greedy", "--json", "--max-new-tokens", "3")
    assert json.loads(out)["prompt_ids"] == [EOD]


def test_null_tokenizer_takes_and_gives_numbers(run: Run) -> None:
    out, _ = run("--tokenizer-type", "NullTokenizer", "--prompt", " ".join(map(str, ids("a sti"))), "--greedy")
    assert [int(word) for word in out.split()][: len(TEXTS[3])] == ids(TEXTS[3])


@pytest.mark.parametrize(
    ("words", "error", "sentence"),
    [
        ((), ConfigError, "no prompt is given; use --prompt TEXT"),
        (("--prompt", "a", "--greedy", "--top-k", "3"), ConfigError, "--top-k 3 would have no effect"),
        (("--prompt", "a", "--temperature", "0"), ConfigError, "--temperature 0 is not above 0"),
        (("--prompt", "a", "--batch-size", "0"), ConfigError, "--batch-size 0"),
        (("--prompt", "a", "--max-position-embeddings", "64"), ConfigError, "those of the model are learned_absolute"),
        (("--prompts-file", "gone.txt"), DataError, "--prompts-file gone.txt cannot be read"),
        (("--prompt", "a", "--load", "gone"), CheckpointError, "--load gone is not a directory"),
        (("--prompt", "a", "--no-kv-cache", "--context-parallel-size", "2"), ConfigError, "--no-kv-cache reads whole"),
        (("--prompt", "a", "--ckpt-step", "7"), CheckpointError, "--ckpt-step 7"),
        (("--prompt", "a", "--tensor-model-parallel-size", "2"), ConfigError, "A world of 1 ranks"),
        (
            ("--prompt", "a", "--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", "v.json", "--merge-file", "m"),
            DataError,
            "--vocab-file v.json cannot be found",
        ),
        (("--prompt", "a", "--tokenizer-type", "GPT2BPETokenizer"), ConfigError, "needs --vocab-file"),
        (("--prompt", "a" * 48), ConfigError, "prompt 0 has 48 tokens"),
    ],
)
def test_what_cannot_be_done_gets_a_sentence(
    run: Run, words: tuple[str, ...], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        run(*words)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(run: Run, tmp_path: Path) -> None:
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join(["[UNK]", "[CLS]", "[SEP]", "[MASK]", "[PAD]", *(f"w{i}" for i in range(300))]))
    words = ("--tokenizer-type", "BertWordPieceCase", "--vocab-file", str(vocab))
    with pytest.raises(ConfigError, match=r"BertWordPieceCase has 305 ids, but the model of .* has 257"):
        run("--prompt", "w1", *words)


def test_the_process_ends_with_the_code_of_a_missing_checkpoint(tmp_path: Path) -> None:
    words = ["--load", str(tmp_path / "none"), "--prompt", "a"]
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, ROOT / "tools/generate_text.py", *words], capture_output=True, text=True, env=environment
    )
    assert done.returncode == CheckpointError.exit_code, done.stderr
    assert done.stdout == "" and "is not a directory" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("other", ["pipeline", "context"])
def test_torchrun_prints_the_same_json_as_one_process(run: Run, checkpoint: Checkpoint, other: str) -> None:
    words = ("--prompt", "a sti", "--prompt", "time and", "--greedy", "--json")
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    beside = "--pipeline-model-parallel-size" if other == "pipeline" else "--context-parallel-size"
    layout = ("--tensor-model-parallel-size", "2", beside, "2", "--device", "cpu")
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", "--standalone")
    tool = (ROOT / "tools/generate_text.py", "--load", checkpoint("llama"), *words, *layout)
    done = subprocess.run([*launcher, *tool], capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout == run(*words, model="llama")[0]
