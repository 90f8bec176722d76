"""The parts of `gpu_check.py`: each looks at one thing on a device and yields what it finds, one finding a line.

    python -m tools.bench.gpu_parts equal sync --out DIR      # some parts in this process, without time limits

A finding with "error", or with "ok" false, is a failure; the last line of a part says whether it had any.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron3d_kernels import Registry, products
from torch.nn.attention import SDPBackend
from torch.profiler import ProfilerActivity, profile

from megatron3d.comm.device import device_name, synchronize
from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.config.check import resolve
from megatron3d.config.cli import parse_args
from megatron3d.config.run import RunConfig
from megatron3d.data.batch import GPTBatch
from megatron3d.models.flops import flops_per_step, peak_tflops
from megatron3d.models.gpt import build_gpt_stage
from megatron3d.train.setup import TrainingSetup, build_parts
from megatron3d.train.step import Rates, train_step
from tools.bench.gpu_options import add_options

ROOT = Path(__file__).resolve().parents[2]
PEAK_TFLOPS = 989.4  # dense bf16 of an H100 SXM (NVIDIA's data sheet), beside that of the device itself
TOLERANCE = 2e-4  # of losses and norms in fp32, CPU against GPU: both sum in fp32, in different orders
MOST_WORKERS = 8  # processes of the kernels' cases; each has a CUDA context of its own
WAIT_WARNING = "called a synchronizing"  # what torch's warning of a wait for a GPU says
BF16_TOLERANCE = 5e-2  # of other roundings than those of plain bf16: of fp8, and of fused operations
GPT = "--num-layers {L} --hidden-size {H} --num-attention-heads {N} --vocab-size {V}"
LLAMA = (
    f"{GPT} --ffn-hidden-size {{FF}} --group-query-attention --num-query-groups {{G}} --swiglu "
    "--normalization RMSNorm --position-embedding-type rope --untie-embeddings-and-output-weights --disable-bias-linear"
)
SMALL = {"L": 2, "H": 128, "N": 4, "FF": 352, "G": 2, "V": 1000}
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
EQUAL_CASES = {
    "gpt": (GPT, ""),
    "llama": (LLAMA, ""),
    "gpt recomputed": (GPT, FULL),
    "gpt zero 3": (GPT, "--zero-stage 3"),
    "gpt offload": (GPT, "--zero-stage 1 --offload-optimizer cpu"),
    "gpt zero 3 on the host": (GPT, "--zero-stage 3 --offload-optimizer cpu --offload-params cpu"),
    "llama qk-norm": (LLAMA, "--qk-layernorm"),
    "gpt muon": (GPT, "--optimizer muon"),
    "gpt hidden dropout": (GPT, "--hidden-dropout 0.1"),
}
Finding = dict[str, object]


@dataclass(frozen=True)
class Check:
    """What the parts share: the device, whether models are tiny, steps of a timing, and where profiles go."""

    device: torch.device
    tiny: bool
    steps: int
    out: Path

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU to look at."""
        return self.device.type == "cuda"

    def clear_peak(self) -> None:
        """Forget what earlier models took."""
        gc.collect()
        if self.on_gpu:
            torch.accelerator.empty_cache()
            torch.accelerator.reset_peak_memory_stats()

    def peak_gib(self) -> float | None:
        """The most that was allocated since; None on a CPU."""
        return round(torch.accelerator.max_memory_allocated() / 2**30, 2) if self.on_gpu else None


@dataclass(frozen=True)
class Shape:
    """Tokens of a sample, samples of a micro-batch, micro-batches of a step."""

    seq: int
    micro_batch: int
    num_microbatches: int


