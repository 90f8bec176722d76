"""The batch value: cut into micro-batches in order, counted exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron3d.data.batch import GPTBatch
from megatron3d.data.gpt import DocumentRules, collate


def batch_of(num_samples: int, rules: DocumentRules) -> GPTBatch:
    return collate(np.random.default_rng(0).integers(0, 5, size=(num_samples, 9)), rules)


@pytest.mark.parametrize("rules", [DocumentRules(None), DocumentRules(0, True, True, True)])
def test_micro_batches_put_together_are_the_batch(rules: DocumentRules) -> None:
    batch = batch_of(6, rules)
    parts = batch.split(2)
    assert [part.num_samples for part in parts] == [2, 2, 2]
    for name in ("tokens_BS", "labels_BS", "loss_mask_BS", "position_ids_BS", "document_ids_BS"):
        whole, pieces = getattr(batch, name), [getattr(part, name) for part in parts]
        if whole is None:
            assert pieces == [None] * 3
        else:
            assert torch.equal(torch.cat(pieces), whole)
    assert sum(part.loss_count() for part in parts) == batch.loss_count()


def test_loss_count_is_exact_where_float32_is_not() -> None:
    """2**24 + 1 ones cannot be counted in float32."""
    ones = torch.ones(1, 2**24 + 1)
    count = GPTBatch(ones, ones, ones).loss_count()
    assert count.dtype == torch.int64 and count.item() == 2**24 + 1


def test_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="6 samples do not split into micro-batches of 4"):
        batch_of(6, DocumentRules(None)).split(4)


def test_moving_keeps_what_is_absent_absent() -> None:
    moved = batch_of(2, DocumentRules(None)).to("meta")
    assert moved.tokens_BS.device.type == "meta" and moved.position_ids_BS is None
