"""What must hold between the options that move state off the device."""

from __future__ import annotations

from collections.abc import Iterator

from megatron3d.config.sections.optim import GivenOptim
from megatron3d.config.sections.parallel import GivenParallel
from megatron3d.config.sections.train import GivenTrain
from megatron3d.config.update_rules import elementwise_optimizers

NO_DIRECTORY = (
    "--offload-activations keeps the inputs of layers in files where the device is a CPU; say where with "
    "--offload-dir, best on a local disk."
)


def offload_problems(parallel: GivenParallel, optim: GivenOptim, train: GivenTrain) -> Iterator[str]:
    """What does not go together in moving state and activations off the device."""
    yield from offload_rule(parallel, optim)
    yield from offload_activations_rule(parallel, train)
    yield from offload_directory_rule(parallel)


def offload_activations_rule(parallel: GivenParallel, train: GivenTrain) -> Iterator[str]:
    """What is offloaded are the inputs of layers that are recomputed."""
    if parallel.offload_activations and train.recompute_granularity != "full":
        yield (
            "--offload-activations keeps the inputs of recomputed layers off the device, and no layers are recomputed "
            "without --recompute-granularity full; give that, or drop it."
        )


def offload_rule(parallel: GivenParallel, optim: GivenOptim) -> Iterator[str]:
    """Weights go where their state goes; files have a directory; the optimizer can step on the host."""
    optimizer = optim.optimizer
    states, params = parallel.offload_optimizer, parallel.offload_params
    if states != "none" and optimizer not in elementwise_optimizers():
        yield (
            f"--offload-optimizer {states} does not go with --optimizer {optimizer}, which works on whole parameters "
            f"across ranks; use --optimizer {', '.join(elementwise_optimizers())}, or --offload-optimizer none."
        )
    if states != "none" and optim.optimizer_implementation != "torch":
        yield (
            f"--optimizer-implementation {optim.optimizer_implementation} updates on a GPU and --offload-optimizer "
            f"{states} on the host; use --optimizer-implementation torch, or --offload-optimizer none."
        )
    if params != "none" and parallel.zero_stage != 3:
        yield (
            f"--offload-params {params} moves sharded weights, which --zero-stage {parallel.zero_stage} "
            "does not; use --zero-stage 3, or leave it out."
        )
    if params != "none" and states == "none":
        yield (
            f"--offload-params {params} needs the larger optimizer state off the device first; give "
            "--offload-optimizer cpu or nvme too."
        )
    if parallel.offload_delayed_update and states == "none":
        yield "--offload-delayed-update delays the update of offloaded state; give --offload-optimizer cpu or nvme."


def offload_directory_rule(parallel: GivenParallel) -> Iterator[str]:
    """A directory where there are files, and files where there is a directory."""
    uses_files = "nvme" in (parallel.offload_optimizer, parallel.offload_params)
    if uses_files and parallel.offload_dir is None:
        flag = "--offload-optimizer" if parallel.offload_optimizer == "nvme" else "--offload-params"
        yield f"{flag} nvme keeps state in files; say where with --offload-dir, best on a local disk."
    if parallel.offload_activations and parallel.device == "cpu" and parallel.offload_dir is None:
        yield NO_DIRECTORY
    uses_files = uses_files or parallel.offload_activations
    if not uses_files and parallel.offload_dir is not None:
        yield (
            f"--offload-dir {parallel.offload_dir} is not used, as nothing is offloaded to files; give "
            "--offload-optimizer nvme, or leave it out."
        )
