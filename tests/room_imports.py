"""Which room may import which: the architecture as tables, which `tests/house_rules.py` holds the code to.

A change to them is a change to the architecture and says why.
"""

from __future__ import annotations

# Room -> rooms it may import, besides itself, torch, numpy and the standard library. `errors` imports nothing, so
# every room may have it, but for the kernels, which know nothing of this project.
_TRAIN = {
    "process",
    "files",
    "storage",
    "config",
    "comm",
    "params",
    "kernels",
    "tensor",
    "nn",
    "moe",
    "models",
    "pipeline",
}
_TRAIN |= {"offload", "zero", "optim", "checkpoint", "data", "convert", "planner"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    # What a process owes its surroundings (streams, signals, the process that started it); knows nothing of the rest.
    "process": {"errors"},
    "kernels": set(),
    # How text, JSON and a user's own Python files are read. Below every room that opens a file, so that all cut lines
    # alike.
    "files": {"errors"},
    # How files reach the disk whole, and what a refusal means for the user. Below every room that writes one.
    "storage": {"errors"},
    "config": {"errors", "files"},
    "comm": {"errors"},
    # The sink makes the product of a weight gradient with the kernels that the layer computes with.
    "params": {"errors", "kernels"},
    "tensor": {"errors", "comm", "params", "kernels"},
    # Attention over samples that are cut sends keys and values between ranks (`nn/context`).
    "nn": {"errors", "comm", "tensor", "params", "kernels", "config"},
    # The exchange of rows between ranks is a collective of its own; the losses of balance go to the sink of `nn`.
    "moe": {"errors", "comm", "tensor", "nn", "params", "kernels", "config"},
    "models": {"errors", "moe", "nn", "tensor", "params", "config"},
    # `files` loads an order of the user's own.
    "pipeline": {"errors", "files", "storage"},
    "offload": {"errors", "storage", "comm", "params"},
    "zero": {"errors", "comm", "params", "offload"},
    "checkpoint": {"errors", "files", "storage", "comm", "params"},
    "optim": {"errors", "params", "config", "kernels"},
    # Arithmetic on what these rooms declare (plans, tables, layouts, schedules): it allocates and starts nothing.
    "planner": {
        *("errors", "config", "comm", "params", "kernels", "tensor", "nn", "models", "pipeline"),
        *("offload", "zero", "optim"),
    },
    "data": {"errors", "process", "files", "storage", "config"},
    # `data` reads the tokenizer that a directory describes: an import names it, an export writes its end of texts.
    "convert": {"errors", "files", "storage", "config", "models", "params", "checkpoint", "data"},
    "train": {"errors", *_TRAIN},
    "tasks": {"errors", "train", *_TRAIN},
    "inference": {"errors", "train", *_TRAIN},
    "serve": {"errors", "train", "tasks", "inference", *_TRAIN},
    "scripts": {"errors", "train", "tasks", "inference", "serve", *_TRAIN},
}
# Single modules that may import more than their room: the actors among the plain values. `measured` agrees with the
# other ranks on a time to count from and gathers what they recorded.
MODULE_MAY_IMPORT: dict[str, set[str]] = {
    "megatron3d.pipeline.run": {"comm", "params"},
    "megatron3d.pipeline.measured": {"comm"},
    # Attention over ranks that have parts of a sample exchanges keys, values and heads with them by itself.
    "megatron3d.nn.context.exchange": {"comm"},
    "megatron3d.nn.context.heads": {"comm"},
    "megatron3d.nn.context.ring": {"comm"},
    # The process that writes checkpoints ends with the one that started it.
    "megatron3d.checkpoint.writer_process": {"process"},
}

# What may be imported inside a function, because few runs need it and its own imports take long: torch's distributed
# checkpointing 0.8 s, without which a run without --save does; matplotlib 0.5 s, which only --profile-pipeline needs;
# torch's compiler 0.8 s and more, which only --compile needs;
# TensorBoard, which only --tensorboard-dir needs; torch's kernel for sequences of various lengths 1.3 s, on CUDA only.
MAY_IMPORT_LATE: dict[str, set[str]] = {
    "megatron3d_kernels.packed": {"torch.nn.attention.varlen"},
    "megatron3d.checkpoint.save": {"megatron3d.checkpoint.store"},
    "megatron3d.checkpoint.load": {"megatron3d.checkpoint.store"},
    "megatron3d.checkpoint.async_save": {"megatron3d.checkpoint.store"},
    "megatron3d.train.compiling": {
        *("torch._inductor.cpp_builder", "torch._inductor.exc"),
        *("torch._dynamo.config", "torch._dynamo.callback", "torch._dynamo.utils"),
    },
    "megatron3d.train.profile": {"megatron3d.pipeline.draw.measured"},
    "megatron3d.train.writers": {"torch.utils.tensorboard"},
}
START_MODULE = "megatron3d.train.loop"
SLOW_PACKAGES = ("matplotlib", "torch.distributed.checkpoint", "torch.utils.tensorboard", "rich", "google")
