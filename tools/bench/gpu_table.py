"""The table of one GPU: models of 124M to 8B parameters in bf16 and fp8, beside plain torch and transformers.

    python -m tools.bench.gpu_table --out out/gpu_table                       # everything: 20 minutes
    python -m tools.bench.gpu_table --models llama-3.2-1b --ways megatron3d torch-compiled
    python -m tools.bench.gpu_table --device cpu --tiny --ways megatron3d torch transformers    # checks the program

Every cell is a process with a time limit. All train the same shape on the same tokens with fp32 master weights and
AdamW: this project with --bf16, the others under torch.autocast in bf16 with torch's fused AdamW. MFU counts the full
square of attention scores (`models/flops.py`), of the device's dense bf16 peak, also where products are in fp8. Llama-3
8B has 8 of its 32 layers, since one GPU does not hold the state of all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron3d.comm.device import device_name, synchronize
from megatron3d.config.run import RunConfig
from megatron3d.models.flops import flops_per_step, peak_tflops
from megatron3d.train.setup import TrainingSetup
from megatron3d.train.step import Rates, train_step
from tools.bench.gpu_options import add_options
from tools.bench.gpu_parts import Shape, batch_of, build_model, run_config
from tools.bench.peers.plain_llama import PlainLlama
from tools.bench.peers.plain_torch import PlainGPT
from tools.bench.peers.trainee import cross_entropy, fused_adamw
from tools.bench.peers.work import LEARNING_RATE, WEIGHT_DECAY, Work

ROOT = Path(__file__).resolve().parents[2]
ROTARY_BASE = 500000.0


@dataclass(frozen=True)
class Model:
    """A shape: `groups` of 0 is a GPT-2, else a Llama; sequences of a micro-batch, and micro-batches of a step."""

    layers: int
    hidden: int
    heads: int
    ffn: int
    groups: int
    vocabulary: int
    seq: int
    micro_batch: int
    num_microbatches: int = 4
    tied: bool = True

    @property
    def flags(self) -> str:
        """Of this project's command line."""
        shape = (
            f"--num-layers {self.layers} --hidden-size {self.hidden} --num-attention-heads {self.heads} "
            f"--ffn-hidden-size {self.ffn} --vocab-size {self.vocabulary}"
        )
        llama = (
            f"--group-query-attention --num-query-groups {self.groups} --swiglu --normalization RMSNorm "
            "--position-embedding-type rope --rotary-base 500000 --disable-bias-linear"
        )
        untied = "" if self.tied else "--untie-embeddings-and-output-weights"
        return f"{shape} {llama if self.groups else ''} {untied}"


MODELS = {
    "gpt2-124m": Model(12, 768, 12, 3072, 0, 50257, 1024, 16),
    "gpt-1.3b": Model(24, 2048, 16, 8192, 0, 50257, 2048, 4),
    "llama-3.2-1b": Model(16, 2048, 32, 8192, 8, 128256, 4096, 2),
    "llama-3.2-3b": Model(28, 3072, 24, 8192, 8, 128256, 4096, 1),
    "llama-3-8b, 8 of 32 layers": Model(8, 4096, 32, 14336, 8, 128256, 4096, 2, tied=False),
}
OURS = {
    "megatron3d": "",
    "megatron3d-compile": "--compile",
    "megatron3d-fp8": "--fp8-format hybrid",
    "megatron3d-fp8-blocks": "--fp8-format e4m3 --fp8-recipe blockwise",
}
WAYS = (*OURS, "torch", "torch-compiled", "transformers", "transformers-compiled")


