"""The metrics of tools/analyze_data.py: a number for each sample, higher where the sample is harder.

    length        how far the tokens of a sample can look back. The tokens of a GPT's sample are cut from the row of
                  documents, so that all samples are of one length; what differs is how the documents cut them. It is
                  the mean length, over the tokens, of the stretch of one document that a token stands in: sum(l^2) / S.
                  A BERT's sample has the number of its tokens, without [CLS], [SEP] and padding.
    rarity        -sum of log p(token), with p the share of a token among all of the training split (DeepSpeed's
                  vocabulary rarity; E. Platanios et al., Competence-based Curriculum Learning, 2019, section 2.1)
    compression   bytes after zlib at level 6 by bytes before, of the text in UTF-8: texts that repeat are easy
    mtld          lexical diversity of the text
    flesch        100 - reading ease, so that it rises with the difficulty
    loss          mean loss of the tokens after the first under a checkpoint of the user's (`inference/sample_loss.py`)
    module:name   a function of the user's own, of a `MetricSample`

The text of a sample is what the tokenizer makes of its ids, without end-of-document tokens.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import cast

import numpy as np
from numpy.typing import NDArray

from megatron3d.data.curriculum.readability import mtld, reading_ease, words_of
from megatron3d.errors import ConfigError, DataError
from megatron3d.files.user_code import is_user_code, load_user_object

LOSS = "loss"
_ZLIB_LEVEL = 6


@dataclass(frozen=True)
class MetricSample:
    """What a metric is a function of.

    Attributes:
        number: of the sample among the fixed samples of the training split, from 0 on.
        tokens: int64, its ids without padding and special tokens of a BERT.
        stretches: int64, the lengths of the parts of `tokens` that are of one document each.
        log_probability: float64 [V], log p of each id in the training split; None unless a metric asks for it.
        decode: makes a text of ids; None where no tokenizer was given.
    """

    number: int
    tokens: NDArray[np.int64]
    stretches: NDArray[np.int64]
    log_probability: NDArray[np.float64] | None = None
    decode: Callable[[NDArray[np.int64]], str] | None = None

    @cached_property
    def text(self) -> str:
        """The text of the tokens. Raises: DataError where no tokenizer was given."""
        if self.decode is None:
            raise DataError(f"sample {self.number} has no text: no tokenizer was given; give --tokenizer-type.")
        return self.decode(self.tokens)


@dataclass(frozen=True)
class Metric:
    """One metric: its function, a version that changes with its meaning, and what it needs of the samples."""

    name: str
    function: Callable[[MetricSample], float]
    version: int = 1
    needs_text: bool = False
    needs_frequencies: bool = False


def _length(sample: MetricSample) -> float:
    total = int(sample.stretches.sum())
    return float((sample.stretches.astype(np.float64) ** 2).sum() / total) if total else 0.0


def _rarity(sample: MetricSample) -> float:
    assert sample.log_probability is not None, "frequencies are counted for the metrics that need them"
    return float(-sample.log_probability[sample.tokens].sum())


def _compression(sample: MetricSample) -> float:
    text = sample.text.encode(errors="replace")
    return len(zlib.compress(text, _ZLIB_LEVEL)) / len(text) if text else 0.0


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        one.name: one
        for one in (
            Metric("length", _length),
            Metric("rarity", _rarity, needs_frequencies=True),
            Metric("compression", _compression, needs_text=True),
            Metric("mtld", lambda sample: mtld(words_of(sample.text)), needs_text=True),
            Metric("flesch", lambda sample: 100.0 - reading_ease(sample.text), needs_text=True),
        )
    }
)


def find_metric(name: str) -> Metric:
    """The metric of that name, or a function of the user's own.

    Raises: ConfigError for a name that is not known, or code that cannot be loaded.
    """
    if is_user_code(name):
        function = load_user_object("--metrics", name, "function", callable)
        return Metric(name, cast(Callable[[MetricSample], float], function))
    if name not in METRICS:
        known = ", ".join((*METRICS, LOSS))
        raise ConfigError(
            f"--metrics {name} is not known; use some of {known}, or path/to/file.py:FUNCTION for one of your own."
        )
    return METRICS[name]


def directory_name(metric: str) -> str:
    """The folder of a metric's index: its name, of a user's own that of the function."""
    return metric.rpartition(":")[2]


def measured(metric: Metric, sample: MetricSample) -> float:
    """The number of one sample. Raises: DataError if the function fails or gives no finite number."""
    try:
        found = float(metric.function(sample))
    except (DataError, ConfigError):
        raise
    except Exception as error:
        raise DataError(f"the metric {metric.name} failed at sample {sample.number}: {error}; mend it.") from error
    if not math.isfinite(found) or abs(found) > float(np.finfo(np.float32).max):
        raise DataError(
            f"the metric {metric.name} gave {found} for sample {sample.number}; it must be a finite number."
        )
    return found
