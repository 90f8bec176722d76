"""An endless, ordered stream of samples, each a pure function of its number.

`GPTSamples` (one corpus), `Blend` (several) and `MockSamples` (none) are streams of token rows; `BertSamples` and
`MockBertSamples` are streams of masked sentences. What makes a batch of them knows only this. `MegatronSamples` and
`MegatronBlend` are streams of token rows that end, as Megatron-LM's order does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

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


@dataclass(frozen=True)
class StreamFrom(Generic[Sample]):
    """The samples of another stream from number `first` on, which is this stream's 0."""

    stream: SampleStream[Sample]
    first: int

    @property
    def seq_length(self) -> int:
        """S."""
        return self.stream.seq_length

    @property
    def num_samples_per_epoch(self) -> int:
        """Those of the other stream."""
        return self.stream.num_samples_per_epoch

    def sample(self, number: int) -> Sample:
        """Sample `number`. Raises: IndexError for a negative number, and what the other stream raises."""
        if number < 0:
            raise IndexError(f"sample {number}: samples are counted from 0")
        return self.stream.sample(self.first + number)

    def locate(self, number: int, position: int) -> str:
        """Where token `position` of sample `number` comes from."""
        return self.stream.locate(self.first + number, position)

    def describe(self) -> str:
        """The other stream, and where this one begins."""
        return f"{self.stream.describe()}, from sample {self.first} on"
