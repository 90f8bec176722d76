"""Counts what a training step asks of a GPU, without one, and estimates the time of an H100 from it:

    python -m tools.bench.gpu_count                       # all cases, as Markdown
    python -m tools.bench.gpu_count gpt-1.3b --kinds      # one, with every kind of kernel
    python -m tools.bench.gpu_count llama-8b --flags "--qk-layernorm --zero-stage 3" --json out.json

Steps of one process with 1 and 2 layers, and of 1 and 2 micro-batches, run on tensors without memory (`fake_gpu.py`
says what counts as a kernel, as bytes, as a read); differences between them are what one layer takes for one
micro-batch, and what the end of a step takes. "In place once" counts what a Triton kernel reads and writes in place
once, all else alike. `gpu_estimate.py` has the arithmetic. Runs on a CPU in seconds.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron3d.config.check import resolve
from megatron3d.config.cli import parse_args
from megatron3d.config.run import RunConfig
from megatron3d.models.flops import flops_per_step, layer_flops
from tools.bench.fake_gpu import ATTENTION, PRODUCT, FakeGpu
from tools.bench.gpu_estimate import PEAK, StepParts, Tally, machines


@dataclass(frozen=True)
class Case:
    """A model with its options, and the layers and micro-batches of the step that is estimated."""

    preset: str
    flags: str
    layers: int
    micro_batches: int


_NO_DROPOUT = "--hidden-dropout 0 --attention-dropout 0"
CASES = {
    "gpt-1.3b": Case("gpt3-1.3b", _NO_DROPOUT, 24, 8),
    "gpt-1.3b dropout": Case("gpt3-1.3b", "--hidden-dropout 0.1 --attention-dropout 0.1", 24, 8),
    "llama-8b": Case("llama3-8b", "", 8, 4),
    "llama-8b bf16-gradients": Case("llama3-8b", "--grad-reduce-in-bf16", 8, 4),
    "llama-8b qk-norm": Case("llama3-8b", "--qk-layernorm", 8, 4),
    "llama-8b fp8": Case("llama3-8b", "--fp8-format hybrid", 8, 4),
    "llama-8b fp8, wgrad in bf16": Case("llama3-8b", "--fp8-format hybrid --no-fp8-wgrad", 8, 4),
}


@dataclass(frozen=True)
class Counted:
    """One case: the parts of its step, what the host waited for in a step, and its model with all its layers."""

    config: RunConfig
    case: Case
    parts: StepParts
    reads: list[str]
    reads_inside: list[str]
    layer_parameters: int


def main() -> None:
    """Count the cases that are asked for and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=[], help=f"of {', '.join(CASES)}; default all")
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--flags", default="", help="more options of pretrain_gpt.py, for every case")
    parser.add_argument("--kinds", action="store_true", help="every kind of kernel of a layer and of the step's end")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    unknown = [name for name in args.cases if name not in CASES]
    if unknown:
        parser.error(f"there is no case {unknown[0]!r}; the cases are {', '.join(CASES)}")
    gpu = FakeGpu()
    more = f"--seq-length {args.seq_length} --micro-batch-size {args.micro_batch_size} {args.flags}"
    counted = {name: count(gpu, CASES[name], more) for name in args.cases or CASES}
    print_tables(counted, kinds=args.kinds)
    if args.json:
        args.json.write_text(json.dumps({name: figures(one) for name, one in counted.items()}, indent=1) + "\n")
    gpu.leave()


def count(gpu: FakeGpu, case: Case, more: str = "") -> Counted:
    """Run the four steps of a case; `more` are further options."""
    steps, parameters, traffic = {}, {}, None
    for layers, micro_batches in ((1, 1), (1, 2), (2, 1), (2, 2)):
        traffic, setup = gpu.step(config_of(case, layers, micro_batches, more))
        steps[layers, micro_batches] = Tally.of(traffic.kernels)
        parameters[layers] = sum(unit.layout.length for unit in setup.engine.units.values())
    config = config_of(case, case.layers, case.micro_batches, more)
    assert traffic is not None
    reads, inside = traffic.reads(), traffic.reads(inside=True)
    return Counted(config, case, StepParts.of(steps), reads, inside, parameters[2] - parameters[1])


def config_of(case: Case, layers: int, micro_batches: int, more: str) -> RunConfig:
    """The resolved run of one process, bf16."""
    argv = (
        f"--preset {case.preset} --num-layers {layers} {case.flags} --micro-batch-size 1 --train-iters 1 --lr 1e-4 "
        f"--mock-data --bf16 --device cuda {more}"
    ).split()
    micro_batch_size = int(argv[len(argv) - argv[::-1].index("--micro-batch-size")])
    argv += ["--global-batch-size", str(micro_batches * micro_batch_size)]
    if "--seq-length" in argv:
        argv += ["--max-position-embeddings", argv[len(argv) - argv[::-1].index("--seq-length")]]
    return resolve(parse_args(argv, program="gpu_count", description=""), 1)


