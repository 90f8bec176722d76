"""From texts to token ids: [CLS] A [SEP] or [CLS] A [SEP] B [SEP], cut to a length.

Source: Devlin et al. 2018 (arXiv:1810.04805), figure 4; of a pair that is too long the longer text loses its last
tokens, as in the paper's released code.

Shapes: N samples, T tokens of all samples together, B samples of a batch, S its length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from megatron3d.data.batch import SequenceBatch
from megatron3d.data.order import derive_seed
from megatron3d.data.text_pair import cut, with_special_tokens
from megatron3d.data.tokenizer import Tokenizer
from megatron3d.errors import DataError
from megatron3d.tasks.glue.read import SampleTable


@dataclass(frozen=True)
class Encoded:
    """The samples of one file as token ids.

    Attributes:
        tokens_T: int32, sample after sample.
        starts: int64 [N + 1], where each sample begins; the last is T.
        first_lengths_N: int32, tokens of [CLS] A [SEP].
        labels_N: int64 classes or float32 values; None for files without labels.
        num_cut: samples that lost tokens.
        pad: the id that fills rows up.
        mask: the id that stands for a hidden token; None if the tokenizer has none.
    """

    tokens_T: NDArray[np.int32]
    starts: NDArray[np.int64]
    first_lengths_N: NDArray[np.int32]
    labels_N: NDArray[np.generic] | None
    num_cut: int
    pad: int
    mask: int | None

    def __len__(self) -> int:
        """Samples, N."""
        return len(self.starts) - 1

    @property
    def lengths_N(self) -> NDArray[np.int64]:
        """Tokens of each sample."""
        return np.diff(self.starts)

    def digest(self) -> str:
        """A digest of tokens and labels, by which ranks tell that theirs are equal."""
        arrays = [self.tokens_T, self.starts, *([] if self.labels_N is None else [self.labels_N])]
        return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]

    def without_labels(self) -> Encoded:
        """The same samples, of which a model is asked for its scores."""
        return replace(self, labels_N=None)

    def batch(self, indices_B: NDArray[np.int64], weights_B: NDArray[np.float32], length: int) -> SequenceBatch:
        """These samples, padded to `length`; without labels where there are none."""
        lengths_B = self.lengths_N[indices_B]
        positions_S = np.arange(length)
        is_token_BS = positions_S < lengths_B[:, None]
        tokens_BS = np.full((len(indices_B), length), self.pad, dtype=np.int64)
        where_BS = np.where(is_token_BS, self.starts[indices_B][:, None] + positions_S, 0)
        np.copyto(tokens_BS, self.tokens_T[where_BS], where=is_token_BS)
        types_BS = is_token_BS & (positions_S >= self.first_lengths_N[indices_B][:, None])
        return SequenceBatch(
            tokens_BS=torch.from_numpy(tokens_BS),
            token_types_BS=torch.from_numpy(types_BS.astype(np.int64)),
            weights_B=torch.from_numpy(weights_B.copy()),
            padding_mask_BS=None if is_token_BS.all() else torch.from_numpy(is_token_BS),
            labels_B=None if self.labels_N is None else torch.from_numpy(self.labels_N[indices_B]),
        )


def encode(rows: SampleTable, tokenizer: Tokenizer, *, max_length: int) -> Encoded:
    """All samples of a file as ids, none longer than `max_length` with its special tokens.

    Raises:
        DataError: the tokenizer has no [CLS], [SEP] or [PAD].
    """
    cls, sep, pad = tokenizer.cls, tokenizer.sep, tokenizer.pad
    if cls is None or sep is None or pad is None:
        missing = [name for name, id in (("[CLS]", cls), ("[SEP]", sep), ("[PAD]", pad)) if id is None]
        raise DataError(
            f"the tokenizer has no {' and no '.join(missing)}, which BERT's inputs are made of; give the vocabulary "
            "that the model was trained with"
        )
    columns = [tokenizer.encode_batch(texts) for texts in rows.texts]
    room = max_length - 1 - len(columns)
    samples: list[Sequence[int]] = []
    first_lengths, num_cut = [], 0
    for parts in zip(*columns):
        kept = cut(parts, room)
        num_cut += sum(map(len, kept)) < sum(map(len, parts))
        first_lengths.append(len(kept[0]) + 2)
        samples.append(with_special_tokens(kept, cls=cls, sep=sep))
    starts = np.zeros(len(samples) + 1, dtype=np.int64)
    np.cumsum([len(sample) for sample in samples], out=starts[1:])
    tokens = np.fromiter((id for sample in samples for id in sample), dtype=np.int32, count=int(starts[-1]))
    labels = None
    if rows.labels is not None:
        labels = np.array(rows.labels, dtype=np.int64 if isinstance(rows.labels[0], int) else np.float32)
    return Encoded(tokens, starts, np.array(first_lengths, dtype=np.int32), labels, num_cut, pad, tokenizer.mask)


def hide_tokens(samples: Encoded, probability: float, *, seed: int, epoch: int) -> Encoded:
    """The samples with tokens hidden behind [MASK], each with this probability; [CLS] and [SEP] stay.

    What is hidden is a function of seed and epoch alone, so all ranks hide the same. A model that must judge without
    some of the words learns texts by heart less.

    Source: Iyyer et al. 2015 (Deep Unordered Composition Rivals Syntactic Methods), section 3.2, word dropout; a hidden
    word is [MASK] here, which a BERT knows from pretraining.
    """
    assert samples.mask is not None, "job.settle asks for a tokenizer with [MASK]"
    generator = np.random.default_rng(derive_seed(seed, "fine-tuning token dropout", epoch))
    is_hidden_T = generator.random(len(samples.tokens_T), dtype=np.float32) < probability
    firsts = samples.starts[:-1]
    for special in (firsts, firsts + samples.first_lengths_N - 1, samples.starts[1:] - 1):
        is_hidden_T[special] = False
    return replace(samples, tokens_T=np.where(is_hidden_T, np.int32(samples.mask), samples.tokens_T))