def main() -> None:
    """Run the parts that are asked for and print what they find; the exit code is 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=tuple(PARTS))
    add_options(parser)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.accelerator.is_available():
        show({"skipped": f"torch {torch.__version__} sees no GPU; --device cpu --tiny checks the script on a CPU"})
        return
    check = Check(torch.device("cuda:0" if args.device == "cuda" else args.device), args.tiny, args.steps, args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    if check.on_gpu:
        torch.accelerator.set_device_index(0)
    outcomes = [run_part(name, PARTS[name], check) for name in args.parts]
    sys.exit(0 if all(outcomes) else 1)


def run_part(name: str, part: Callable[[Check], Iterator[Finding]], check: Check) -> bool:
    """Print what a part finds; whether nothing failed."""
    began_s, is_ok = time.perf_counter(), True
    try:
        for finding in part(check):
            show({"part": name} | finding)
            is_ok = is_ok and "error" not in finding and finding.get("ok", True) is True
    except Exception as error:  # a check of a new machine reports what it can
        show({"part": name, "error": repr(error)[:400]})
        is_ok = False
    show({"part": name, "ok": is_ok, "seconds": round(time.perf_counter() - began_s, 1)})
    return is_ok


def show(finding: Finding) -> None:
    """One line."""
    print(json.dumps(finding, default=str), flush=True)


def build_model(
    flags: str, device: torch.device, shape: Shape, *, dropout: float = 0.0, more: str = ""
) -> tuple[RunConfig, TrainingSetup]:
    """The model of these flags in one process, ready to train on the device."""
    config = run_config(flags, shape, dropout=dropout, more=more)
    return config, build_parts(config, make_mesh(Layout()), device, build_gpt_stage)


def run_config(flags: str, shape: Shape, *, dropout: float = 0.0, more: str = "") -> RunConfig:
    """The resolved run of one process."""
    argv = (
        f"{flags} --seq-length {shape.seq} --max-position-embeddings {shape.seq} "
        f"--micro-batch-size {shape.micro_batch} --global-batch-size {shape.micro_batch * shape.num_microbatches} "
        f"--train-iters 1 --lr 1e-4 --mock-data --hidden-dropout {dropout} --attention-dropout {dropout} {more}"
    )
    return resolve(parse_args(argv.split(), program="gpu_check", description=""), 1)


def batch_of(config: RunConfig) -> GPTBatch:
    """A global batch of random tokens."""
    samples, seq = config.train.global_batch_size, config.model.seq_length
    numbers = torch.randint(config.model.vocab_size, (samples, seq + 1), generator=torch.Generator().manual_seed(0))
    return GPTBatch(numbers[:, :-1].contiguous(), numbers[:, 1:].contiguous(), torch.ones(samples, seq))


# --- Parts -------------------------------------------------------------------------------------------------------


def environment(check: Check) -> Iterator[Finding]:
    """Versions, the kernels that run, the attention kernel that torch picks for each kind of call."""
    yield {"torch": torch.__version__, "cuda": torch.version.cuda, "device": str(check.device)}
    if not check.on_gpu:
        return
    yield {
        "name": device_name(check.device),
        "cudnn": torch.backends.cudnn.version(),
        "kernels": Registry().explain(),
    }
    q = torch.randn(4096, 2, 32, 128, device=check.device, dtype=torch.bfloat16).permute(1, 2, 0, 3)
    mask = torch.ones(2, 1, 4096, 4096, dtype=torch.bool, device=check.device).tril()
    calls: dict[str, dict[str, Any]] = {
        "causal": {"is_causal": True},
        "causal with dropout": {"is_causal": True, "dropout_p": 0.1},
        "causal with grouped queries": {"is_causal": True, "enable_gqa": True},
        "mask": {"attn_mask": mask},
        "mask with grouped queries": {"attn_mask": mask, "enable_gqa": True},
    }
    for name, options in calls.items():
        k = q[:, :8] if "grouped" in name else q
        yield {"attention": name, "backend": str(SDPBackend(torch._fused_sdp_choice(q, k, k, **options)))}


def equality(check: Check) -> Iterator[Finding]:
    """Losses and gradient norms of three steps in fp32, on the device and on the CPU; dropout alike, whose masks come
    from counters."""
    for name in EQUAL_CASES:
        yield equal_case(check, name)
    if check.on_gpu:
        runs = [_numbers(check, GPT, check.device, dropout=0.1, more=f"--bf16 {more}") for more in ("", "", FULL)]
        yield {"dropout_repeats": runs[0] == runs[1], "ok": runs[0] == runs[1], "numbers": runs[0]}
        yield {"dropout_recomputed": runs[0] == runs[2], "ok": runs[0] == runs[2], "numbers": runs[2]}


def equal_case(check: Check, name: str) -> Finding:
    """What a case gives on the CPU and on the device; what one lacks does not hide the others."""
    flags, more = EQUAL_CASES[name]
    try:
        there, here = (_numbers(check, flags, device, more=more) for device in (torch.device("cpu"), check.device))
    except RuntimeError as error:
        return {"equal": name, "error": repr(error)[:300]}
    worst = max(abs(x - y) / abs(x) for x, y in zip(there, here, strict=True))
    return {"equal": name, "worst_relative": worst, "ok": worst < TOLERANCE}


def _numbers(check: Check, flags: str, device: torch.device, *, dropout: float = 0.0, more: str) -> list[float]:
    shape = Shape(32 if check.tiny else 256, 2, 2)
    config, parts = build_model(flags.format(**SMALL), device, shape, dropout=dropout, more=more)
    batch = batch_of(config)
    results = [train_step(parts, batch, Rates(1e-3, 0.01), step=step) for step in range(3)]
    return [number for result in results for number in (result.loss, result.grad_norm)]


def synchronisations(check: Check) -> Iterator[Finding]:
    """Which lines of a step wait for the device."""
    if not check.on_gpu:
        yield {"waits": 0, "why": "a CPU is never waited for"}
        return
    config, parts = build_model(GPT.format(**SMALL), check.device, Shape(256, 1, 4), more="--bf16")
    batch = batch_of(config)
    train_step(parts, batch, Rates(1e-4, 0.01), step=0)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        device = torch.get_device_module(check.device)
        device.set_sync_debug_mode("warn")
        train_step(parts, batch, Rates(1e-4, 0.01), step=1)
        device.set_sync_debug_mode("default")
    where = lines_that_wait(found)
    yield {"waits": len(where), "where": where, "ok": len(where) <= 1}  # a step reads its losses and norm once


def lines_that_wait(found: Iterable[warnings.WarningMessage]) -> list[str]:
    """The lines of torch's warnings about waits, of all warnings: the mode that makes them warns of itself."""
    return [f"{Path(one.filename).name}:{one.lineno}" for one in found if WAIT_WARNING in str(one.message)]


