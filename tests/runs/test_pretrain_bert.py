"""Whole runs of pretrain_bert.py: what it reports, that it goes on where it stopped, at another layout too, and what it
says to wrong options."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron3d.comm.launch import Launch
from megatron3d.errors import ConfigError
from megatron3d.train.launch import RunContext
from tests.dist.pool import Pool
from tests.runs.harness import MOCK, ROOT, Ended, losses, on_rank, records, run, steps, words
from tests.train.test_megatron_names import curves
from tools import generate_text

SCRIPT = ROOT / "pretrain_bert.py"
TINY_BERT = f"{MOCK} --short-seq-prob 0.5 --hidden-dropout 0.1 --attention-dropout 0.1"
# Sums in another order: fp32 rounding, amplified by a few optimizer steps.
OTHER_LAYOUT = 1e-5


def bert(*options: str | Path) -> Ended:
    """A run in this process that must end well."""
    ended = run(words(*options), script=SCRIPT)
    assert ended.code == 0, ended.err
    return ended


def test_a_run_reports_both_losses_and_the_accuracies_beside_the_unigram_baseline(tmp_path: Path) -> None:
    metrics = tmp_path / "m.jsonl"
    events = tmp_path / "events"
    options = ("--eval-interval 3 --eval-iters 1 --metrics-file", metrics, "--tensorboard-dir", events)
    said = bert(TINY_BERT, *options).out
    start, *_ = records(metrics)
    assert (start["model"], start["parameters"]) == ("BERT", 31_623)
    for step in steps(metrics):
        assert step["loss"] == pytest.approx(step["lm_loss"] + step["sentence_loss"], abs=1e-12)
    found = [record for record in records(metrics) if "valid_loss" in record]
    assert [record["step"] for record in found] == [3, 6]
    for record in found:
        assert record["valid_loss"] == pytest.approx(record["valid_lm_loss"] + record["valid_sentence_loss"])
        shares = [record[f"valid_{name}_accuracy"] for name in ("masked", "sentence", "unigram")]
        assert all(0 <= share <= 1 for share in shares) and 0 < shares[-1] < 0.5
    assert "masked accuracy" in said and "sentence loss" in said
    drawn = curves(events)["."]
    for theirs, ours in {"lm loss": "lm_loss", "sop loss": "sentence_loss"}.items():
        assert drawn[theirs] == [(one["step"], pytest.approx(one[ours])) for one in steps(metrics)]
        valid = [(one["step"], pytest.approx(one[f"valid_{ours}"])) for one in found]
        assert drawn[f"{theirs} validation"] == valid


def test_a_model_without_the_sentence_head_has_one_loss(tmp_path: Path) -> None:
    metrics = tmp_path / "m.jsonl"
    bert(TINY_BERT, "--bert-no-binary-head --eval-interval 6 --eval-iters 1 --metrics-file", metrics)
    assert not any("sentence_loss" in record or "lm_loss" in record for record in steps(metrics))
    (found,) = [record for record in records(metrics) if "valid_loss" in record]
    assert set(found) == {"step", "valid_loss", "valid_masked_accuracy", "valid_unigram_accuracy"}


def test_a_stopped_run_goes_on_bit_for_bit_and_at_another_layout_nearly(pool: Pool, tmp_path: Path) -> None:
    whole, again, cut = (tmp_path / f"{name}.jsonl" for name in ("whole", "again", "cut"))
    bert(TINY_BERT, "--metrics-file", whole)
    saving = ["--save", tmp_path / "c", "--save-interval 3 --exit-interval 3"]
    assert run(words(TINY_BERT, *saving, "--metrics-file", again), script=SCRIPT).code == 75
    bert(TINY_BERT, "--load", tmp_path / "c", "--metrics-file", again)
    assert losses(again) == losses(whole)
    layout = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel --zero-stage 1"
    argv = words(TINY_BERT, layout, "--load", tmp_path / "c", "--metrics-file", cut)
    assert {ended.code for ended in pool.run(4, on_rank, argv, SCRIPT)} == {0}
    assert [record["loss"] for record in steps(cut)] == pytest.approx(losses(whole)[3:], rel=OTHER_LAYOUT)


def test_dropout_runs_are_repeatable_and_dropout_is_on(tmp_path: Path) -> None:
    first, second, without = (tmp_path / f"{name}.jsonl" for name in ("first", "second", "without"))
    for path in (first, second):
        bert(TINY_BERT, "--metrics-file", path)
    bert(f"{MOCK} --short-seq-prob 0.5 --metrics-file", without)
    assert losses(first) == losses(second) != losses(without)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            "--preset gpt2-124m",
            "pretrain_bert.py trains a BERT, but --preset, --config or --architecture asks for a GPT",
        ),
        ("--num-token-types 1", "--num-token-types 1 cannot tell the two sentences of a sample apart"),
        (
            "--norm-position post --apply-residual-connection-post-layernorm",
            "--apply-residual-connection-post-layernorm is about norms before each half of a block",
        ),
        ("--eod-mask-loss", "--eod-mask-loss is about the ends of documents"),
        ("--seq-length 4", "--seq-length 4 leaves no room for two sentences"),
    ],
)
def test_a_wrong_option_is_named(options: str, sentence: str) -> None:
    ended = run(words(MOCK, options), script=SCRIPT)
    assert ended.code == 2
    ended.says(sentence)


def test_text_is_not_generated_from_a_bert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bert(MOCK, "--save", tmp_path / "c")
    monkeypatch.setattr("sys.argv", ["generate_text.py", "--load", str(tmp_path / "c"), "--prompt", "a"])
    with pytest.raises(ConfigError, match="holds a BERT, which predicts masked tokens"):
        generate_text.main(RunContext(Launch(0, 1, 0, 1)))


def test_a_gpt_does_not_start_from_a_bert(tmp_path: Path) -> None:
    bert(MOCK, "--save", tmp_path / "c")
    ended = run(words(MOCK, "--load", tmp_path / "c"))
    assert ended.code == 4
    ended.says("holds a BERT, not a GPT; to resume it, use pretrain_bert.py")
