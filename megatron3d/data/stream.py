"""An endless, ordered stream of samples, each a pure function of its number.

`GPTSamples` (one corpus), `Blend` (several) and `MockSamples` (none) are streams of token rows; `BertSamples` and
`MockBertSamples` are streams of masked sentences. What makes a batch of them knows only this.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

Sample = TypeVar("Sample", covariant=True)


class SampleStream(Protocol[Sample]):
    """What a reader of batches needs of any source of samples. S is the sequence length.

    `Sample` is int64 [S + 1] for a GPT (the inputs are the first S, the labels the last S), `BertSample` for a BERT.
    """

    @property
    def seq_length(self) -> int:
        """S, the tokens a model sees of one sample."""
        ...

    @property
    def num_samples_per_epoch(self) -> int:
        """Samples until the data begins again; numbers may go beyond it without end."""
        ...

    def sample(self, number: int) -> Sample:
        """The sample of that number."""
        ...

    def locate(self, number: int, position: int) -> str:
        """Where token `position` of sample `number` comes from, in words for an error message."""
        ...

    def describe(self) -> str:
        """One line for the log: what is in the stream."""
        ...
