"""What the data room hands to training: the samples of one rank, stacked, as plain tensors.

Shapes: B samples (a micro-batch, or all samples a rank reads of one global batch), S tokens of a sample.
A batch knows nothing of ranks or layouts; `loader.py` decides which samples it holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GPTBatch:
    """B samples for next-token prediction: `labels_BS[b, s]` is the token that follows `tokens_BS[b, s]`.

    tokens_BS, labels_BS: int64. loss_mask_BS: float32, 1 where the label counts and 0 where it does not.
    position_ids_BS: int64, or None for 0..S-1 in every row.
    document_ids_BS: int64, the number within the sample of the document each token belongs to; a token attends
    only to its own document. None: plain causal attention.
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    loss_mask_BS: Tensor
    position_ids_BS: Tensor | None = None
    document_ids_BS: Tensor | None = None

    @property
    def num_samples(self) -> int:
        """B, the number of samples."""
        return self.tokens_BS.shape[0]

    def to(self, device: torch.device | str) -> GPTBatch:
        """The same batch on `device`; copies from pinned memory do not block the host."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return GPTBatch(
            self.tokens_BS.to(device, non_blocking=True),
            self.labels_BS.to(device, non_blocking=True),
            self.loss_mask_BS.to(device, non_blocking=True),
            position_ids_BS=move(self.position_ids_BS),
            document_ids_BS=move(self.document_ids_BS),
        )

    def split(self, micro_batch_size: int) -> list[GPTBatch]:
        """The micro-batches in order, as views: micro-batch m holds samples [m*size, (m+1)*size).

        Raises: ValueError if the number of samples is not a multiple of `micro_batch_size`.
        """
        if micro_batch_size < 1 or self.num_samples % micro_batch_size:
            raise ValueError(f"{self.num_samples} samples do not split into micro-batches of {micro_batch_size}")
        num_micro_batches = self.num_samples // micro_batch_size

        def cut(tensor: Tensor | None) -> tuple[Tensor | None, ...]:
            return (None,) * num_micro_batches if tensor is None else tensor.split(micro_batch_size)

        return [
            GPTBatch(tokens, labels, mask, position_ids_BS=positions, document_ids_BS=documents)
            for tokens, labels, mask, positions, documents in zip(
                self.tokens_BS.split(micro_batch_size),
                self.labels_BS.split(micro_batch_size),
                self.loss_mask_BS.split(micro_batch_size),
                cut(self.position_ids_BS),
                cut(self.document_ids_BS),
                strict=True,
            )
        ]

    def loss_count(self) -> Tensor:
        """How many labels count, as an int64 scalar; sums over ranks stay exact."""
        return self.loss_mask_BS.sum(dtype=torch.float64).to(torch.int64)
