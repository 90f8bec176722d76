"""What the data room hands to training: the samples of one rank, stacked, as plain tensors.

Shapes: B samples (a micro-batch, or all samples a rank reads of one global batch), S tokens of a sample.
A batch knows nothing of ranks or layouts; `loader.py` decides which samples it holds.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """What batches of every kind have: B samples of S tokens, moved and cut as one.

    tokens_BS: int64. The fields of a kind are tensors whose first dim is B, or None where a run does without them.
    rows_per_sample: how many rows in a row were made of each sample (`shorten.py`), which stay in one micro-batch; the
    first dim of all fields is then B x rows_per_sample.
    """

    tokens_BS: Tensor
    rows_per_sample: int = field(default=1, kw_only=True)

    @property
    def num_samples(self) -> int:
        """B, the number of samples."""
        return self.tokens_BS.shape[0] // self.rows_per_sample

    def to(self, device: torch.device | str) -> Self:
        """The same batch on `device`; copies from pinned memory do not block the host."""
        return self.moved(lambda tensor: tensor.to(device, non_blocking=True))

    def moved(self, move: Callable[[Tensor], Tensor]) -> Self:
        """The same batch of what `move` gives for each of its tensors."""
        return replace(self, **{name: move(tensor) for name, tensor in self._tensors().items()})

    def split(self, micro_batch_size: int) -> list[Self]:
        """The micro-batches in order, as views: micro-batch m holds samples [m*size, (m+1)*size).

        Raises: ValueError if the number of samples is not a multiple of `micro_batch_size`.
        """
        if micro_batch_size < 1 or self.num_samples % micro_batch_size:
            raise ValueError(f"{self.num_samples} samples do not split into micro-batches of {micro_batch_size}")
        num_rows = micro_batch_size * self.rows_per_sample
        pieces = {name: tensor.split(num_rows) for name, tensor in self._tensors().items()}
        num_micro_batches = self.num_samples // micro_batch_size
        return [
            replace(self, **{name: parts[number] for name, parts in pieces.items()})
            for number in range(num_micro_batches)
        ]

    def counts(self) -> dict[str, Tensor]:
        """What a loss can be a mean over, by name, int64 scalars: "samples", and "positions", padding included."""
        sizes = {"samples": self.num_samples, "positions": self.tokens_BS.numel()}
        return {name: torch.tensor(size, device=self.tokens_BS.device) for name, size in sizes.items()}

    @abstractmethod
    def model_inputs(self) -> dict[str, Any]:
        """What the model is given of the samples, by the names of `models.stage.MicroBatch`."""

    def label_index(self) -> Tensor | None:
        """Which of the tokens, in the order of [S, B] flattened, have a label that counts, int64 [P]; None where the
        model computes the losses of all. Its length depends on values, so ask it of samples on the host.
        """
        return None

    def documents(self) -> Tensor | None:
        """The number of the document within its sample that each token belongs to, int64 [B, S], ascending in a sample;
        tokens attend only within their documents. None where every sample is one document."""
        return None

    def _tensors(self) -> dict[str, Tensor]:
        """The fields that are present."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class GroupedSamples:
    """All samples a rank reads of one global batch, in groups that are each padded to a length of their own."""

    groups: tuple[Samples, ...]

    def to(self, device: torch.device | str) -> GroupedSamples:
        """The same samples on `device`."""
        return GroupedSamples(tuple(group.to(device) for group in self.groups))

    def split(self, micro_batch_size: int) -> list[Samples]:
        """The micro-batches of the groups, one group after another.

        Raises: ValueError if the samples of a group are not a multiple of `micro_batch_size`.
        """
        return [micro for group in self.groups for micro in group.split(micro_batch_size)]

    def counts(self) -> dict[str, Tensor]:
        """The counts of all groups together."""
        counts = [group.counts() for group in self.groups]
        return {name: torch.stack([one[name] for one in counts]).sum(0) for name in counts[0]}


@dataclass(frozen=True)
class Batch(Samples):
    """Samples of which each token has a label that may count.

    labels_BS: int64. loss_mask_BS: float32, 1 where the label counts and 0 where it does not.
    """

    labels_BS: Tensor
    loss_mask_BS: Tensor

    def loss_count(self) -> Tensor:
        """How many labels count, as an int64 scalar; sums over ranks stay exact."""
        return self.loss_mask_BS.sum(dtype=torch.float64).to(torch.int64)

    def counts(self) -> dict[str, Tensor]:
        """Also the "labels" that count."""
        return super().counts() | {"labels": self.loss_count()}

    def model_inputs(self) -> dict[str, Any]:
        """Tokens, labels and their mask."""
        return {"tokens_BS": self.tokens_BS, "labels_BS": self.labels_BS, "loss_mask_BS": self.loss_mask_BS}


