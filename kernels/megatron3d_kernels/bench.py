"""Measure the kernels: `python -m megatron3d_kernels.bench [--device cuda] [--dtype bfloat16]`.

On CUDA the table gives milliseconds of reference and Triton and their ratio, from one run on one machine; on CPU, where
Triton is not used, the references alone. "fwd+bwd" includes the backward pass with all gradients. Repetitions use the
same inputs, so small shapes are measured in the cache; the default shape is a layer of an 8B Llama.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from megatron3d_kernels.adam import AdamStep, AdamTensors
from megatron3d_kernels.registry import Registry

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
WARMUPS = 3


@dataclass(frozen=True)
class Shape:
    """Sizes of the measured layer: rows = tokens in a micro-batch."""

    rows: int
    hidden: int
    ffn: int
    heads: int
    vocabulary: int


@dataclass(frozen=True)
class Measurement:
    """One line of the table; `run(registry)` makes the action to be timed."""

    name: str
    size: str
    run: Callable[[Registry], Callable[[], object]]


def main(arguments: list[str] | None = None) -> None:
    """Print the table for the command line `arguments`."""
    parser = argparse.ArgumentParser(prog="python -m megatron3d_kernels.bench", description="Time the kernels.")
    default_device = "cuda" if torch.accelerator.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default_device)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--rows", type=int, default=4096, help="tokens in a micro-batch")
    parser.add_argument("--hidden", type=int, default=4096, help="hidden size, H")
    parser.add_argument("--ffn", type=int, default=14336, help="width inside the MLP, F")
    parser.add_argument("--heads", type=int, default=32, help="attention heads; must divide the hidden size")
    parser.add_argument("--vocabulary", type=int, default=128256, help="columns of the logits")
    parser.add_argument("--repeats", type=int, default=20, help="timed repetitions; the median is shown")
    options = parser.parse_args(arguments)
    if options.heads < 1 or options.hidden % options.heads:
        parser.error(f"--heads {options.heads} does not divide --hidden {options.hidden}; choose a divisor.")
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats} measures nothing; use 1 or more.")
    shape = Shape(options.rows, options.hidden, options.ffn, options.heads, options.vocabulary)
    for line in table(shape, torch.device(options.device), DTYPES[options.dtype], repeats=options.repeats):
        print(line, flush=True)


def table(shape: Shape, device: torch.device, dtype: torch.dtype, *, repeats: int) -> Iterator[str]:
    """Lines of the table, each as soon as it is measured."""
    choice = Registry().choose("rms_norm", device.type, dtype)
    compares = choice.implementation == "triton"
    yield f"{device.type}, {str(dtype).removeprefix('torch.')}, median of {repeats}; default: {choice.implementation}"
    if not compares:
        yield f"Triton is not used here: {choice.reason}. Times of the references alone:"
    header = f"{'kernel':<34}{'size':<20}{'reference ms':>14}"
    yield header + (f"{'triton ms':>12}{'ref/triton':>12}" if compares else "")
    for measurement in measurements(shape, device, dtype):
        reference = median_ms(measurement.run(Registry("reference")), device, repeats)
        line = f"{measurement.name:<34}{measurement.size:<20}{reference:>14.3f}"
        if compares:
            triton = median_ms(measurement.run(Registry("triton")), device, repeats)
            line += f"{triton:>12.3f}{reference / triton:>11.2f}x"
        yield line


def median_ms(action: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median wall time of `action` in milliseconds, the device's queue empty before and after."""
    times = []
    for repeat in range(WARMUPS + repeats):
        wait(device)
        start = time.perf_counter()
        action()
        wait(device)
        if repeat >= WARMUPS:
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2] * 1e3


def wait(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def measurements(shape: Shape, device: torch.device, dtype: torch.dtype) -> Iterator[Measurement]:
    """What is timed; the inputs of one line live only while that line is measured."""
    hidden_size = f"[{shape.rows}, {shape.hidden}]"
    x = _leaf((shape.rows, shape.hidden), device, dtype)
    weight, bias = (_leaf((shape.hidden,), device, dtype) for _ in range(2))
    yield from _both("layer_norm", hidden_size, lambda r: lambda: r.layer_norm(x, weight, bias), [x, weight, bias])
    yield from _both("rms_norm", hidden_size, lambda r: lambda: r.rms_norm(x, weight), [x, weight])
    gate_up = _leaf((shape.rows, 2 * shape.ffn), device, dtype)
    yield from _both("swiglu", f"[{shape.rows}, 2*{shape.ffn}]", lambda r: lambda: r.swiglu(gate_up), [gate_up])
    size = shape.hidden // shape.heads
    q_BNSD = _leaf((shape.rows, 1, shape.heads, size), device, dtype).detach().permute(1, 2, 0, 3).requires_grad_()
    angles = torch.rand(shape.rows, size // 2, device=device)
    rotate = lambda r: lambda: r.apply_rotary(q_BNSD, angles, angles)  # noqa: E731
    yield from _both("rotary", f"[1, {shape.heads}, {shape.rows}, {size}]", rotate, [q_BNSD])
    flat = [torch.rand(shape.hidden * shape.hidden, device=device) for _ in range(4)]
    tensors, step = AdamTensors(*flat, flat[0].to(dtype)), AdamStep(1e-4, 0.1, 0.9, 0.95, 1e-8, 2, grad_scale=0.5)
    yield Measurement("adam", f"[{flat[0].numel()}]", lambda r: lambda: r.adam([tensors], step))
    yield from _cross_entropy(shape, device, dtype)


def _cross_entropy(shape: Shape, device: torch.device, dtype: torch.dtype) -> Iterator[Measurement]:
    """The two pieces, one after the other."""
    logits = torch.randn(shape.rows, shape.vocabulary, device=device, dtype=dtype)
    target = torch.randint(0, shape.vocabulary, (shape.rows,), device=device)
    largest, total = logits.amax(-1).float(), torch.full((shape.rows,), float(shape.vocabulary), device=device)
    size, shard = f"[{shape.rows}, {shape.vocabulary}]", (0, shape.vocabulary)
    yield Measurement("cross_entropy sums", size, lambda r: lambda: r.local_softmax_sums(logits, target, *shard))
    # In place on a buffer of its own, which after the first repetition holds gradients: the work is the same.
    grad = logits.clone()
    yield Measurement(
        "cross_entropy backward, in place",
        size,
        lambda r: (
            lambda: r.cross_entropy_backward(
                grad, target, largest, total, total, total, vocab_start=0, num_valid=shape.vocabulary, in_place=True
            )
        ),
    )


def _both(
    name: str, size: str, forward: Callable[[Registry], Callable[[], torch.Tensor]], inputs: list[torch.Tensor]
) -> Iterator[Measurement]:
    """Forward without autograd, then forward and backward with a given output gradient."""

    def without_autograd(registry: Registry) -> Callable[[], object]:
        return torch.no_grad()(forward(registry))

    def with_backward(registry: Registry) -> Callable[[], object]:
        action = forward(registry)
        with torch.no_grad():
            grad = torch.ones_like(action())
        return lambda: torch.autograd.grad(action(), inputs, grad)

    yield Measurement(f"{name} fwd", size, without_autograd)
    yield Measurement(f"{name} fwd+bwd", size, with_backward)


def _leaf(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers that take a gradient."""
    return torch.randn(shape, device=device, dtype=dtype).requires_grad_()


if __name__ == "__main__":
    main()
