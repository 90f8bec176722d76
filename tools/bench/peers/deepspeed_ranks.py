"""The plain-torch GPT in DeepSpeed's engine with torch's AdamW, at ZeRO 0 ("dp") to 3.

DeepSpeed clips nothing where `gradient_clipping` is 0, its default.
"""

from __future__ import annotations

import deepspeed

from tools.bench.peers.plain_torch import PlainGPT
from tools.bench.peers.trainee import Trainee, cross_entropy, own_sequences
from tools.bench.peers.work import LEARNING_RATE, WEIGHT_DECAY, Work


def build(work: Work) -> Trainee:
    """This rank's engine; `work.layout` is "dp", "zero1", "zero2" or "zero3"."""
    model = PlainGPT(work)
    num_parameters = sum(p.numel() for p in model.parameters())
    config = {
        "train_micro_batch_size_per_gpu": work.micro_batch,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": work.zero_stage},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "torch_adam": True},
        },
        "bf16": {"enabled": work.dtype == "bf16"},
        "steps_per_print": 10**9,
    }
    deepspeed.init_distributed(dist_backend="gloo")
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    tokens_BS, labels_BS = own_sequences(work)

    def step() -> float:
        loss = cross_entropy(engine(tokens_BS).float(), labels_BS)
        engine.backward(loss)
        engine.step()
        return loss.item()

    return Trainee(step, num_parameters)
