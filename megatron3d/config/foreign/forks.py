"""What becomes of the flags that two forks of Megatron-LM added: Megatron-DeepSpeed and the zero-bubble fork.

The rule and the kinds of fate are those of `megatron.py`. What a DeepSpeed JSON file sets is read by
`deepspeed_file.py`.

Sources: deepspeedai/Megatron-DeepSpeed `megatron/arguments.py`; sail-sg/zero-bubble-pipeline-parallelism
`megatron/core/zbpp_utils.py` and README ("Zero Bubble Command Line Arguments").
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from types import MappingProxyType
from typing import Any

FORK_SYNONYMS: Mapping[str, Mapping[tuple[str, str], Any]] = MappingProxyType(
    {
        "--cpu-optimizer": {("parallel", "offload_optimizer"): "cpu"},
        "--enable-zbh1-pipeline": {("parallel", "pipeline_schedule"): "zb-h1"},
    }
)

# (reason, flags) that are accepted without effect; one that takes a value ends in an equals sign.
FORK_ACCEPTED: tuple[tuple[str, str], ...] = (
    (
        "ZeRO, offloading and pipelines are built in and need no engine; --zero-stage and --deepspeed_config "
        "say what is used",
        "--deepspeed --deepspeed_mpi --deepspeed-mpi --deepscale",
    ),
    (
        "there are pipeline stages only where --pipeline-model-parallel-size asks for them",
        "--no-pipeline-parallel",
    ),
    (
        "activations are recomputed by one implementation, and its result is that of keeping them",
        """
        --deepspeed-activation-checkpointing --contigious-checkpointing --synchronize-each-layer --profile-backward
        --partition-activations""",
    ),
    (
        "gradients and weights are reduced and gathered from flat buffers, one for each block",
        """
        --zero-reduce-scatter --zero-contigious-gradients --use-pin-memory --zero-reduce-bucket-size=
        --zero-allgather-bucket-size=""",
    ),
    (
        "attention runs through torch's scaled_dot_product_attention, and kernels are chosen by device and dtype",
        """
        --use-flash-attn-v1 --use-flash-attn-v2 --use-flash-attn-triton --use-flash-attn-builder --ds_fused_adam
        --cpu_torch_adam --disable-mem-efficient-ln""",
    ),
    (
        "a checkpoint loads at any layout as it is",
        "--universal-checkpoint",
    ),
    (
        "the moments of the optimizer are not logged",
        "--log-optimizer-states-to-tensorboard",
    ),
    (
        "--profile-pipeline records what each rank computed when",
        "--measure-activation-memory --profile_steps= --profile-memory-iter=",
    ),
    (
        "one runtime runs every schedule, and its result is that of one process",
        """
        --enable-zb-runtime --enable-optimizer-post-validation --enable-exactly-numeric-match
        --enable-zbh1-exact-semantics --no-pre-communication-optimization --no-paired-barrier
        --zero-bubble-pipeline-timers-start-iter= --zero-bubble-pipeline-timers-end-iter=
        --zero-bubble-adaptive-memory-limit-percentile=""",
    ),
    (
        "layers that do not divide are always split as evenly as they can be, with the smaller stages at the ends",
        "--allow-padding-num-layers",
    ),
)

# Flags of mixtures of experts, which say nothing of a model with one expert (see `flags.py`).
FORK_EXPERT_FLAGS = """
    --mlp-type --topk --expert-interval --create-moe-param-group --disable-moe-token-dropping --num-experts-switch
    --disable-moe-top2-2nd-expert-sampling --enable-expert-tensor-parallelism --use-tutel"""

# (what to use instead, flags) that are refused, and beginnings of flags, which end in a hyphen.
FORK_REFUSED: tuple[tuple[str, str], ...] = (
    (
        "mixtures of experts are not in this version; train the dense model without it",
        FORK_EXPERT_FLAGS,
    ),
    (
        "sequences are not sharded over ranks of their own in this version; use --sequence-parallel with "
        "--tensor-model-parallel-size",
        "--ds-sequence-parallel-size --force-ds-sequence-parallel --ds-sequence-parallel-",
    ),
    (
        "activations stay on the device; use --recompute-granularity full or selective, and --sequence-parallel",
        """
        --checkpoint-in-cpu --scattered-embeddings --split-transformers --memory-centric-tiled-linear --tile-factor
        --cpu-offload --offload-chunk-num --offload-time --auto-offload-time --offload-overlap-sr
        --offload-continuous-buffers --recompute-lgd""",
    ),
    (
        "the learning rate follows the schedule; use --override-opt-param-scheduler to take it from the flags",
        "--no-load-lr-state",
    ),
    (
        "stop a run by SIGTERM, --exit-interval or --exit-duration-in-mins, which all save first",
        "--kill-switch-file",
    ),
    (
        "name the step of a checkpoint by --ckpt-step",
        "--load-tag",
    ),
    (
        "each corpus is read in one seeded order, every sample whole; leave it out",
        """
        --data-efficiency-curriculum-learning --random-ltd --curriculum-learning --train-data-exact-num-epochs
        --train-desc-path --train-doc-idx-path --train-idx-path --train-sample-idx-path --train-shuffle-idx-path
        --repeated-dataloader --return-data-index --use-dataset-only --aml-data-download-path""",
    ),
    (
        "reinforcement learning and distillation are not in this version",
        """
        --kd --kd-alpha-ce --kd-beta-ce --kd-temp --mos --load-teacher --num-layers-teacher --num-experts-teacher
        --hidden-size-teacher --num-attention-heads-teacher --reset-iteration""",
    ),
    (
        "text is generated by tools/generate_text.py",
        "--inference --ds-inference",
    ),
    (
        "use --pipeline-schedule zb-v, whose two stages a rank form a V, or interleaved",
        "--enable-1f1b-v --interleave-group-size",
    ),
    (
        "a sample goes through a stage whole; use more micro-batches",
        "--num-seq-splits",
    ),
)

FORK_HARMLESS_VALUES: Mapping[str, str] = MappingProxyType(
    {
        "--ds-sequence-parallel-size": "1",
        "--num-seq-splits": "1",
        "--interleave-group-size": "0",
        "--offload-chunk-num": "0",
        "--tile-factor": "1",
        "--mlp-type": "standard",
    }
)

# Flags that `zero_bubble_settings` reads together.
ZERO_BUBBLE_SWITCHES = ("--enable-zero-bubble", "--zero-bubble-v-schedule")
ZERO_BUBBLE_VALUED = ("--zero-bubble-max-pending-backward", "--zero-bubble-v-schedule-mem-setup")


def fork_accepted(flag: str) -> tuple[str, str] | None:
    """(reason, number of values, 0 or 1) of a flag of the forks that is accepted without effect."""
    for reason, names in FORK_ACCEPTED:
        for arity, name in (("0", flag), ("1", f"{flag}=")):
            if name in names.split():
                return reason, arity
    return None


def fork_refused(flag: str) -> str | None:
    """What to use instead of a flag of the forks whose feature is not here, or None if the flag is not such a one."""
    for instead, names in FORK_REFUSED:
        if any(flag == name or (name.endswith("-") and flag.startswith(name)) for name in names.split()):
            return instead
    return None


def zero_bubble_settings(
    given: Mapping[str, tuple[str, ...]], num_stages: int, settings: MutableMapping[tuple[str, str], Any]
) -> tuple[list[str], list[str]]:
    """Set --pipeline-schedule by the zero-bubble fork's switches; returns problems and lines to show.

    The fork's V schedule is zb-v; without it, as many pending backwards as pipeline ranks are zb-h1 and twice as many
    zb-h2. Its default, auto, measures the memory that is left; that is answered with zb-h1, which needs what 1f1b does.

    Args:
        given: the fork's flags with their values.
        num_stages: pipeline ranks.
        settings: where to put the schedule.
    """
    setup = _last(given.get("--zero-bubble-v-schedule-mem-setup"), "zb")
    pending = _last(given.get("--zero-bubble-max-pending-backward"), "auto")
    if not any(flag in given for flag in ZERO_BUBBLE_SWITCHES):
        return [], [f"{flag} is accepted without effect: --enable-zero-bubble is not given." for flag in given]
    if "--zero-bubble-v-schedule" in given:
        if setup != "zb":
            return [
                f"--zero-bubble-v-schedule-mem-setup {setup} is not supported: its schedules of less memory are not in "
                "this version; use zb, or --pipeline-schedule zb-h1."
            ], []
        order = "zb-v"
    elif pending != "auto" and not pending.isdecimal():
        return [
            f"--zero-bubble-max-pending-backward {pending} is neither a whole number nor auto; use {num_stages} for "
            f"zb-h1 or {2 * num_stages} for zb-h2."
        ], []
    elif pending != "auto" and int(pending) < num_stages:
        return [
            f"--zero-bubble-max-pending-backward {pending} is below the {num_stages} pipeline ranks, which no schedule "
            f"here keeps to; use {num_stages} for zb-h1 or {2 * num_stages} for zb-h2."
        ], []
    else:
        order = "zb-h2" if pending != "auto" and int(pending) >= 2 * num_stages else "zb-h1"
    if num_stages == 1:
        return [], [f"{' '.join(given)}: no effect, as --pipeline-model-parallel-size is 1."]
    settings["parallel", "pipeline_schedule"] = order
    return [], [f"{' '.join(given)}: the schedule is --pipeline-schedule {order}."]


def _last(values: tuple[str, ...] | None, default: str) -> str:
    return values[-1] if values else default
