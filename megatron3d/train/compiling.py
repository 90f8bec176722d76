"""`--compile`: what lies between the products of a block as kernels that torch.compile makes.

A block's norms, activations, rotary embedding, dropout and sums are traced, fused and differentiated by torch. Linear
layers, collectives, the attention core and experts stay as they are: their backward adds to gradient buffers,
communicates, or reads weights that come and go, which a compiler may not move. `LayerContext.eager` calls them, and a
graph ends and the next begins at each such call. Blocks with the same code, shapes and options share their graphs,
since whatever differs between layers and steps (numbers of layers, random keys) is read inside these calls.

Inside a graph every kernel is its definition in plain torch (`megatron3d_kernels`), which torch fuses with what is
around it; neither the reference for a CPU nor the Triton kernel runs there.

The memory plan does not know the graphs: torch chooses what they keep for the backward.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from megatron3d_kernels.launch import TRITON, TritonSupport
from torch import nn

from megatron3d.errors import ConfigError
from megatron3d.models.stage import Stage
from megatron3d.tensor.context import EagerCall, call

LEAST_TORCH = (2, 12)
"""torch 2.11 compiled a gated activation whose gradients were wrong, without an error."""
VARIANTS = 8
"""Compilations of one kind of block that are let pass: training and evaluation, and the last batch of a data set."""


def require_compiler(
    device: torch.device, *, version: str = torch.__version__, support: TritonSupport = TRITON
) -> None:
    """Raises: ConfigError where torch is too old, or has no compiler for the device."""
    import torch._inductor.cpp_builder as builder
    from torch._inductor.exc import InvalidCxxCompiler

    if tuple(int(part) for part in version.split(".")[:2]) < LEAST_TORCH:
        raise ConfigError(
            f"--compile needs torch {LEAST_TORCH[0]}.{LEAST_TORCH[1]} or newer, and this is {version}, whose compiler "
            "was seen to give wrong gradients; install a newer one, or leave --compile out."
        )
    if device.type == "cuda":
        if not support.installed or support.interpreted:
            why = "it is in its interpreter (TRITON_INTERPRET)" if support.installed else support.detail
            raise ConfigError(f"--compile needs Triton on {device}, but {why}; install it, or leave --compile out.")
        return
    try:
        builder.get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ConfigError(
            f"--compile on {device} needs a C++ compiler, and neither the variable CXX nor PATH leads to one; install "
            "g++, or leave --compile out."
        ) from None


def eager_call(*, compiles: bool) -> EagerCall:
    """How layers call what stays outside of graphs."""
    return cast(EagerCall, torch.compiler.disable(call)) if compiles else call


@dataclass
class CompiledBlocks:
    """The compiled blocks of one rank's stages, and what compiling them took until now.

    Attributes:
        num_layers: blocks in all.
        num_kinds: those that differ in code, shapes or options; blocks of one kind share their graphs.
    """

    num_layers: int
    num_kinds: int
    _seconds: float = field(default=0.0, init=False)
    _began_s: float = field(default=0.0, init=False)
    _graphs_before: int = field(default=0, init=False)
    _graphs_reported: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Start to count."""
        self._graphs_before = _graphs_in_process()

    @property
    def num_graphs(self) -> int:
        """Graphs that were compiled."""
        return _graphs_in_process() - self._graphs_before

    def began(self, _: Any) -> None:
        """torch begins to compile."""
        self._began_s = time.monotonic()

    def ended(self, _: Any) -> None:
        """torch has compiled."""
        self._seconds += time.monotonic() - self._began_s

    def news(self, step: int) -> list[str]:
        """What was compiled since it was last asked, as lines."""
        graphs, seconds = self.num_graphs - self._graphs_reported, self._seconds
        if graphs == 0:
            return []
        is_first, self._graphs_reported, self._seconds = self._graphs_reported == 0, self.num_graphs, 0.0
        if is_first:
            kinds = "1 kind" if self.num_kinds == 1 else f"{self.num_kinds} kinds"
            layers = "1 layer" if self.num_layers == 1 else f"{self.num_layers} layers"
            return [f"compiled {kinds} of block for {layers}, {graphs} graphs in {seconds:.1f} s, until step {step}"]
        return [f"compiled {graphs} more graphs in {seconds:.1f} s, until step {step}: evaluation, or other shapes"]


def compile_blocks(stages: Iterable[Stage], *, backend: str = "inductor") -> CompiledBlocks:
    """Let the blocks of stages, which call by `eager_call`, be compiled when they first run.

    A block that would be compiled too often ends the run (`compile_failed.py`) instead of running slowly.

    Args:
        stages: all of this rank.
        backend: of torch.compile; "aot_eager" traces and differentiates alike and makes no code.
    """
    import torch._dynamo.config as settings
    from torch._dynamo.callback import callback_handler

    blocks = [block for stage in stages for block in stage.layers.values()]
    compiled = CompiledBlocks(len(blocks), len({_kind(block) for block in blocks}))
    settings.nested_graph_breaks = True  # a call deep inside a block ends one graph, not one in each caller as well
    settings.fail_on_recompile_limit_hit = True
    settings.recompile_limit = VARIANTS * max(1, compiled.num_kinds)
    callback_handler.register_start_callback(compiled.began)
    callback_handler.register_end_callback(compiled.ended)
    for block in blocks:
        block.compile(backend=backend, dynamic=False)
    return compiled


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """What blocks must have in common to share their graphs: code, switches, and sizes of parameters."""
    modules = tuple(
        (name, type(module), tuple((key, value) for key, value in vars(module).items() if isinstance(value, bool)))
        for name, module in block.named_modules()
    )
    parameters = tuple((name, one.shape, one.requires_grad) for name, one in block.named_parameters())
    return modules, parameters


def _graphs_in_process() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]
