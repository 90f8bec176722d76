"""Fill-in-the-Middle: documents of a sample are cut into prefix, middle and suffix, and the middle is put last.

With probability `rate` the part of a document in a sample becomes PSM, `<prefix> p <suffix> s <middle> m`, or with
`spm_rate` SPM, `<prefix> <suffix> s <middle> p m`. Both cuts are drawn evenly over the characters of its text, so that
words are cut too, and the three texts are tokenized anew. A sample keeps its S + 1 tokens: what is too long is cut off
at the end, what is too short is filled with the padding token.

The random numbers are those of a counter-based generator with the seed and the number of the sample for its key, so
that a sample is a function of its number as without this. A rate of 0 gives the very tokens of the other stream.

Source: M. Bavarian et al., Efficient Training of Language Models to Fill in the Middle (2022), sections 3.1 and 3.2
(SPM is its variant 2); NVIDIA/Megatron-LM, megatron/training/datasets/fim_dataset.py, for the options. There the
random numbers depend on what was read before, special tokens are left out of a document's text, bytes of characters
that a sample cuts apart become U+FFFD, and of two ends of documents in a row one is dropped; here none of that is so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron3d.config.sections.data import DataConfig
from megatron3d.data.order import derive_seed
from megatron3d.data.sentencepiece_file import SentencePieceTokenizer
from megatron3d.data.stream import SampleStream
from megatron3d.data.tokenizer_interface import Tokenizer
from megatron3d.errors import ConfigError

_REPLACEMENT = "\ufffd"  # what bytes decode to that are no whole character
_MAX_PARTIAL = 3  # tokens of such a character at an edge: UTF-8 has at most four bytes


@dataclass(frozen=True)
class FimTokens:
    """The ids that mark the parts, fill a sample up, end a document, and cut one into fragments (None: nothing)."""

    prefix: int
    middle: int
    suffix: int
    pad: int
    eod: int
    split: int | None = None


@dataclass(frozen=True)
class FillInTheMiddle:
    """How samples are permuted. `fragment_rate` is the rate within documents that have the token `tokens.split`."""

    tokens: FimTokens
    tokenizer: Tokenizer
    rate: float
    spm_rate: float
    fragment_rate: float
    no_prefix: str | None
    seed: int

    @property
    def padding(self) -> int | None:
        """The id of labels that have no loss because they only fill a sample up; None where it also ends documents."""
        return None if self.tokens.pad == self.tokens.eod else self.tokens.pad

    def permuted(self, tokens: NDArray[np.int64], number: int) -> NDArray[np.int64]:
        """Sample `number`, int64 of the same length as `tokens`, which are those of the sample in their order."""
        if self.rate == 0:
            return tokens
        generator = np.random.Generator(np.random.Philox(key=[derive_seed(self.seed, "fim"), number]))
        parts: list[NDArray[np.int64]] = []
        for piece, end in _pieces(tokens, self.tokens.eod):
            parts += [self._document(piece, generator), end]
        made = np.concatenate(parts)[: len(tokens)]
        return np.pad(made, (0, len(tokens) - len(made)), constant_values=self.tokens.pad)

    def _document(self, tokens: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.int64]:
        """One document's part of a sample, as a whole or fragment by fragment."""
        split = self.tokens.split
        if split is None or not (tokens == split).any():
            return self._text(tokens, self.rate, generator)
        if generator.random() >= self.rate:
            return tokens
        parts: list[NDArray[np.int64]] = []
        for piece, end in _pieces(tokens, split):
            parts += [self._text(piece, self.fragment_rate, generator), end]
        return np.concatenate(parts)

    def _text(self, tokens: NDArray[np.int64], rate: float, generator: np.random.Generator) -> NDArray[np.int64]:
        """One text, permuted with probability `rate`."""
        if not len(tokens) or generator.random() >= rate:
            return tokens
        head, text, tail = self._decoded(tokens.tolist())
        if self.no_prefix is not None and text.startswith(self.no_prefix):
            return tokens
        first, second = sorted(int(generator.random() * (len(text) + 1)) for _ in range(2))
        prefix, middle, suffix = self.tokenizer.encode_batch([text[:first], text[first:second], text[second:]])
        prefix, suffix, marks = head + prefix, suffix + tail, self.tokens
        if generator.random() < self.spm_rate:
            made = [marks.prefix, marks.suffix, *suffix, marks.middle, *prefix, *middle]
        else:
            made = [marks.prefix, *prefix, marks.suffix, *suffix, marks.middle, *middle]
        return np.array(made, dtype=np.int64)

    def _decoded(self, tokens: list[int]) -> tuple[list[int], str, list[int]]:
        """The text of the tokens, without those before and behind it that hold parts of characters alone."""
        first, last = 0, len(tokens)
        text = self.tokenizer.decode(tokens)
        while text.startswith(_REPLACEMENT) and first < min(_MAX_PARTIAL, last):
            first += 1
            text = self.tokenizer.decode(tokens[first:last])
        while text.endswith(_REPLACEMENT) and len(tokens) - last < _MAX_PARTIAL and last > first:
            last -= 1
            text = self.tokenizer.decode(tokens[first:last])
        return tokens[:first], text, tokens[last:]


