"""Shorter samples against slices of lists."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron3d.config.lengths import SampleShape
from megatron3d.data.gpt import DocumentRules, collate
from megatron3d.data.shorten import shortened
from megatron3d.nn.documents import document_rectangles

RULES = DocumentRules(eod_token=0, reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True)
SAMPLES_BS1 = np.random.default_rng(0).integers(0, 4, size=(4, 13))


@pytest.mark.parametrize(("rows", "length"), [(1, 5), (1, 12), (2, 6), (2, 5), (4, 3)])
def test_a_row_is_what_a_sample_of_its_tokens_would_be(rows: int, length: int) -> None:
    """Each row is collated by itself from its tokens and the one that follows them."""
    short = shortened(collate(SAMPLES_BS1, RULES), SampleShape(rows, length))
    pieces = [sample[row * length : (row + 1) * length + 1] for sample in SAMPLES_BS1 for row in range(rows)]
    wanted = collate(np.stack(pieces), RULES)
    for name in ("tokens_BS", "labels_BS", "loss_mask_BS", "position_ids_BS"):
        assert torch.equal(getattr(short, name), getattr(wanted, name)), name
    squares, of_rows = (document_rectangles(batch.document_ids_BS) for batch in (short, wanted))
    assert squares == of_rows


def test_rows_of_a_sample_stay_in_one_micro_batch() -> None:
    short = shortened(collate(SAMPLES_BS1, RULES), SampleShape(3, 4))
    assert (short.num_samples, short.tokens_BS.shape) == (4, (12, 4))
    micros = short.split(2)
    assert [micro.num_samples for micro in micros] == [2, 2]
    assert torch.equal(micros[1].tokens_BS.flatten(), torch.from_numpy(SAMPLES_BS1[2:, :12]).flatten())
    with pytest.raises(ValueError, match="4 samples do not split into micro-batches of 3"):
        short.split(3)
