"""An endless, ordered stream of samples, each a pure function of its number.

`GPTSamples` (one corpus), `Blend` (several) and `MockSamples` (none) are streams; the loader knows only this.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class SampleStream(Protocol):
    """What the loader needs of any source of samples. S is the sequence length."""

    @property
    def seq_length(self) -> int:
        """S, the tokens a model sees of one sample."""
        ...

    @property
    def num_samples_per_epoch(self) -> int:
        """Samples until the data begins again; numbers may go beyond it without end."""
        ...

    def sample(self, number: int) -> NDArray[np.int64]:
        """S + 1 token ids: the inputs are the first S, the labels the last S."""
        ...

    def locate(self, number: int, position: int) -> str:
        """Where token `position` of sample `number` comes from, in words for an error message."""
        ...

    def describe(self) -> str:
        """One line for the log: what is in the stream."""
        ...