@dataclass(frozen=True)
class FimSamples:
    """The samples of a stream of token rows, permuted; a `SampleStream` itself."""

    stream: SampleStream[NDArray[np.int64]]
    fim: FillInTheMiddle

    @property
    def seq_length(self) -> int:
        """S."""
        return self.stream.seq_length

    @property
    def num_samples_per_epoch(self) -> int:
        """Those of the other stream."""
        return self.stream.num_samples_per_epoch

    def sample(self, number: int) -> NDArray[np.int64]:
        """S + 1 tokens, int64. Raises: what the other stream raises."""
        return self.fim.permuted(self.stream.sample(number), number)

    def locate(self, number: int, position: int) -> str:
        """Where the sample comes from; its tokens have other positions there."""
        return f"the sample that begins at {self.stream.locate(number, 0)}, permuted by --fim-data, token {position}"

    def describe(self) -> str:
        """The other stream, and how much of it is permuted."""
        return f"{self.stream.describe()}; {self.fim.rate:.0%} of it fills in the middle"


def fill_in_the_middle(
    data: DataConfig, tokenizer: Tokenizer | None, eod_token: int | None
) -> tuple[FillInTheMiddle | None, tuple[str, ...]]:
    """What the options ask for, None without --fim-data; and notes on what the tokenizer does to it.

    Raises: ConfigError with all tokens that the tokenizer does not have.
    """
    if not data.fim_data:
        return None, ()
    if tokenizer is None:
        raise ConfigError("--fim-data cuts the text of samples, but no tokenizer is given; give --tokenizer-type.")
    tokens = _tokens_of(data, tokenizer, eod_token)
    fim = FillInTheMiddle(
        tokens,
        tokenizer,
        data.fim_rate,
        data.fim_spm_rate,
        0.0 if data.fim_fragment_rate is None else data.fim_fragment_rate,
        data.fim_no_prefix,
        data.seed,
    )
    return fim, () if _joins(tokenizer) else (_NOTE_ON_SPACES,)


_NOTE_ON_SPACES = (
    "The tokenizer begins every text with a space, so with --fim-data there is one before each middle and suffix that "
    "the document does not have."
)


def _joins(tokenizer: Tokenizer) -> bool:
    """Whether the tokens of two halves of a word are a word again."""
    return tokenizer.decode(tokenizer.encode("re") + tokenizer.encode("turn")) == "return"


def _tokens_of(data: DataConfig, tokenizer: Tokenizer, eod_token: int | None) -> FimTokens:
    flags = {
        "prefix": ("--fim-prefix-token", data.fim_prefix_token),
        "middle": ("--fim-middle-token", data.fim_middle_token),
        "suffix": ("--fim-suffix-token", data.fim_suffix_token),
        "pad": ("--fim-pad-token", data.fim_pad_token),
        "eod": ("--fim-eod-token", data.fim_eod_token),
        "split": ("--fim-split-sample", data.fim_split_sample),
    }
    found: dict[str, int] = {} if eod_token is None else {"eod": eod_token}
    problems: list[str] = []
    for kind, (flag, name) in flags.items():
        if name is None:
            continue
        token = _id_of(tokenizer, name)
        if token is not None:
            found[kind] = token
            continue
        problems.append(
            f"{flag} {name} is no token of the tokenizer ({data.tokenizer_type}); add it to its special tokens, "
            f"or give the name of one that it has by {flag}."
        )
    if data.fim_eod_token is None and eod_token is None:
        problems.append("--fim-data must know where documents end, but no token says so; give --eod-token.")
    marks = [found[kind] for kind in ("prefix", "middle", "suffix") if kind in found]
    if len(set(marks)) < len(marks):
        problems.append(
            f"--fim-prefix-token {data.fim_prefix_token}, --fim-middle-token {data.fim_middle_token} and "
            f"--fim-suffix-token {data.fim_suffix_token} are not three tokens; give three names."
        )
    if problems:
        raise ConfigError("\n".join(problems))
    return FimTokens(**found)


def _id_of(tokenizer: Tokenizer, name: str) -> int | None:
    """The id of the token of that name, None if there is none or ids have no names."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return tokenizer.id_of(name)
    names = tokenizer.tokens() or []
    return names.index(name) if name in names else None


def _pieces(tokens: NDArray[np.int64], end: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """What stands before each token `end` with that token, and what stands behind the last with none."""
    first = 0
    for place in np.flatnonzero(tokens == end).tolist():
        yield tokens[first:place], tokens[place : place + 1]
        first = place + 1
    yield tokens[first:], tokens[:0]
