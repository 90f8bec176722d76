"""A run with a curriculum of two metrics: analysed, trained, resumed bit for bit; its loss is that of its samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron3d.config.check import resolve
from megatron3d.config.cli import parse_args
from megatron3d.data.build import build_gpt_data
from megatron3d.data.curriculum.build import RunLength, with_curriculum
from megatron3d.data.curriculum.index import read_index
from megatron3d.data.curriculum.stream import Curriculum
from tests.runs.harness import TINY, losses, random_documents, run, run_ok, steps, words, write_tokens
from tools.analyze_data import parser
from tools.analyze_data import run as analyze

SPLIT = "--split 90,10,0"


def test_a_run_with_a_curriculum_resumes_exactly_and_learns_from_the_samples_it_admits(tmp_path: Path) -> None:
    corpus, index, saved = (
        write_tokens(tmp_path / "corpus", random_documents(3)),
        tmp_path / "index",
        tmp_path / "saved",
    )
    sizes = f"--data-path {corpus} --seq-length 16 {SPLIT} --output {index}"
    analyze(parser().parse_args(f"{sizes} --metrics rarity,length --vocab-size 101".split()))
    base = (
        f"{TINY} --train-iters 4 --data-path {corpus} {SPLIT} --curriculum-metric rarity length "
        f"--curriculum-index {index} "
        "--curriculum-pacing fixed_discrete --curriculum-difficulties 40,100 --curriculum-last-steps 2"
    )
    first = run_ok(base, "--metrics-file", tmp_path / "a", "--save", saved, "--save-interval 3")
    assert "Curriculum by rarity, length: 2 bounds from step 1 to step 3 (sample 16)" in first.out
    run_ok(base, "--load", saved, "--ckpt-step 3", "--metrics-file", tmp_path / "b")
    resumed = [record["loss"] for record in steps(tmp_path / "b")]
    assert resumed == losses(tmp_path / "a")[3:]
    changed = run(words(base, "--load", saved, "--ckpt-step 3 --curriculum-difficulties 50,100"))
    changed.says("--curriculum-difficulties: checkpoint 40,100, this run 50,100")

    # Before the fourth step the weights are those of the checkpoint: its loss is the mean of those of its samples.
    analyze(parser().parse_args(f"{sizes} --metrics loss --load {saved} --ckpt-step 3".split()))
    loss = read_index(index / "loss")
    by_number = dict(zip(loss.order.tolist(), loss.value.tolist(), strict=True))
    batch = [by_number[number] for number in numbers_of(base, range(24, 32))]
    assert np.mean(batch) == pytest.approx(resumed[0], rel=1e-6) and np.ptp(batch) > 0.01


def numbers_of(options: str, slots: range) -> list[int]:
    """The fixed samples of some slots of a run."""
    run = resolve(parse_args(options.split(), program="p", description="d", log=lambda line: None), 1)
    plain = build_gpt_data(run.data, seq_length=16, vocab_size=101, eod_token=None)
    data = with_curriculum(plain, run.curriculum, run.data, RunLength(run.train, 1), vocab_size=101)
    assert isinstance(data.train, Curriculum)
    return [found[1] for slot in slots if (found := data.train.choose(slot)) is not None]
