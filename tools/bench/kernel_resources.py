"""Registers, shared memory and spills of every Triton kernel at the launches of real models, without a GPU:

    python -m tools.bench.kernel_resources                            # all models, sm_80, sm_90 and sm_100
    python -m tools.bench.kernel_resources llama-8b --arch 90 --json out.json

A training step of one layer of each model runs on a fake GPU (`fake_gpu.py`); each different launch is compiled to
machine code, with the compile-time constants, alignments and types that it has there, and the code says what it needs.
Registers and spilled bytes are those of one thread, shared memory that of a block of threads. Spilled bytes are local
memory of any use; a kernel that takes more than 255 registers has them.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from megatron3d_kernels.launch import TRITON
from torch import Tensor

from tools.bench.fake_gpu import FakeGpu
from tools.bench.gpu_count import Case, config_of

ARCHITECTURES = (80, 90, 100)
_DROPOUT = "--hidden-dropout 0.1 --attention-dropout 0.1 --seq-length 2048"
MODELS = {
    "gpt-1.3b": Case("gpt3-1.3b", _DROPOUT, 1, 1),
    "llama-8b": Case("llama3-8b", "--qk-layernorm --seq-length 4096", 1, 1),
    "llama-8b fp8": Case("llama3-8b", "--fp8-format hybrid --seq-length 4096", 1, 1),
    "llama-8b fp8 blocks": Case("llama3-8b", "--fp8-format e4m3 --fp8-recipe blockwise --seq-length 4096", 1, 1),
    "llama-70b": Case("llama3-70b", "--qk-layernorm --seq-length 4096", 1, 1),
    "gpt-175b": Case("gpt3-175b", _DROPOUT, 1, 1),
}
_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}
_TYPES |= {torch.int32: "*i32", torch.uint8: "*u8", torch.bool: "*i1", torch.float8_e4m3fn: "*fp8e4nv"}
_TYPES |= {torch.float8_e5m2: "*fp8e5"}
_OLDEST_WITH_FP8 = 89
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


@dataclass(frozen=True)
class Launch:
    """One different launch: the kernel's name, the function, Triton's types and constants, the places of arguments that
    are multiples of 16, and options of the compiler."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, object]
    aligned: tuple[int, ...]
    options: dict[str, int]

    def runs_on(self, architecture: int) -> bool:
        """Whether it has numbers for all dtypes."""
        return architecture >= _OLDEST_WITH_FP8 or not any("fp8" in kind for kind in self.signature.values())

    @property
    def label(self) -> str:
        """What distinguishes it from other launches of the kernel: dtypes of tensors, constants, warps."""
        tensors = dict.fromkeys(kind[1:] for kind in self.signature.values() if kind.startswith("*"))
        settings = [f"{name}={_short(value)}" for name, value in self.constants.items() if name.isupper()]
        return ", ".join([*tensors, *settings, f"{self.options.get('num_warps', 4)} warps"])


@dataclass(frozen=True)
class Resources:
    """What the machine code of a launch takes on one architecture."""

    model: str
    kernel: str
    launch: str
    architecture: int
    registers: int
    shared_bytes: int
    spilled_bytes: int


