"""Which library multiplies fp32 matrices on a CPU: what the options, the checkpoint or a short measurement say.

torch's own library (mostly MKL) is fast on some processors and takes more than twice the time of oneDNN on others.
Where no flag forces one, a run measures both once, on the threads it will train on; its checkpoints keep the choice,
since the two round differently and a resumed run should give the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from megatron3d_kernels.products import ONEDNN, TORCH, has_onednn
from megatron3d_kernels.registry import Registry

from megatron3d.checkpoint.load import read_document
from megatron3d.checkpoint.ranks import from_first
from megatron3d.comm.mesh import Mesh
from megatron3d.config.run import RunConfig
from megatron3d.config.sections.checkpoint import CheckpointConfig
from megatron3d.config.sections.model import ModelConfig
from megatron3d.config.sections.train import TrainConfig
from megatron3d.errors import CheckpointError, ConfigError
from megatron3d.train.source import sources

AUTO, MKL = "auto", "mkl"
WORTH_IT = 1.3
"""How many times faster oneDNN must be, so that noise does not choose where the two are alike."""
LEAST_FLOP = 1 << 24
"""Of one product: below, a measurement would be of the calls rather than of the library."""
MOST_TOKENS, MOST_FEATURES, ROUNDS = 128, 1024, 8


@dataclass(frozen=True)
class LibraryRates:
    """What a linear layer's three products reached together, in GFLOP/s."""

    mkl: float
    onednn: float


def with_matmul(config: RunConfig, mesh: Mesh, device: torch.device) -> RunConfig:
    """The config with the library that is used in the place of `--matmul auto`; collective over all ranks.

    Rank 0 chooses for all of them, and prints what it measured. Where the layers do not compute in fp32 on a CPU
    nothing is chosen and "auto" stays, which is torch's own.

    Raises:
        ConfigError: oneDNN is asked for, on a device or in a torch that has it not.
    """
    given = config.train.matmul
    is_for_cpu = device.type == "cpu" and config.optim.precision == "fp32"
    if not is_for_cpu and given != "onednn":
        return config
    chosen = given
    if given == AUTO:
        model, train, options = config.model, config.train, config.checkpoint
        chosen = from_first(lambda: stored_choice(options) or _measured_choice(model, train), mesh.world.group)
    if chosen == "onednn" and device.type != "cpu":
        raise ConfigError(f"--matmul onednn is for products on a CPU, and the device is {device}; give --device cpu.")
    if chosen == "onednn" and not has_onednn():
        raise ConfigError("--matmul onednn needs a torch that is built with oneDNN, as this one is not; use mkl.")
    if chosen == given:
        return config
    as_given = {**config.as_given, ("train", "matmul"): given}
    return replace(config, train=replace(config.train, matmul=chosen), as_given=as_given)


def stored_choice(options: CheckpointConfig) -> str | None:
    """What the run computed with that this one resumes; None where it resumes none, or one without fp32."""
    try:
        found = sources(options)
        resumed = next((one.directory for one in found if not one.weights_only), None)
        if resumed is None:
            return None
        run = read_document(resumed, "run")
    except CheckpointError:
        return None  # reported where the checkpoint is loaded
    if run["optim"].get("bf16") or run["optim"].get("fp16"):
        return None
    stored = run["train"].get("matmul", AUTO)
    return MKL if stored == AUTO else stored  # earlier versions had no other library


def _measured_choice(model: ModelConfig, train: TrainConfig) -> str:
    """The faster library for the shapes of the model; prints the rates."""
    tokens = min(train.micro_batch_size * model.seq_length, MOST_TOKENS)
    hidden, ffn = min(model.hidden_size, MOST_FEATURES), min(model.ffn_hidden_size, MOST_FEATURES)
    if not has_onednn() or 2 * tokens * hidden * ffn < LEAST_FLOP:
        return MKL
    rates = measure(tokens, hidden, ffn)
    chosen = "onednn" if rates.onednn > WORTH_IT * rates.mkl else MKL
    print(
        f"fp32 products: torch's own library (mkl) {rates.mkl:.0f} GFLOP/s, oneDNN {rates.onednn:.0f}: {chosen} is "
        "used; --matmul mkl or --matmul onednn forces one"
    )
    return chosen


def measure(tokens: int, hidden: int, ffn: int) -> LibraryRates:
    """The best of some rounds of either library, in turn, for a layer from `hidden` to `ffn` features."""
    x, grad = torch.ones(tokens, hidden), torch.ones(tokens, ffn)
    weight, buffer = torch.ones(ffn, hidden), torch.zeros(ffn, hidden)

    def products(kernels: Registry) -> Callable[[], None]:
        def run() -> None:
            kernels.linear(x, weight, None)
            kernels.input_gradient(grad, weight)
            kernels.add_weight_gradient(buffer, grad, x)

        return run

    actions = {name: products(Registry(library=name)) for name in (TORCH, ONEDNN)}
    best = dict.fromkeys(actions, float("inf"))
    for _ in range(ROUNDS + 1):  # the first finds its code
        for name, action in actions.items():
            began_s = time.perf_counter()
            action()
            best[name] = min(best[name], time.perf_counter() - began_s)
    gflop = 3 * 2 * tokens * hidden * ffn / 1e9
    return LibraryRates(mkl=gflop / best[TORCH], onednn=gflop / best[ONEDNN])
