"""Packed documents over a whole training step: the losses and gradients of the masked way, and no tensor of the size of
the scores."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.data.batch import GPTBatch
from megatron3d.data.loader import GlobalBatches
from megatron3d.train.evaluate import evaluate
from megatron3d.train.step import train_step
from tests.dist.pool import Pool
from tests.parity.runs import RATES, Case, data_of, parts_of

LENGTH = 256
OPTIONS = (
    f"--seq-length {LENGTH} --num-layers 2 --hidden-size 16 --ffn-hidden-size 32 --vocab-size 40 --global-batch-size 2 "
    "--micro-batch-size 1 --eval-iters 1 --reset-position-ids"
)


class _LargestTensor(TorchDispatchMode):
    """The elements of the largest tensor that an operation takes or gives, and which operation."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: tuple[int, str] = (0, "")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves((args, kwargs, result)):
            if isinstance(one, Tensor):
                self.largest = max(self.largest, (one.numel(), str(func)))
        return result


@dataclass(frozen=True)
class Masked(GPTBatch):
    """The same samples with a mask of all scores."""

    def documents(self) -> None:
        return None

    def model_inputs(self) -> dict[str, Any]:
        ids_BS = self.document_ids_BS
        assert ids_BS is not None
        mask_BST = (ids_BS.unsqueeze(2) == ids_BS.unsqueeze(1)).tril()
        return super().model_inputs() | {"attention_mask_BST": mask_BST}


def step_of(
    options: str, *, masked: bool = False, cp: int = 1, watched_by: AbstractContextManager[object] | None = None
) -> tuple[float, list[Tensor]]:
    """Loss and weights after a step; an evaluation follows it."""
    layout = Layout(cp=cp)
    parts = parts_of(Case("llama", layout, f"{OPTIONS} {options}"), make_mesh(layout))
    data = data_of(parts.config)
    with GlobalBatches(data.reader(data.train), num_workers=0) as batches:
        batch = batches.read(0, 2, 0, 1)
    assert isinstance(batch, GPTBatch)
    if masked:
        batch = Masked(**vars(batch))
    with watched_by or nullcontext():
        loss = train_step(parts, batch, RATES, step=0).loss
        with GlobalBatches(data.reader(data.valid), num_workers=0) as batches:
            evaluate(parts, batches, num_batches=1)
    return loss, [x.detach().clone() for stage in parts.model.stages.values() for x in stage.parameters()]


WAYS = [
    "",
    "--recompute-granularity selective",
    "--random-ltd --random-ltd-layers 1 --random-ltd-min 240 --random-ltd-max 240",
    "--attention-dropout 0.1",
]


@pytest.mark.parametrize("way", WAYS)
def test_a_step_is_that_of_the_mask_without_a_tensor_of_the_size_of_the_scores(way: str) -> None:
    """The largest tensors have S x V elements, a sixth of those of the scores of one head."""
    recorder = _LargestTensor()
    loss, weights = step_of(f"--reset-attention-mask {way}", watched_by=recorder)
    # Dropout needs the probabilities, those of one document at a time.
    assert "dropout" in way or recorder.largest[0] < LENGTH**2 // 2, recorder.largest
    recorder = _LargestTensor()
    masked_loss, masked_weights = step_of(f"--reset-attention-mask {way}", masked=True, watched_by=recorder)
    assert recorder.largest[0] >= LENGTH**2
    assert loss == pytest.approx(masked_loss, rel=1e-6)
    for one, other in zip(weights, masked_weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)  # Adam's first step divides by small gradients
    assert way or loss != pytest.approx(step_of(way)[0], rel=1e-5), "documents must make a difference"


def _largest_and_loss(rank: int, world_size: int) -> tuple[tuple[int, str], float]:
    recorder = _LargestTensor()
    loss, _ = step_of("--reset-attention-mask", cp=world_size, watched_by=recorder)
    return recorder.largest, loss


def test_a_step_of_two_context_parallel_ranks_has_no_tensor_of_the_size_of_their_scores(pool: Pool) -> None:
    """Those of a rank are S x S/2."""
    want = step_of("--reset-attention-mask")[0]
    for largest, loss in pool.run(2, _largest_and_loss):
        assert largest[0] < LENGTH**2 // 2, largest
        assert loss == pytest.approx(want, rel=1e-6)
