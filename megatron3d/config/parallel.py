"""How the work is cut: the degrees of each kind of parallelism and what goes with them."""

from __future__ import annotations

from dataclasses import dataclass

from megatron3d.config.fields import off_switch, option, switch

PIPELINE_SCHEDULES = ("gpipe", "1f1b")


@dataclass(frozen=True)
class ParallelConfig:
    """The layout. `data_parallel_size` and `world_size` are derived by `resolve`; there are no flags for them."""

    tensor_model_parallel_size: int = option(
        1,
        "--tensor-model-parallel-size",
        "Ranks that share each layer (TP).",
        also=("--model-parallel-size", "--intra-layer-model-parallel-size"),
    )
    pipeline_model_parallel_size: int = option(
        1,
        "--pipeline-model-parallel-size",
        "Ranks that share the depth (PP).",
        also=("--inter-layer-model-parallel-size",),
    )
    context_parallel_size: int = option(1, "--context-parallel-size", "Ranks that share each sequence (CP).")
    expert_model_parallel_size: int = option(1, "--expert-model-parallel-size", "Ranks that share the experts (EP).")
    sequence_parallel: bool = switch(
        "--sequence-parallel", "Shard norms, dropout and residuals along the sequence over the TP ranks."
    )
    pipeline_schedule: str = option(
        "1f1b", "--pipeline-schedule", "The order of forwards and backwards: gpipe or 1f1b."
    )
    decoder_first_pipeline_num_layers: int = option(
        None, "--decoder-first-pipeline-num-layers", "Layers on the first stage; the rest are split evenly."
    )
    decoder_last_pipeline_num_layers: int = option(
        None, "--decoder-last-pipeline-num-layers", "Layers on the last stage; the rest are split evenly."
    )
    account_for_embedding_in_pipeline_split: bool = switch(
        "--account-for-embedding-in-pipeline-split", "Count the embedding as a layer when splitting."
    )
    account_for_loss_in_pipeline_split: bool = switch(
        "--account-for-loss-in-pipeline-split", "Count the output layer and loss as a layer when splitting."
    )
    zero_stage: int = option(
        0,
        "--zero-stage",
        "What the data-parallel ranks share out: 0 nothing, 1 the optimizer state.",
        choices=(0, 1, 2, 3),
    )
    use_distributed_optimizer: bool = switch("--use-distributed-optimizer", "The same as --zero-stage 1.")
    grad_reduce_in_bf16: bool = switch("--grad-reduce-in-bf16", "Keep and reduce gradients in bf16; default fp32.")
    overlap_grad_reduce: bool = off_switch(
        "--no-overlap-grad-reduce", "Reduce gradients after the last backward instead of during it."
    )
    device: str = option(
        None, "--device", "Where to run; default cuda where there is one, else cpu.", choices=("cpu", "cuda")
    )
    distributed_timeout_minutes: float = option(
        10.0, "--distributed-timeout-minutes", "A collective that takes longer ends the job.", unit="minutes"
    )
    data_parallel_size: int = 1
    world_size: int = 1