def kernels(check: Check) -> Iterator[Finding]:
    """Every kernel, dtype and odd size against fp64: what `pytest -m gpu tests/kernels` checks, without pytest."""
    sys.path.insert(0, str(ROOT))
    from tests.kernels.cases import CASES

    # A thousand forms of kernels are compiled, 0.15 s each on one core: too long for one process.
    workers = min(MOST_WORKERS, os.cpu_count() or 1) if check.on_gpu else 1
    for implementation in ("triton", "reference") if check.on_gpu else ("reference",):
        yield from kernel_cases(implementation, list(CASES), check.device, workers)


def kernel_cases(implementation: str, cases: Sequence[str], device: torch.device, workers: int) -> Iterator[Finding]:
    """What fails in these cases, each as soon as it is known, and at last how many hold, by so many processes."""
    outcome, passed, failed = partial(kernel_case, implementation, device), 0, 0
    with ExitStack() as stack:
        if workers > 1:  # by spawn: CUDA does not survive a fork
            pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
            outcomes = stack.enter_context(pool).map(outcome, cases)
        else:
            outcomes = map(outcome, cases)
        for held, failures in outcomes:
            passed, failed = passed + held, failed + len(failures)
            yield from failures
    yield {"implementation": implementation, "passed": passed, "failed": failed, "ok": passed > 0 and not failed}


def kernel_case(implementation: str, device: torch.device, case: str) -> tuple[int, list[Finding]]:
    """In how many dtypes a case holds, and what fails in the others."""
    sys.path.insert(0, str(ROOT))
    from tests.kernels.cases import CASES
    from tests.kernels.kernel_cases import DTYPES

    failures: list[Finding] = []
    for name, dtype in DTYPES.items():
        try:
            CASES[case](device, dtype, Registry(implementation))
        except Exception as error:  # one bad kernel does not hide the others
            failures.append(
                {"kernel": case, "implementation": implementation, "dtype": name, "error": str(error)[:160]}
            )
    return len(DTYPES) - len(failures), failures


def features(check: Check) -> Iterator[Finding]:
    """What a GPU may do in another way than the CPU: masks of dropout, fp32 sums of narrow products."""
    x = torch.ones(64, 1030, dtype=torch.bfloat16)
    keys = torch.arange(64) * 0x9E3779B97F4A7C1 + 5
    places = (torch.device("cpu"), check.device)
    on_cpu, here = (Registry().dropout(x.to(place), keys.to(place), 0.1).ne(0).cpu() for place in places)
    yield {"dropout_masks_equal": bool(on_cpu.equal(here)), "ok": bool(on_cpu.equal(here))}
    generator = torch.Generator().manual_seed(0)
    grad, right = (torch.randn(512, width, generator=generator).bfloat16() for width in (256, 128))
    total = torch.zeros(256, 128, device=check.device)
    for _ in range(2):
        Registry().add_weight_gradient(total, grad.to(check.device), right.to(check.device))
    wanted = 2 * (grad.double().t() @ right.double())
    off = float((total.cpu() - wanted).norm() / wanted.norm())
    inside = products.adds_in_fp32(check.device)
    yield {"weight_gradient_off": off, "summed_inside": inside, "ok": off < (1e-5 if inside else 1e-2)}
    yield from _beside_bf16(check, ("--compile", "--fp8-format hybrid") if check.on_gpu else ("--fp8-format hybrid",))