def figures(one: Counted) -> dict[str, Any]:
    """What the tables show, as numbers."""
    layer, model = one.parts.layer, one.config.model
    tokens = one.config.train.micro_batch_size * model.seq_length
    of_layer = layer_flops(model)[0].of([model.seq_length] * one.config.train.micro_batch_size)
    of_step = flops_per_step(model, tokens * one.case.micro_batches)
    step = one.parts.step(one.case.layers, one.case.micro_batches)
    estimates = {}
    for name, machine in machines(model.hidden_size).items():
        parts = layer.seconds(machine)
        estimates[name] = {
            "layer_ms": {part: round(1e3 * seconds, 3) for part, seconds in parts.items()},
            "layer_mfu": round(100 * of_layer / sum(parts.values()) / PEAK, 1),
            "step_mfu": round(100 * of_step / sum(step.seconds(machine).values()) / PEAK, 1),
        }
    return {
        "kernels": layer.launched,
        "elementwise_mb": round(layer.elementwise_bytes / 1e6),
        "elementwise_mb_in_place_once": round((layer.elementwise_bytes - sum(layer.in_place.values())) / 1e6),
        "product_tflop": round(layer.operations_of(PRODUCT) / 1e12, 3),
        "attention_tflop": round(layer.operations_of(ATTENTION) / 1e12, 3),
        "micro_batch_kernels": one.parts.micro_batch.launched,
        "micro_batch_elementwise_mb": round(one.parts.micro_batch.elementwise_bytes / 1e6),
        "end_bytes_a_parameter": round(one.parts.layer_end.elementwise_bytes / one.layer_parameters, 1),
        "end_kernels_a_layer": one.parts.layer_end.launched,
        "reads": len(one.reads),
        "reads_inside": len(one.reads_inside),
        "estimates": estimates,
    }


def print_tables(counted: dict[str, Counted], *, kinds: bool) -> None:
    """Markdown: what was counted, and what follows from it."""
    found = {name: figures(one) for name, one in counted.items()}
    print(
        "Counted on a fake GPU, for each layer and micro-batch, forward and backward:\n\n"
        "| case | kernels | element-wise MB (in place once) | products TFLOP | attention TFLOP | "
        "beside layers: kernels, MB | "
        "end of step: bytes a parameter, kernels a layer | host reads a step (within micro-batches) |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|"
    )
    for name, one in found.items():
        moved = f"{one['elementwise_mb']:,} ({one['elementwise_mb_in_place_once']:,})"
        print(
            f"| {name} | {one['kernels']} | {moved} | {one['product_tflop']} | {one['attention_tflop']} | "
            f"{one['micro_batch_kernels']}, {one['micro_batch_elementwise_mb']:,} | "
            f"{one['end_bytes_a_parameter']}, {one['end_kernels_a_layer']} | {one['reads']} ({one['reads_inside']}) |"
        )
    print(
        "\nEstimated for one H100 SXM; MFU of 989.4 TFLOP/s:\n\n"
        "| case | ms a layer (mid): products + attention + element-wise + gaps | MFU of layers, low / mid / high | "
        "whole step, mid |\n|---|---|---:|---|"
    )
    for name, one in found.items():
        low, mid, high = (one["estimates"][rate] for rate in ("low", "mid", "high"))
        times, case = " + ".join(f"{value:.2f}" for value in mid["layer_ms"].values()), counted[name].case
        print(
            f"| {name} | {times} | {low['layer_mfu']:.0f} / {mid['layer_mfu']:.0f} / {high['layer_mfu']:.0f} % | "
            f"{mid['step_mfu']:.0f} % with {case.layers} layers, {case.micro_batches} micro-batches |"
        )
    for name, one in counted.items() if kinds else ():
        _print_kinds(f"{name}: each layer and micro-batch", one.parts.layer)
        _print_kinds(f"{name}: beside the layers, each micro-batch", one.parts.micro_batch)
        _print_kinds(f"{name}: end of the step, each layer", one.parts.layer_end)
        _print_kinds(f"{name}: end of the step, beside the layers", one.parts.end)
        print(f"\n{name}: the host reads {', '.join(f'{n} x {what}' for what, n in Counter(one.reads).items())}")


def _print_kinds(title: str, tally: Tally) -> None:
    print(f"\n{title}:\n\n| kernel | sort | launches | MB |\n|---|---|---:|---:|")
    for key, num_bytes in sorted(tally.num_bytes.items(), key=lambda item: -item[1]):
        if tally.kernels[key] or num_bytes:
            print(f"| {key[0]} | {key[1]} | {tally.kernels[key]} | {num_bytes / 1e6:,.1f} |")


if __name__ == "__main__":
    main()
