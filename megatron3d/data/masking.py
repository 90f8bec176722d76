"""Which tokens of a BERT sample are predicted, and what stands in their place.

Spans of 1 to N whole words are chosen at random until a share of the tokens is used up; of the chosen tokens 80 %
become [MASK], 10 % a random word piece and 10 % stay. All is a function of the sample's random generator.

Sources: J. Devlin et al., BERT (2018), section 3.1 and appendix A.1 (15 %, 80/10/10); whole words are those of the
authors' later "whole word masking" models, where a piece that begins with ## goes on with a word; spans of n words
with odds 1/n are those of Z. Lan et al., ALBERT (2019), section 3.1, which Megatron-LM uses for BERT.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megatron3d.data.tokenizer import Tokenizer
from megatron3d.errors import ConfigError

_MASK_SHARE, _RANDOM_SHARE = 0.8, 0.1
_MOCK_WORD_PIECES = 4


@dataclass(frozen=True)
class BertVocabulary:
    """What samples and masking must know of a vocabulary of `size` ids.

    continues_word: bool [size], True for a piece that goes on with the word before it.
    """

    size: int
    cls: int
    sep: int
    mask: int
    pad: int
    continues_word: NDArray[np.bool_]

    @classmethod
    def of_tokenizer(cls, tokenizer: Tokenizer) -> BertVocabulary:
        """The vocabulary of a tokenizer. Raises: ConfigError if it lacks a special token or knows no words."""
        ids = {"[CLS]": tokenizer.cls, "[SEP]": tokenizer.sep, "[MASK]": tokenizer.mask, "[PAD]": tokenizer.pad}
        known = [id for id in ids.values() if id is not None]
        continues = tokenizer.word_continuations()
        if len(known) < len(ids) or continues is None:
            missing = ", ".join(name for name, id in ids.items() if id is None)
            lacks = missing or "a mark on the pieces that go on with a word"
            raise ConfigError(
                f"a BERT cannot be trained with this tokenizer of {tokenizer.vocab_size} ids: it has no {lacks}; use "
                f"--tokenizer-type BertWordPieceLowerCase or BertWordPieceCase with --vocab-file."
            )
        first, second, mask, pad = known
        return cls(tokenizer.vocab_size, first, second, mask, pad, np.array(continues, dtype=bool))

    @classmethod
    def without_tokenizer(cls, size: int) -> BertVocabulary:
        """A vocabulary for mock data: ids 0 to 3 are special, and every fourth of the others goes on with a word."""
        continues = np.arange(size) % _MOCK_WORD_PIECES == _MOCK_WORD_PIECES - 1
        continues[: min(4, size)] = False
        if size < 5:
            raise ConfigError(f"--vocab-size {size} leaves no token beside the 4 special ones; use at least 5.")
        return cls(size, cls=1, sep=2, mask=3, pad=0, continues_word=continues)

    @cached_property
    def text_ids(self) -> NDArray[np.int64]:
        """All ids but the four special ones: what a random replacement is drawn from."""
        return np.setdiff1d(np.arange(self.size), [self.cls, self.sep, self.mask, self.pad])


@dataclass(frozen=True)
class MaskingRules:
    """How much is masked: a share of all tokens, in spans of up to `max_ngram` words (or pieces)."""

    probability: float = 0.15
    max_ngram: int = 3
    whole_words: bool = True

    def budget(self, num_tokens: int) -> int:
        """Tokens to be predicted in a sample of `num_tokens`, [CLS] and [SEP] counted, at least one."""
        return max(1, round(num_tokens * self.probability))

    @cached_property
    def ngram_bounds(self) -> NDArray[np.float64]:
        """Cumulative odds of spans of 1, 2, ... words: n has odds 1/n."""
        odds = 1.0 / np.arange(1, self.max_ngram + 1)
        return np.cumsum(odds) / odds.sum()


@dataclass(frozen=True)
class MaskedTokens:
    """A sample's tokens with some masked. int64 [T] tokens and labels, bool [T] which of them are predicted."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    predicted: NDArray[np.bool_]


def mask_tokens(
    tokens: NDArray[np.int64],
    is_text: NDArray[np.bool_],
    vocabulary: BertVocabulary,
    rules: MaskingRules,
    generator: np.random.Generator,
) -> MaskedTokens:
    """Mask a sample of T tokens (no padding), int64 [T]; `is_text` is False at [CLS] and [SEP], which are kept.

    labels are the original tokens where predicted, and the padding id elsewhere.
    """
    predicted = np.zeros(len(tokens), dtype=bool)
    for first, stop in choose_spans(tokens, is_text, vocabulary.continues_word, rules, generator):
        predicted[first:stop] = True
    places = np.flatnonzero(predicted)
    fate, choice = generator.random((2, len(places)))
    masked = tokens.copy()
    masked[places[fate < _MASK_SHARE]] = vocabulary.mask
    is_random = (fate >= _MASK_SHARE) & (fate < _MASK_SHARE + _RANDOM_SHARE)
    masked[places[is_random]] = vocabulary.text_ids[(choice[is_random] * len(vocabulary.text_ids)).astype(np.int64)]
    return MaskedTokens(masked, np.where(predicted, tokens, vocabulary.pad), predicted)


def choose_spans(
    tokens: NDArray[np.int64],
    is_text: NDArray[np.bool_],
    continues_word: NDArray[np.bool_],
    rules: MaskingRules,
    generator: np.random.Generator,
) -> list[tuple[int, int]]:
    """The spans (first, stop) that are predicted, in the order of their choice; none overlap or leave a segment.

    Words are visited in random order. Each draws how many words it would mask, takes fewer if the segment or the
    budget ends before, and is passed over if one of them is taken already.
    """
    starts, stops = find_words(tokens, is_text, continues_word if rules.whole_words else None)
    segments = np.cumsum(~is_text)[starts]
    sizes = np.searchsorted(rules.ngram_bounds, generator.random(len(starts)), side="right") + 1
    # argsort of uniform numbers, as the stream of Generator.random stays the same over versions of numpy
    order = np.argsort(generator.random(len(starts)), kind="stable")
    last_of_segment = np.searchsorted(segments, segments, side="right") - 1
    last_words = np.minimum(np.arange(len(starts)) + sizes - 1, last_of_segment).tolist()
    starts_list, stops_list = starts.tolist(), stops.tolist()
    left = rules.budget(len(tokens))
    taken = [False] * len(starts_list)
    spans = []
    for word in order.tolist():
        last = last_words[word]
        while last >= word and stops_list[last] - starts_list[word] > left:
            last -= 1
        if last < word or any(taken[word : last + 1]):
            continue
        taken[word : last + 1] = [True] * (last + 1 - word)
        spans.append((starts_list[word], stops_list[last]))
        left -= stops_list[last] - starts_list[word]
        if left == 0:
            break
    return spans


def find_words(
    tokens: NDArray[np.int64], is_text: NDArray[np.bool_], continues_word: NDArray[np.bool_] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the words of a sample begin and stop, int64 [words] each; without `continues_word` a piece is a word.

    A piece that would go on with a word, but stands first in its segment, begins one.
    """
    begins = is_text.copy()
    if continues_word is not None:
        follows_text = np.concatenate([[False], is_text[:-1]])
        begins &= ~(continues_word[tokens] & follows_text)
    breaks = np.append(np.flatnonzero(begins | ~is_text), len(tokens))
    starts = np.flatnonzero(begins)
    return starts, breaks[np.searchsorted(breaks, starts, side="right")]