def _beside_bf16(check: Check, ways: tuple[str, ...]) -> Iterator[Finding]:
    """Losses and norms of three steps in each way against those of plain bf16; how near they are is its rounding."""
    plain = _numbers(check, LLAMA, check.device, more="--bf16")
    for way in ways:
        numbers = _numbers(check, LLAMA, check.device, more=f"--bf16 {way}")
        worst = max(abs(x - y) / abs(x) for x, y in zip(plain, numbers, strict=True))
        yield {"way": way, "worst_relative_to_bf16": worst, "ok": worst < BF16_TOLERANCE}


def utilisation(check: Check) -> Iterator[Finding]:
    """Tokens, FLOP/s and peak memory of a step, and a profile of the first of each model."""
    small = {"L": 24, "H": 2048, "N": 16, "V": 50257}
    large = {"L": 8, "H": 4096, "N": 32, "FF": 14336, "G": 8, "V": 128256}
    cases = [
        ("gpt-1.3b", GPT.format(**small), Shape(2048, 4, 4), 0.0, ""),
        ("gpt-1.3b", GPT.format(**small), Shape(4096, 1, 4), 0.0, ""),
        ("gpt-1.3b", GPT.format(**small), Shape(4096, 2, 4), 0.0, ""),
        ("gpt-1.3b dropout", GPT.format(**small), Shape(4096, 1, 4), 0.1, ""),
        ("llama-8b, 8 layers", LLAMA.format(**large), Shape(4096, 1, 4), 0.0, ""),
        ("llama-8b, 8 layers", LLAMA.format(**large), Shape(4096, 2, 4), 0.0, ""),
        ("llama-8b, 8 layers, bf16 gradients", LLAMA.format(**large), Shape(4096, 2, 4), 0.0, "--grad-reduce-in-bf16"),
        ("llama-8b, 8 layers, recomputed", LLAMA.format(**large), Shape(4096, 4, 2), 0.0, FULL),
    ]
    if check.tiny:
        cases = [("tiny", GPT.format(L=2, H=64, N=4, V=500), Shape(64, 1, 2), 0.0, "")]
    for name, flags, shape, dropout, more in cases:
        check.clear_peak()
        try:
            yield from _utilisation(check, name, flags, shape, dropout=dropout, more=more)
        except RuntimeError as error:  # a model too large for this card does not cost the others
            yield {"model": name, "error": repr(error)[:300]}


def _utilisation(check: Check, name: str, flags: str, shape: Shape, *, dropout: float, more: str) -> Iterator[Finding]:
    config, parts = build_model(flags, check.device, shape, dropout=dropout, more=f"--bf16 {more}")
    batch = batch_of(config)
    times = [step_seconds(check, parts, batch, step) for step in range(check.steps)]
    tokens = shape.micro_batch * shape.num_microbatches * shape.seq
    best = statistics.median(times[1:])
    tflops = flops_per_step(config.model, tokens) / best / 1e12
    yield {
        "model": name,
        "shape": vars(shape),
        "seconds": round(best, 4),
        "first": round(times[0], 2),
        "tokens_per_s": round(tokens / best),
        "tflops": round(tflops, 1),
        "mfu_percent_of_h100": round(100 * tflops / PEAK_TFLOPS, 1),
        "peak_tflops_of_this": peak_tflops(device_name(check.device), "bf16"),
        "peak_gib": check.peak_gib(),
    }
    if shape.micro_batch == 1 and not more and not dropout:
        yield _profile(check, name, best, lambda: step_seconds(check, parts, batch, 9))


def step_seconds(check: Check, parts: TrainingSetup, batch: GPTBatch, step: int) -> float:
    """The time of one step, until the device is done."""
    synchronize(check.device)
    began_s = time.perf_counter()
    train_step(parts, batch, Rates(1e-4, 0.01), step=step)
    synchronize(check.device)
    return time.perf_counter() - began_s