def main() -> None:
    """Compile the launches of the models that are asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[], help=f"of {', '.join(MODELS)}; default all")
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES, help="default all")
    parser.add_argument("--launches", action="store_true", help="a line for each launch, not the most of each kernel")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args()
    unknown = [name for name in args.models if name not in MODELS]
    if unknown:
        parser.error(f"there is no model {unknown[0]!r}; the models are {', '.join(MODELS)}")
    if not TRITON.installed or TRITON.interpreted:
        parser.error(f"kernels are compiled by Triton without TRITON_INTERPRET, and here is: {TRITON.detail}")
    gpu, rows, seen = FakeGpu(), [], set()
    for model in args.models or MODELS:
        fresh = [one for one in launches_of(gpu, MODELS[model]) if (one.name, one.label) not in seen]
        seen |= {(one.name, one.label) for one in fresh}
        archs = args.arch or ARCHITECTURES
        rows += [resources(model, one, arch) for one in fresh for arch in archs if one.runs_on(arch)]
    print(table(rows if args.launches else most_of_each_kernel(rows)))
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    gpu.leave()


def launches_of(gpu: FakeGpu, case: Case) -> list[Launch]:
    """The different launches of a step with one layer, in the order of their first use."""
    found: dict[str, Launch] = {}

    def note(kernel: Any, arguments: tuple[object, ...], constants: dict[str, Any]) -> None:
        launch = _launch(kernel, arguments, constants)
        found.setdefault(f"{launch.name} {launch.signature} {launch.constants} {launch.aligned}", launch)

    gpu.on_launch = note
    gpu.step(config_of(case, 1, 1, ""))
    return list(found.values())


def _launch(kernel: Any, arguments: tuple[object, ...], constants: dict[str, Any]) -> Launch:
    options = {name: value for name, value in constants.items() if name in _OPTIONS}
    given = dict(zip(kernel.arg_names, arguments))
    # Triton's launcher makes an integer that is 1 a compile-time constant, and None.
    known: dict[str, object] = {
        name: value for name, value in given.items() if value is None or (type(value) is int and value == 1)
    }
    known |= {name: value for name, value in constants.items() if name not in _OPTIONS}
    signature = {name: _type(value) for name, value in given.items()} | dict.fromkeys(known, "constexpr")
    ordered = {name: signature[name] for name in kernel.arg_names}
    aligned = tuple(
        place for place, name in enumerate(kernel.arg_names) if name not in known and _is_aligned(given[name])
    )
    name = f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__.strip('_')}"
    return Launch(name, kernel, ordered, known, aligned, options)


def _type(argument: object) -> str:
    if isinstance(argument, Tensor):
        return _TYPES[argument.dtype]
    if isinstance(argument, float):
        return "fp32"
    return "i64" if isinstance(argument, int) and not -(1 << 31) <= argument < 1 << 31 else "i32"


def _is_aligned(argument: object) -> bool:
    """Tensors of torch's allocator begin at multiples of 512 bytes, and their parts at whole rows."""
    if isinstance(argument, Tensor):
        return argument.storage_offset() * argument.element_size() % 16 == 0
    return isinstance(argument, int) and argument % 16 == 0


def resources(model: str, launch: Launch, architecture: int) -> Resources:
    """Compile a launch for one architecture, and read what its machine code takes."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attributes = {(place,): [["tt.divisibility", 16]] for place in launch.aligned}
    source = ASTSource(launch.kernel, launch.signature, constexprs=launch.constants, attrs=attributes)
    binary = compile_kernel(source, target=GPUTarget("cuda", architecture, 32), options=launch.options)
    used = _resource_usage(binary.asm["cubin"])
    shared = binary.metadata.shared
    return Resources(model, launch.name, launch.label, architecture, used["REG"], shared, used["STACK"] + used["LOCAL"])


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """What `cuobjdump`, which comes with Triton, says of the kernel in a file: REG, STACK, SHARED, LOCAL ..."""
    spec = find_spec("triton.backends.nvidia")
    assert spec is not None and spec.submodule_search_locations, "this Triton cannot compile for NVIDIA GPUs"
    tool = Path(next(iter(spec.submodule_search_locations)), "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", printed)}
    assert {"REG", "STACK", "LOCAL"} <= set(found), f"cuobjdump does not say what the kernel takes: {printed[:300]}"
    return found


def most_of_each_kernel(rows: Iterable[Resources]) -> list[Resources]:
    """The most registers, shared memory and spills of any launch of a kernel in a model, on each architecture."""
    found: dict[tuple[str, str, int], list[Resources]] = {}
    for row in rows:
        found.setdefault((row.model, row.kernel, row.architecture), []).append(row)
    return [
        Resources(
            model,
            kernel,
            f"{len(of_kernel)} different",
            architecture,
            max(one.registers for one in of_kernel),
            max(one.shared_bytes for one in of_kernel),
            max(one.spilled_bytes for one in of_kernel),
        )
        for (model, kernel, architecture), of_kernel in found.items()
    ]


def table(rows: Iterable[Resources]) -> str:
    """Markdown: registers, shared bytes and spilled bytes by architecture."""
    rows = list(rows)
    archs = sorted({row.architecture for row in rows})
    by_launch: dict[tuple[str, str, str], dict[int, Resources]] = {}
    for row in rows:
        by_launch.setdefault((row.model, row.kernel, row.launch), {})[row.architecture] = row
    head = ["model", "kernel", "launch", *(f"sm_{arch}: registers, shared, spilled" for arch in archs)]
    lines = ["| " + " | ".join(head) + " |", "|---" * 3 + "|---:" * len(archs) + "|"]
    for key, found in by_launch.items():
        cells = [_cell(found.get(arch)) for arch in archs]
        lines.append("| " + " | ".join([*key, *cells]) + " |")
    return "\n".join(lines)


def _cell(one: Resources | None) -> str:
    return "does not run" if one is None else f"{one.registers}, {one.shared_bytes:,}, {one.spilled_bytes}"


def _short(value: object) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    main()
