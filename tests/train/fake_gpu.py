"""Whole training steps on a GPU that is not there; a process of its own, since a device once named stays.

    python -m tests.train.fake_gpu '[["gpt", "triton", "--bf16 --zero-stage 3"], ...]'

The device is torch's PrivateUse1 under the name "fakegpu": fake tensors of `cuda` cannot run a backward without a
driver. FakeTensorMode refuses operations that mix devices. Launches of Triton kernels do nothing, and attention is the
stand-in of the memory ledger. What a step reads back to the host, and what it copies between devices, is counted
within the pipeline's loop over micro-batches and outside of it. Prints one JSON document: what each case did.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron3d_kernels import cross_entropy, dropout, gated_activation, layer_norm, residual_norm, rms_norm, rotary
from megatron3d_kernels.products import TORCH
from megatron3d_kernels.selection import REFERENCE, TRITON_DTYPES
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.config.run import RunConfig
from megatron3d.data.batch import BertBatch, GPTBatch, Samples
from megatron3d.models.zoo import architecture_of
from megatron3d.planner.kernels_without_memory import GpuKernels
from megatron3d.train import setup as parts_of_a_run
from megatron3d.train import step as steps
from tests.planner.measured import config_of

NAME = "fakegpu"
TINY = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --vocab-size 512 --seq-length 32 "
    "--max-position-embeddings 32 --micro-batch-size 1 --global-batch-size 2 --attention-dropout 0"
)
_READS = frozenset({torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default})
_COPIES = frozenset({torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default})


class FakeGpuKernels(GpuKernels):
    """Triton's wrappers or, with `implementation`, the references, on tensors of the fake device."""

    implementation = ""

    def __init__(self, *, library: str, packed: str) -> None:
        super().__init__()
        assert library == packed == TORCH, f"products and packed documents on a GPU are torch's: {library}, {packed}"
        self._possible_keys = frozenset((NAME, dtype) for dtype in TRITON_DTYPES)
        if self.implementation == REFERENCE:
            self._forced = dict.fromkeys(self._forced, REFERENCE)


@dataclass
class Traffic(TorchDispatchMode):
    """What goes between host and device, within the loop over micro-batches and outside of it."""

    inside: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    is_inside: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Count reads, and answer them, since a fake tensor has no values."""
        if func in _READS:
            self._note(str(func))
            is_number = func is torch.ops.aten._local_scalar_dense.default
            return 1.0 if is_number else args[0].new_empty((3, args[0].dim()), dtype=torch.int64)
        out = func(*args, **(kwargs or {}))
        devices = {one.device.type for one in tree_leaves((args, out)) if isinstance(one, Tensor) and one.dim()}
        if func in _COPIES and len(devices) > 1:
            self._note(f"{func} to the {'host' if out.device.type == 'cpu' else 'device'}")
        return out

    def _note(self, what: str) -> None:
        (self.inside if self.is_inside else self.outside).append(what)

    @contextmanager
    def within(self) -> Any:
        """The loop over micro-batches."""
        self.is_inside = True
        yield
        self.is_inside = False


def main() -> None:
    """Run the cases."""
    _setup_privateuseone_for_python_backend(NAME)
    # What `torch.utils.checkpoint` asks of a device before it recomputes.
    torch.get_device_module(NAME).get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    for kernel in (cross_entropy, dropout, gated_activation, layer_norm, residual_norm, rms_norm, rotary):
        kernel.launch = lambda *arguments, **constants: None
    parts_of_a_run.Registry = FakeGpuKernels
    torch.tensor = _tensor
    print(json.dumps([_outcome(*case) for case in json.loads(sys.argv[1])]), flush=True)
    os._exit(0)  # autograd has made a thread for the device, which does not end with the process


_TENSOR = torch.tensor


def _tensor(data: object, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
    """`torch.tensor`, which makes real memory on the device, for a device without any."""
    made = _TENSOR(data, dtype=dtype)
    return made if device is None else torch.empty(made.shape, dtype=made.dtype, device=device)


def _outcome(architecture: str, implementation: str, flags: str) -> dict[str, object]:
    FakeGpuKernels.implementation = implementation
    config = config_of(f"{TINY} {flags}", 1, architecture=architecture)
    traffic = Traffic()
    run = steps.run

    def counted(*arguments: Any, **options: Any) -> Any:
        with traffic.within():
            return run(*arguments, **options)

    steps.run = counted
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            device = torch.device(NAME, 0)
            builder = architecture_of(config.model).build_stage
            parts = parts_of_a_run.build_parts(config, make_mesh(Layout()), device, builder)
            with traffic:
                steps.train_step(parts, _batch(config), steps.Rates(1e-4, 0.01), step=0)
                parts.engine.finish_update()
    finally:
        steps.run = run
    devices = {one.device.type for unit in parts.engine.units.values() for one in [unit.weights.full]}
    return {"inside": traffic.inside, "outside": traffic.outside, "weights_on": sorted(devices)}


def _batch(config: RunConfig) -> Samples:
    shape = config.train.global_batch_size, config.model.seq_length
    tokens, mask = torch.zeros(shape, dtype=torch.int64), torch.ones(shape)
    if config.model.traits.samples == "tokens":
        return GPTBatch(tokens, tokens.clone(), mask)
    pairs = torch.zeros(shape[0], dtype=torch.int64)
    return BertBatch(tokens, tokens.clone(), mask, tokens.clone(), mask.bool(), pairs)


if __name__ == "__main__":
    main()
