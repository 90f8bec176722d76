"""Times tensor-parallel layers whose collectives run beside their products, against whole ones, in the same processes.

    torchrun --nproc-per-node 2 -m tools.bench.tp_overlap
    torchrun --nproc-per-node 8 -m tools.bench.tp_overlap --device cuda --dtype bf16 --hidden 4096 --ffn 14336

Each turn is a forward and a backward of a column- and a row-parallel layer with sequence parallelism and without;
turns alternate, and a ratio is made within a round. Beside them stands the product alone, which no overlap can beat.
On a CPU the cores that multiply also move the bytes, so that a machine with as many ranks as cores has little to gain.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta

import torch

from megatron3d.comm.collectives import barrier
from megatron3d.comm.device import synchronize
from megatron3d.comm.join import join, leave
from megatron3d.comm.launch import read_launch
from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import Axis, Mesh, make_mesh
from megatron3d.params.grads import GradSink
from megatron3d.params.module import ParallelModule, declared_parameters
from megatron3d.params.spec import Init
from megatron3d.tensor.context import LayerContext
from megatron3d.tensor.linear import ColumnParallelLinear, RowParallelLinear
from tools.bench.rounds import speed_ratio, take_turns

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COLUMNS = "| sequence parallelism | products alone, ms | whole, ms | in chunks, ms | chunks to whole |"


@dataclass(frozen=True)
class Shape:
    """What is multiplied: [S, B, H] by [F, H] and back, F over all ranks together."""

    seq: int
    batch: int
    hidden: int
    ffn: int
    device: torch.device
    dtype: torch.dtype


def main() -> None:
    """Join the other ranks, time, and print a table on rank 0."""
    args = _parser().parse_args()
    launch = read_launch()
    device = torch.device("cpu") if args.device == "cpu" else torch.device("cuda", launch.local_rank)
    torch.set_num_threads(args.threads)
    join(launch, device, timeout=timedelta(minutes=5))
    mesh = make_mesh(Layout(tp=launch.world_size))
    shape = Shape(args.seq, args.batch, args.hidden, args.ffn, device, DTYPES[args.dtype])
    if launch.rank == 0:
        print(f"{args.dtype} on {args.device}, {launch.world_size} ranks, S {args.seq}, B {args.batch}, ", end="")
        print(f"H {args.hidden}, F {args.ffn}, {args.chunks} chunks\n\n{COLUMNS}\n|---|---:|---:|---:|---:|")
    for sequence_parallel in (True, False):
        row = _row(shape, mesh, sequence_parallel, args)
        if launch.rank == 0:
            print(row, flush=True)
    leave()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--threads", type=int, default=1, help="that multiply on a rank, on a CPU")
    for name, value in (("seq", 512), ("batch", 2), ("hidden", 768), ("ffn", 3072), ("chunks", 4), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=value)
    return parser


def _row(shape: Shape, mesh: Mesh, sequence_parallel: bool, args: argparse.Namespace) -> str:
    whole = LayerContext(mesh.tp, sequence_parallel, GradSink())
    alone = LayerContext(Axis("alone", 1, 0, (mesh.rank,), None, mesh.meter), False, GradSink())
    contexts = {"alone": alone, "whole": whole, "chunks": replace(whole, overlap_chunks=args.chunks)}
    turns = {name: _turn(shape, context, mesh) for name, context in contexts.items()}
    for turn in turns.values():
        turn()
    seconds, _ = take_turns(turns, args.rounds)
    shown = " | ".join(f"{1e3 * sorted(each)[len(each) // 2]:.3g}" for each in seconds.values())
    ratio = speed_ratio(seconds["chunks"], seconds["whole"])
    return f"| {'with' if sequence_parallel else 'without'} | {shown} | {ratio} |"


def _turn(shape: Shape, context: LayerContext, mesh: Mesh) -> Callable[[], float]:
    """A forward and a backward of a pair of layers; where the axis has one rank, of the shard of one of all ranks."""
    ffn, tp = shape.ffn // (mesh.tp.size // context.tp.size), context.tp
    up = ColumnParallelLinear(context, shape.hidden, ffn, bias=False, init=Init("normal", 0.02))
    down = RowParallelLinear(context, ffn, shape.hidden, bias=False, init=Init("normal", 0.02))
    for layer in (up, down):
        _allocate(layer, shape, context)
    length = shape.seq // tp.size if context.sequence_parallel else shape.seq
    x = torch.randn(length, shape.batch, shape.hidden, device=shape.device, dtype=shape.dtype, requires_grad=True)

    def turn() -> float:
        barrier(mesh.tp)
        synchronize(shape.device)
        start = time.perf_counter()
        y = down(up(x))
        y.backward(torch.ones_like(y))
        synchronize(shape.device)
        return time.perf_counter() - start

    return turn


def _allocate(layer: ParallelModule, shape: Shape, context: LayerContext) -> None:
    """Random weights, whose gradients go to buffers as in a training step."""
    for one in declared_parameters(layer).values():
        size = one.spec.local_shape(context.tp.size)
        weight = torch.nn.Parameter(torch.randn(size, device=shape.device, dtype=shape.dtype) * 0.02)
        one.owner.register_parameter(one.attribute, weight)
        context.sink.bind(weight, torch.zeros(size, device=shape.device, dtype=torch.float32), lambda: None)


if __name__ == "__main__":
    main()
