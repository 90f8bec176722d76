"""Drawing a token: the shares of the tokens are the probabilities that transformers' own filters leave."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron3d.errors import ConfigError
from megatron3d.inference.sampling import SamplingOptions, choose_tokens, uniform_draw

VOCAB = 23
NUM_DRAWS = 4000


def shares(logits: torch.Tensor, options: SamplingOptions) -> torch.Tensor:
    """How often each token comes out when the draws cover [0, 1) evenly: its probability to 1 / NUM_DRAWS."""
    draws = (torch.arange(NUM_DRAWS, dtype=torch.float64) + 0.5) / NUM_DRAWS
    chosen = choose_tokens(logits.expand(NUM_DRAWS, VOCAB), options, draws)
    return torch.bincount(chosen, minlength=VOCAB).double() / NUM_DRAWS


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    temperature=st.floats(0.2, 3.0),
    top_k=st.integers(0, VOCAB + 5),
    top_p=st.floats(0.05, 1.0),
)
def test_shares_equal_the_probabilities_after_the_filters_of_transformers(
    seed: int, temperature: float, top_k: int, top_p: float
) -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(seed)).double() * 2
    scores = process.TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        scores = process.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1.0:
        scores = process.TopPLogitsWarper(top_p)(None, scores)
    expected = scores.softmax(-1)[0]
    options = SamplingOptions(1, temperature=temperature, top_k=top_k, top_p=top_p)
    got = shares(logits, options)
    assert float((got - expected).abs().max()) <= 2 / NUM_DRAWS


def test_greedy_takes_the_largest_logit_of_every_row() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    assert choose_tokens(logits, SamplingOptions(1, greedy=True), torch.zeros(2)).tolist() == [1, 0]


@pytest.mark.parametrize("options", [SamplingOptions(1, top_k=1), SamplingOptions(1, top_p=1e-9)])
def test_the_narrowest_filters_leave_the_most_probable_token(options: SamplingOptions) -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0))
    assert int(shares(logits, options).argmax()) == int(logits.argmax())
    assert float(shares(logits, options).max()) == 1.0


def test_the_largest_draw_stays_inside_the_nucleus() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 4] = 50.0
    almost_one = torch.tensor([1.0 - 2.0**-53], dtype=torch.float64)
    assert choose_tokens(logits, SamplingOptions(1, top_p=0.9), almost_one).tolist() == [4]


def test_draws_are_spread_evenly_and_differ_by_seed_prompt_and_position() -> None:
    draws = [uniform_draw(1, prompt, position) for prompt in range(40) for position in range(50)]
    assert len(set(draws)) == len(draws) and min(draws) >= 0.0 and max(draws) < 1.0
    counts = torch.histc(torch.tensor(draws), bins=10, min=0.0, max=1.0)
    # Chi-square of 9 degrees of freedom: 27.9 is exceeded once in a thousand.
    assert float(((counts - 200) ** 2 / 200).sum()) < 27.9
    assert uniform_draw(2, 0, 0) != uniform_draw(1, 0, 0)
    assert uniform_draw(1, 3, 4) == uniform_draw(1, 3, 4) != uniform_draw(1, 4, 3)


def test_options_out_of_range_are_all_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        SamplingOptions(0, temperature=0.0, top_k=-1, top_p=1.5)
    for part in ("--max-new-tokens 0", "--temperature 0", "--top-k -1", "--top-p 1.5"):
        assert part in str(caught.value)