def main() -> int:
    """Measure all cells that are asked for, or the one of this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS), help="default all")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="default all")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds of a cell (default 180)")
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    add_options(parser)
    args = parser.parse_args()
    if args.cell:
        print(json.dumps(measure(*args.cell, device=args.device, tiny=args.tiny, steps=args.steps)), flush=True)
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    cells = {}
    with (args.out / "cells.jsonl").open("a") as file:
        for model, way in ((model, way) for model in args.models for way in args.ways):
            cells[model, way] = run_cell(model, way, args)
            file.write(json.dumps({"model": model, "way": way} | cells[model, way]) + "\n")
            file.flush()
    print(table(cells))
    return 1 if any("error" in cell for cell in cells.values()) else 0


def run_cell(model: str, way: str, args: argparse.Namespace) -> dict[str, object]:
    """Measure a cell in a process of its own; one that fails or takes too long says so and costs no other."""
    command = [sys.executable, "-m", "tools.bench.gpu_table", "--cell", model, way, "--device", args.device]
    command += ["--steps", str(args.steps), *(["--tiny"] if args.tiny else [])]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=args.limit, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {args.limit:g} s"}
    if ended.returncode:
        return {"error": (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1][:200]}
    return json.loads(ended.stdout.splitlines()[-1])


def measure(model_name: str, way: str, *, device: str, tiny: bool, steps: int) -> dict[str, object]:
    """Times of a step, and what follows from them."""
    place = torch.device(device, 0) if device == "cuda" else torch.device(device)
    model = _shrunk(MODELS[model_name]) if tiny else MODELS[model_name]
    shape, more = Shape(model.seq, model.micro_batch, model.num_microbatches), f"--bf16 {OURS.get(way, '')}"
    if way in OURS:
        config, parts = build_model(model.flags, place, shape, more=more)
        step = _our_step(parts, config)
    else:
        config, step = run_config(model.flags, shape, more=more), _torch_step(way, model, place)
    times, loss = [], 0.0
    for _ in range(steps):
        synchronize(place)
        began_s = time.perf_counter()
        loss = step()
        synchronize(place)
        times.append(time.perf_counter() - began_s)
    seconds = statistics.median(times[1:])
    tokens = model.seq * model.micro_batch * model.num_microbatches
    tflops, peak = flops_per_step(config.model, tokens) / seconds / 1e12, peak_tflops(device_name(place), "bf16")
    return {
        "tokens_per_s": round(tokens / seconds),
        "tflops": round(tflops, 1),
        "mfu_percent": None if peak is None else round(100 * tflops / peak, 1),
        "peak_gib": round(torch.accelerator.max_memory_allocated() / 2**30, 1) if device == "cuda" else None,
        "first_s": round(times[0], 1),
        "loss": loss,
    }


def _shrunk(model: Model) -> Model:
    """Of the same kind, small enough for a CPU."""
    sizes = {"layers": 2, "hidden": 256, "heads": 2, "ffn": 256, "vocabulary": 500, "seq": 128}  # of 128: fp8's blocks
    return replace(model, **sizes, groups=1 if model.groups else 0, micro_batch=1, num_microbatches=2)


def _our_step(parts: TrainingSetup, config: RunConfig) -> Callable[[], float]:
    """A step of this project."""
    batch, numbers = batch_of(config), count()
    return lambda: train_step(parts, batch, Rates(LEARNING_RATE, WEIGHT_DECAY), step=next(numbers)).loss


def _torch_step(way: str, model: Model, device: torch.device) -> Callable[[], float]:
    """A step of a loop in plain torch, with the module of plain torch or of transformers."""
    torch.manual_seed(0)
    kind = way.partition("-")[0]
    with device:
        module, logits_of = _plain(model) if kind == "torch" else _of_transformers(model)
    if way.endswith("-compiled"):
        module.compile()
    optimizer = fused_adamw(module)
    numbers = torch.randint(model.vocabulary, (model.num_microbatches, model.micro_batch, model.seq + 1), device=device)

    def step() -> float:
        total = torch.zeros((), device=device)
        for sample in numbers:
            with torch.autocast(device.type, torch.bfloat16):
                loss = cross_entropy(logits_of(sample[:, :-1]), sample[:, 1:]) / model.num_microbatches
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total.item()

    return step


def _plain(model: Model) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    if model.groups:
        module: nn.Module = PlainLlama(
            layers=model.layers,
            hidden=model.hidden,
            heads=model.heads,
            groups=model.groups,
            ffn=model.ffn,
            vocabulary=model.vocabulary,
            tied=model.tied,
            base=ROTARY_BASE,
        )
    else:
        module = PlainGPT(
            Work(model.layers, model.hidden, model.heads, seq_length=model.seq, vocab_size=model.vocabulary)
        )
    return module, module


def _of_transformers(model: Model) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    transformers: Any = import_module("transformers")
    if model.groups:
        module = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=model.vocabulary,
                hidden_size=model.hidden,
                intermediate_size=model.ffn,
                num_hidden_layers=model.layers,
                num_attention_heads=model.heads,
                num_key_value_heads=model.groups,
                max_position_embeddings=model.seq,
                rope_parameters={"rope_type": "default", "rope_theta": ROTARY_BASE},
                tie_word_embeddings=model.tied,
                use_cache=False,
                attn_implementation="sdpa",
            )
        )
    else:
        module = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=model.vocabulary,
                n_positions=model.seq,
                n_embd=model.hidden,
                n_inner=model.ffn,
                n_layer=model.layers,
                n_head=model.heads,
                activation_function="gelu",
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                use_cache=False,
                attn_implementation="sdpa",
            )
        )
    return module.train(), lambda tokens_BS: module(input_ids=tokens_BS).logits


def table(cells: Mapping[tuple[str, str], Mapping[str, object]]) -> str:
    """Markdown: a line for each cell; what failed says why."""
    lines = [
        "| model | way | tokens/s | TFLOP/s | MFU % | peak GiB | first step, s |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for (model, way), cell in cells.items():
        if "error" in cell:
            lines.append(f"| {model} | {way} | {cell['error']} | | | | |")
            continue
        shown = (cell["tokens_per_s"], cell["tflops"], cell["mfu_percent"], cell["peak_gib"], cell["first_s"])
        lines.append(f"| {model} | {way} | " + " | ".join("" if one is None else str(one) for one in shown) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
