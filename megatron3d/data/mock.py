"""`--mock-data`: samples without a file, drawn from the seed, that a model can learn something from.

The tokens walk along a fixed secret cycle of up to 512 ids: the next token is the successor with probability 0.9;
else the walk jumps to a place drawn evenly (and one jump in ten shows as an end-of-document token). A model that has
learnt the cycle reaches a loss near 1.0 where an ignorant one has log(512) = 6.2.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron3d.data.bert import BertForm, BertSample, make_sample
from megatron3d.data.order import derive_seed

_MAX_STATES = 512
_JUMP_PROBABILITY = 0.1
_END_PROBABILITY = 0.1
_OTHER_WALK = 2**61


class MockSamples:
    """A noisy Markov chain as a `SampleStream`; sample k is a function of the seed, the split and k."""

    def __init__(self, split: str, *, seq_length: int, vocab_size: int, eod_token: int | None, seed: int) -> None:
        """Draw the cycle, which all splits of one seed share: what is learnt in training holds in validation."""
        self.split, self.seq_length, self.seed, self.eod_token = split, seq_length, seed, eod_token
        ids = np.setdiff1d(np.arange(min(vocab_size, _MAX_STATES + 1)), [] if eod_token is None else [eod_token])
        self._cycle = np.random.default_rng(derive_seed(seed, "mock cycle")).permutation(ids[:_MAX_STATES])

    @property
    def num_samples_per_epoch(self) -> int:
        """No sample ever comes again; this is as many as anyone could ask for."""
        return 2**62

    def sample(self, number: int) -> NDArray[np.int64]:
        """S + 1 tokens, int64. Raises: IndexError for a negative number."""
        if number < 0:
            raise IndexError(f"sample {number} of --mock-data: samples are counted from 0")
        generator = np.random.default_rng(derive_seed(self.seed, "mock", self.split, number))
        length, num_states = self.seq_length + 1, len(self._cycle)
        index = np.arange(length)
        jumps = generator.random(length) < _JUMP_PROBABILITY
        jumps[0] = True
        last_jump = np.maximum.accumulate(np.where(jumps, index, 0))
        targets = generator.integers(num_states, size=length)
        tokens = self._cycle[(targets[last_jump] + index - last_jump) % num_states].astype(np.int64)
        if self.eod_token is not None:
            tokens[jumps & (generator.random(length) < _END_PROBABILITY)] = self.eod_token
        return tokens

    def locate(self, number: int, position: int) -> str:
        """In words, where the token comes from."""
        return f"--mock-data, {self.split} sample {number}, token {position}"

    def describe(self) -> str:
        """What is in the stream."""
        return f"--mock-data: a noisy cycle through {len(self._cycle)} token ids"


class MockBertSamples:
    """BERT samples of the same chain, A and B being neighbours on it; sample k is a function of seed, split and k.

    With the task `next`, a B that does not follow A comes from another walk. The order or origin of B follows
    from the step between the end of the one and the beginning of the other, as long as neither is masked.
    """

    def __init__(self, split: str, form: BertForm, *, seed: int) -> None:
        """Draw the cycle over the ids that are no special tokens."""
        self.split, self.form, self.seed = split, form, seed
        self._chain = MockSamples(
            split, seq_length=form.capacity - 1, vocab_size=len(form.vocabulary.text_ids), eod_token=None, seed=seed
        )

    @property
    def seq_length(self) -> int:
        """S."""
        return self.form.seq_length

    @property
    def num_samples_per_epoch(self) -> int:
        """As many as anyone could ask for."""
        return self._chain.num_samples_per_epoch

    def sample(self, number: int) -> BertSample:
        """Sample `number`. Raises: IndexError for a negative number."""
        generator = np.random.default_rng(derive_seed(self.seed, "mock bert", self.split, number))
        short, length, cut, coin = generator.random(4)
        num_tokens = (
            self.form.capacity if short >= self.form.short_seq_prob else 2 + int(length * (self.form.capacity - 2))
        )
        tokens = self._text(number)[:num_tokens]
        if self.form.sentence_task is None:
            return make_sample(tokens, None, None, self.form, generator)
        middle = 1 + int(cut * (num_tokens - 1))
        a, b, label = tokens[:middle], tokens[middle:], int(coin < 0.5)
        if label and self.form.sentence_task == "order":
            a, b = b, a
        elif label:
            b = self._text(_OTHER_WALK + number)[: len(b)]
        return make_sample(a, b, label, self.form, generator)

    def locate(self, number: int, position: int) -> str:
        """In words, where the token comes from."""
        return self._chain.locate(number, position)

    def describe(self) -> str:
        """What is in the stream."""
        return f"{self._chain.describe()}, masked"

    def _text(self, number: int) -> NDArray[np.int64]:
        """As many tokens of the chain as a sample has room for."""
        return self.form.vocabulary.text_ids[self._chain.sample(number)]