def _profile(check: Check, name: str, seconds: float, step: Callable[[], object]) -> Finding:
    """Write the table of the profiler and print how much of the step the device was idle."""
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if check.on_gpu else [])
    with profile(activities=kinds) as seen:
        step()
    key = "self_device_time_total" if check.on_gpu else "self_cpu_time_total"
    path = check.out / f"profile_{name.split(',')[0]}.txt"
    path.write_text(seen.key_averages().table(sort_by=key, row_limit=60, max_name_column_width=90))
    if not check.on_gpu:
        return {"profile": str(path)}
    events = [one for one in seen.events() or () if one.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(one.time_range.elapsed_us() for one in events) / 1e6
    top = sorted(seen.key_averages(), key=lambda one: -getattr(one, key))[:25]
    return {
        "profile": str(path),
        "kernels": len(events),
        "busy_s": round(busy, 4),
        "idle_share": round(1 - busy / seconds, 3),
        "top_ms": [(one.key[:60], round(getattr(one, key) / 1e3, 1), one.count) for one in top],
    }


def zero(check: Check) -> Iterator[Finding]:
    """What stage 3, offloading and delayed updates cost in one process, in time and memory."""
    flags = GPT.format(L=2, H=64, N=4, V=500) if check.tiny else GPT.format(L=24, H=1024, N=16, V=50257)
    offload = "--zero-stage 1 --offload-optimizer cpu"
    for more in ("", "--zero-stage 3", offload, f"{offload} --offload-delayed-update"):
        check.clear_peak()
        config, parts = build_model(flags, check.device, Shape(64 if check.tiny else 2048, 2, 2), more=f"--bf16 {more}")
        batch, times = batch_of(config), []
        for step in range(3):
            began_s = time.perf_counter()
            step_seconds(check, parts, batch, step)
            parts.engine.finish_update()
            times.append(round(time.perf_counter() - began_s, 3))
        yield {"zero": more or "plain", "seconds": times, "peak_gib": check.peak_gib()}


def resuming(check: Check) -> Iterator[Finding]:
    """The product's own command: three steps, a checkpoint, three more, against six without a stop."""
    flags = f"--save-interval 3 --train-iters 6 {'--bf16' if check.on_gpu else ''}"
    with tempfile.TemporaryDirectory() as directory:
        where = Path(directory)
        unbroken = _losses(check, where, "unbroken", f"{flags} --save {where / 'unbroken'}")
        _losses(check, where, "resumed", f"{flags} --save {where / 'resumed'} --exit-interval 3")
        resumed = _losses(check, where, "resumed", f"{flags} --save {where / 'resumed'}")
        same = unbroken == resumed and len(resumed) == 6
        yield {"resume_is_bit_exact": same, "ok": same, "unbroken": unbroken, "resumed": resumed}


def layouts(check: Check) -> Iterator[Finding]:
    """Three steps in fp32 on two devices, cut in each way, against one device: collectives and messages of NCCL."""
    found = torch.accelerator.device_count() if check.on_gpu else 2
    if found < 2:
        yield {"layouts": f"not looked at: two GPUs are needed, and there is {found}"}
        return
    ways = ["--tensor-model-parallel-size 2 --sequence-parallel", "--pipeline-model-parallel-size 2", "--zero-stage 3"]
    with tempfile.TemporaryDirectory() as directory:
        alone = _losses(check, Path(directory), "alone", "--train-iters 3")
        for number, way in enumerate(ways[:1] if check.tiny else ways):
            cut = _losses(check, Path(directory), f"cut{number}", f"--train-iters 3 {way}", ranks=2)
            worst = max(abs(alone[step] - cut[step]) / alone[step] for step in alone)
            yield {"layout": way, "worst_relative": worst, "ok": worst < TOLERANCE}


def _losses(check: Check, directory: Path, name: str, flags: str, *, ranks: int = 1) -> dict[int, float]:
    """The loss of each step of a run of pretrain_gpt.py."""
    metrics = directory / f"{name}.jsonl"
    model = (
        "--num-layers 2 --hidden-size 128 --num-attention-heads 4 --seq-length 128 --max-position-embeddings 128 "
        "--micro-batch-size 2 --global-batch-size 4 --lr 1e-3 --mock-data --vocab-size 1000 --eval-iters 0 "
        f"--device {check.device.type} --metrics-file {metrics} {flags}"
    )
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *start, str(ROOT / "pretrain_gpt.py"), *model.split()]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if ended.returncode not in (0, 75):
        raise RuntimeError(ended.stderr[-300:])
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


PARTS: dict[str, Callable[[Check], Iterator[Finding]]] = {
    "env": environment,
    "equal": equality,
    "sync": synchronisations,
    "kernels": kernels,
    "features": features,
    "mfu": utilisation,
    "zero": zero,
    "ckpt": resuming,
    "layouts": layouts,
}


if __name__ == "__main__":
    main()