@dataclass(frozen=True)
class GPTBatch(Batch):
    """B samples for next-token prediction: `labels_BS[b, s]` is the token that follows `tokens_BS[b, s]`.

    position_ids_BS: int64, or None for 0..S-1 in every row.
    document_ids_BS: int64, the number within the sample of the document each token belongs to; a token attends
    only to its own document. None: plain causal attention.
    """

    position_ids_BS: Tensor | None = None
    document_ids_BS: Tensor | None = None

    def documents(self) -> Tensor | None:
        """Those within which tokens attend."""
        return self.document_ids_BS

    def model_inputs(self) -> dict[str, Any]:
        """Also the positions."""
        return super().model_inputs() | {"position_ids_BS": self.position_ids_BS}


@dataclass(frozen=True)
class BertBatch(Batch):
    """B samples for masked language modelling, and for the sentence head where there is one.

    tokens_BS: [CLS] A [SEP] B [SEP] and padding, with some tokens masked. labels_BS: the original token where
    loss_mask_BS is 1, and the padding id elsewhere. token_types_BS: int64, 1 on B and its [SEP], else 0.
    padding_mask_BS: bool, True where a real token stands and False on padding; nobody attends to padding.
    sentence_labels_B: int64, 0 where B follows A and 1 where it does not; None without the sentence head.
    """

    token_types_BS: Tensor
    padding_mask_BS: Tensor
    sentence_labels_B: Tensor | None = None

    def counts(self) -> dict[str, Tensor]:
        """Also the "pairs" of sentences that have a label."""
        return super().counts() | {"pairs": self.sentence_count()}

    def model_inputs(self) -> dict[str, Any]:
        """Also segments, sentence labels, and a mask [B, 1, S] that keeps every token from attending to padding."""
        return super().model_inputs() | {
            "token_types_BS": self.token_types_BS,
            "sentence_labels_B": self.sentence_labels_B,
            "attention_mask_BST": self.padding_mask_BS.unsqueeze(1),
        }

    def label_index(self) -> Tensor:
        """The masked tokens, some 15 % of all; where there are none the first token, whose loss has a weight of 0."""
        index_P = self.loss_mask_BS.t().flatten().nonzero().flatten()
        return index_P if len(index_P) else index_P.new_zeros(1)  # kernels on a GPU cannot be started for no rows

    def sentence_count(self) -> Tensor:
        """How many sentence labels count, as an int64 scalar: B, or 0 without the sentence head."""
        return torch.tensor(
            0 if self.sentence_labels_B is None else self.num_samples, dtype=torch.int64, device=self.tokens_BS.device
        )


@dataclass(frozen=True)
class SequenceBatch(Samples):
    """B texts, or pairs of texts, each with one label: a class or a value.

    tokens_BS: [CLS] A [SEP], or [CLS] A [SEP] B [SEP], and padding. token_types_BS: int64, 1 on B and its [SEP].
    weights_B: float32, 0 for rows that only fill up the batch. padding_mask_BS: bool, True where a real token stands;
    None where no row has padding. labels_B: int64 classes or float32 values; None asks the model for its scores.
    """

    token_types_BS: Tensor
    weights_B: Tensor
    padding_mask_BS: Tensor | None = None
    labels_B: Tensor | None = None

    def counts(self) -> dict[str, Tensor]:
        """The "samples" are the rows that do not only fill up the batch."""
        return super().counts() | {"samples": self.weights_B.sum(dtype=torch.float64).to(torch.int64)}

    def model_inputs(self) -> dict[str, Any]:
        """Tokens, segments, labels with their weights, and a mask [B, 1, S] that keeps padding from being read."""
        return {
            "tokens_BS": self.tokens_BS,
            "token_types_BS": self.token_types_BS,
            "attention_mask_BST": None if self.padding_mask_BS is None else self.padding_mask_BS.unsqueeze(1),
            "sentence_labels_B": self.labels_B,
            "sample_weights_B": None if self.labels_B is None else self.weights_B,
        }
