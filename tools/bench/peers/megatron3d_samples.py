"""This project's samples: random ones of a shuffled corpus, as a run's training stream reads them."""

from __future__ import annotations

from megatron3d.config.check import resolve
from megatron3d.config.cli import parse_args
from megatron3d.data.build import build_gpt_data
from tools.bench.peers.megatron3d_flags import flags_of
from tools.bench.peers.trainee import Trainee, sample_numbers
from tools.bench.peers.work import SAMPLES_PER_STEP, Work


def build(work: Work) -> Trainee:
    """A step reads SAMPLES_PER_STEP samples."""
    options = [*flags_of(work, mock_data=False), "--data-path", work.corpus, "--split", "1,0,0"]
    config = resolve(parse_args(options, program="compare", description=""), 1)
    eod_token = work.vocab_size - 1
    data = build_gpt_data(config.data, seq_length=work.seq_length, vocab_size=work.vocab_size, eod_token=eod_token)
    stream = data.train
    assert stream is not None, "the split is all training"
    numbers = sample_numbers(work)

    def step() -> float:
        for _ in range(SAMPLES_PER_STEP):
            stream.sample(next(numbers))
        return 0.0

    return Trainee(step, num_parameters=0)
