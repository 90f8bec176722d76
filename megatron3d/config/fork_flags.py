"""What becomes of the flags that two forks of Megatron-LM added: Megatron-DeepSpeed and the zero-bubble fork.

The rule and the kinds of fate are those of `megatron_flags.py`. What a DeepSpeed JSON file sets is read by
`deepspeed_file.py`.

Sources: deepspeedai/Megatron-DeepSpeed `megatron/arguments.py`; sail-sg/zero-bubble-pipeline-parallelism
`megatron/core/zbpp_utils.py` and README ("Zero Bubble Command Line Arguments").
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from types import MappingProxyType
from typing import Any

from megatron3d.config.megatron_flags import Accepted, Refused

FORK_SYNONYMS: Mapping[str, Mapping[tuple[str, str], Any]] = MappingProxyType(
    {
        "--cpu-optimizer": {("parallel", "offload_optimizer"): "cpu"},
        "--enable-zbh1-pipeline": {("parallel", "pipeline_schedule"): "zb-h1"},
    }
)

FORK_ACCEPTED: tuple[Accepted, ...] = (
    Accepted(
        "ZeRO, offloading and pipelines are built in and need no engine; --zero-stage and --deepspeed_config say what "
        "is used",
        switches="--deepspeed --deepspeed_mpi --deepspeed-mpi --deepscale",
    ),
    Accepted(
        "there are pipeline stages only where --pipeline-model-parallel-size asks for them",
        switches="--no-pipeline-parallel",
    ),
    Accepted(
        "activations are recomputed by one implementation, and its result is that of keeping them",
        switches="""
        --deepspeed-activation-checkpointing --contigious-checkpointing --synchronize-each-layer --profile-backward
        --partition-activations""",
    ),
    Accepted(
        "gradients and weights are reduced and gathered from flat buffers, one for each block",
        switches="--zero-reduce-scatter --zero-contigious-gradients --use-pin-memory",
        valued="--zero-reduce-bucket-size --zero-allgather-bucket-size",
    ),
    Accepted(
        "attention runs through torch's scaled_dot_product_attention, and kernels are chosen by device and dtype",
        switches="""
        --use-flash-attn-v1 --use-flash-attn-v2 --use-flash-attn-triton --use-flash-attn-builder --ds_fused_adam
        --cpu_torch_adam --disable-mem-efficient-ln""",
    ),
    Accepted("a checkpoint loads at any layout as it is", switches="--universal-checkpoint"),
    Accepted(
        "the moments of the optimizer are not logged",
        switches="--log-optimizer-states-to-tensorboard",
    ),
    Accepted(
        "--profile-pipeline records what each rank computed when",
        valued="--profile_steps --profile-memory-iter",
        switches="--measure-activation-memory",
    ),
    Accepted(
        "one runtime runs every schedule, and its result is that of one process",
        switches="""
        --enable-zb-runtime --enable-optimizer-post-validation --enable-exactly-numeric-match
        --enable-zbh1-exact-semantics --no-pre-communication-optimization --no-paired-barrier""",
        valued="""
        --zero-bubble-pipeline-timers-start-iter --zero-bubble-pipeline-timers-end-iter
        --zero-bubble-adaptive-memory-limit-percentile""",
    ),
    Accepted(
        "layers that do not divide are always split as evenly as they can be, with the smaller stages at the ends",
        switches="--allow-padding-num-layers",
    ),
)

# Flags of mixtures of experts, which say nothing of a model with one expert (see `foreign.py`).
FORK_EXPERT_FLAGS = """
    --mlp-type --topk --expert-interval --create-moe-param-group --disable-moe-token-dropping --num-experts-switch
    --disable-moe-top2-2nd-expert-sampling --enable-expert-tensor-parallelism --use-tutel"""

FORK_REFUSED: tuple[Refused, ...] = (
    Refused("mixtures of experts are not in this version; train the dense model without it", flags=FORK_EXPERT_FLAGS),
    Refused(
        "sequences are not sharded over ranks of their own in this version; use --sequence-parallel with "
        "--tensor-model-parallel-size",
        flags="--ds-sequence-parallel-size --force-ds-sequence-parallel",
        prefixes="--ds-sequence-parallel-",
    ),
    Refused(
        "activations stay on the device; use --recompute-granularity full or selective, and --sequence-parallel",
        flags="""
        --checkpoint-in-cpu --scattered-embeddings --split-transformers --memory-centric-tiled-linear --tile-factor
        --cpu-offload --offload-chunk-num --offload-time --auto-offload-time --offload-overlap-sr
        --offload-continuous-buffers --recompute-lgd""",
    ),
    Refused(
        "the learning rate follows the schedule; use --override-opt-param-scheduler to take it from the flags",
        flags="--no-load-lr-state",
    ),
    Refused(
        "stop a run by SIGTERM, --exit-interval or --exit-duration-in-mins, which all save first",
        flags="--kill-switch-file",
    ),
    Refused("name the step of a checkpoint by --ckpt-step", flags="--load-tag"),
    Refused(
        "each corpus is read in one seeded order, every sample whole; leave it out",
        flags="""
        --data-efficiency-curriculum-learning --random-ltd --curriculum-learning --train-data-exact-num-epochs
        --train-desc-path --train-doc-idx-path --train-idx-path --train-sample-idx-path --train-shuffle-idx-path
        --repeated-dataloader --return-data-index --use-dataset-only --aml-data-download-path""",
    ),
    Refused(
        "reinforcement learning and distillation are not in this version",
        flags="""
        --kd --kd-alpha-ce --kd-beta-ce --kd-temp --mos --load-teacher --num-layers-teacher --num-experts-teacher
        --hidden-size-teacher --num-attention-heads-teacher --reset-iteration""",
    ),
    Refused("text is generated by tools/generate_text.py", flags="--inference --ds-inference"),
    Refused(
        "use --pipeline-schedule zb-v, whose two stages a rank form a V, or interleaved",
        flags="--enable-1f1b-v --interleave-group-size",
    ),
    Refused("a sample goes through a stage whole; use more micro-batches", flags="--num-seq-splits"),
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
