"""Evaluation: the mean loss over the first global batches of a stream, by a forward-only schedule.

Every evaluation reads the same samples, so its numbers compare along a run and between runs.
"""

from __future__ import annotations

import torch

from megatron3d.comm.collectives import all_reduce
from megatron3d.data.loader import GlobalBatches
from megatron3d.pipeline.run import run
from megatron3d.train.parts import Parts
from megatron3d.train.step import micro_batches, share_of_sum


def evaluate(parts: Parts, batches: GlobalBatches, *, num_batches: int) -> float:
    """Mean loss over the masked tokens of `num_batches` global batches, the same on every rank."""
    config, model, dp = parts.config, parts.model, parts.mesh.dp
    size, micro = config.train.global_batch_size, config.train.micro_batch_size
    totals = torch.zeros(2, dtype=torch.float64, device=model.device)
    for number in range(num_batches):
        batch = batches.read(number * size, size, dp.rank, dp.size)
        micros = micro_batches(batch, micro, config.model, device=model.device)
        row = model.rows.forward_only(len(micros))
        wire = model.wire(config, micro_batch_size=micro)
        losses = run(row.schedule, row.actions, model.stages, micros, wire=wire)
        counts = model.holds_last_stage and parts.mesh.tp.rank == 0
        count = batch.loss_count().double().to(model.device) if counts else torch.zeros_like(totals[1])
        totals += torch.stack([share_of_sum(parts, losses), count])
    loss_sum, count = all_reduce(totals, parts.mesh.world).tolist()
    return loss_sum / max(1.0, count)
