"""How the work is cut: the degrees of each kind of parallelism and what goes with them."""

from __future__ import annotations

from dataclasses import dataclass

from megatron3d.config.fields import off_switch, option, options, switch

# What `--pipeline-schedule` takes, besides `module:function` of a user's own; a test holds them against the orders.
PIPELINE_SCHEDULES = (
    "gpipe",
    "1f1b",
    "interleaved",
    "breadth-first",
    "zb-h1",
    "zb-h2",
    "zb-v",
    "dualpipe-v",
    "auto",
)
OFFLOAD_PLACES = ("none", "cpu", "nvme")
CONTEXT_CUTS = ("contiguous", "zigzag", "balanced")
CONTEXT_COMM_TYPES = ("allgather", "p2p", "a2a", "a2a+p2p")


@dataclass(frozen=True)
class GivenParallel:
    """The layout as it is given."""

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
    context_parallel_size: int = option(
        1,
        "--context-parallel-size",
        "Ranks that share each sequence (CP).",
        also=("--ds-sequence-parallel-size",),
    )
    cp_cut: str | None = option(
        None,
        "--cp-cut",
        "How samples are cut over context-parallel ranks: contiguous, zigzag (a chunk from the front and one from the "
        "back), or balanced (equal attention area within documents); default by the model.",
        choices=CONTEXT_CUTS,
    )
    cp_comm_type: tuple[str, ...] = options(
        "--cp-comm-type",
        f"How context-parallel ranks attend to each other's keys: {', '.join(CONTEXT_COMM_TYPES)}; one for all layers, "
        "or one for each.",
    )
    hierarchical_context_parallel_sizes: tuple[str, ...] = options(
        "--hierarchical-context-parallel-sizes",
        "With --cp-comm-type a2a+p2p: HEADS RING, consecutive ranks that exchange heads, and groups of them that "
        "pass keys and values round; together --context-parallel-size.",
    )
    cp_gather_again: bool = switch(
        "--cp-gather-again",
        "With --cp-comm-type allgather: gather keys and values again in the backward instead of keeping them.",
    )
    expert_model_parallel_size: int = option(
        1, "--expert-model-parallel-size", "Ranks that share the experts (EP).", also=("--moe-expert-parallel-size",)
    )
    expert_tensor_parallel_size: int | None = option(
        None,
        "--expert-tensor-parallel-size",
        "Ranks that share each expert (ETP); default --tensor-model-parallel-size.",
    )
    sequence_parallel: bool = switch(
        "--sequence-parallel", "Shard norms, dropout and residuals along the sequence over the TP ranks."
    )
    tp_comm_overlap: bool = switch(
        "--tp-comm-overlap", "Run the collectives of tensor-parallel layers beside their products, chunk by chunk."
    )
    tp_comm_overlap_chunks: int = option(
        4, "--tp-comm-overlap-chunks", "Chunks of a micro-batch's positions with --tp-comm-overlap."
    )
    pipeline_schedule: str | None = option(
        None,
        "--pipeline-schedule",
        f"The order of forwards and backwards: {', '.join(PIPELINE_SCHEDULES)}, or module:function of your own; "
        "default 1f1b, with several stages per rank interleaved.",
    )
    num_layers_per_virtual_pipeline_stage: int | None = option(
        None, "--num-layers-per-virtual-pipeline-stage", "Layers of a stage where a rank holds several stages."
    )
    num_virtual_stages_per_pipeline_rank: int | None = option(
        None,
        "--num-virtual-stages-per-pipeline-rank",
        "Stages on each rank; default 1, or what the schedule needs.",
        also=("--virtual-pipeline-model-parallel-size",),
    )
    microbatch_group_size_per_virtual_pipeline_stage: int | None = option(
        None,
        "--microbatch-group-size-per-virtual-pipeline-stage",
        "Micro-batches that pass through a stage together when interleaved; default the pipeline ranks.",
        unit="micro-batches",
        also=("--microbatch-group-size-per-vp-stage",),
    )
    pipeline_model_parallel_layout: str | None = option(
        None,
        "--pipeline-model-parallel-layout",
        'What each stage holds, such as "Et*3|t*4|t*4|t*3L": E embedding, t layer, L output; | ends a stage.',
    )
    pipeline_split_costs: str | None = option(
        None,
        "--pipeline-split-costs",
        "Split so that the slowest stage is fastest: formula, or costs E,t,...,t,L of embedding, layers and output.",
    )
    pipeline_memory_limit_gb: float | None = option(
        None, "--pipeline-memory-limit-gb", "What --pipeline-schedule auto may use on a rank.", unit="GiB"
    )
    decoder_first_pipeline_num_layers: int | None = option(
        None, "--decoder-first-pipeline-num-layers", "Layers on the first stage; the rest are split evenly."
    )
    decoder_last_pipeline_num_layers: int | None = option(
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
        "What the data-parallel ranks shard: 0 nothing, 1 the optimizer state, 2 also gradients, 3 also weights.",
        choices=(0, 1, 2, 3),
    )
    zero_shard_size: int | None = option(
        None,
        "--zero-shard-size",
        "Shard within groups of this many consecutive data-parallel ranks and replicate across groups; default: all.",
    )
    zero_prefetch_units: int = option(
        1, "--zero-prefetch-units", "Layers ahead whose weights are on their way, with --zero-stage 3; 0 is none."
    )
    use_distributed_optimizer: bool = switch("--use-distributed-optimizer", "The same as --zero-stage 1.")
    grad_reduce_in_bf16: bool = switch("--grad-reduce-in-bf16", "Keep and reduce gradients in bf16; default fp32.")
    overlap_grad_reduce: bool = off_switch(
        "--no-overlap-grad-reduce", "Reduce gradients after the last backward instead of during it."
    )
    overlap_param_gather: bool = switch(
        "--overlap-param-gather", "Let the gathers of updated weights run into the next forward (--zero-stage 1 and 2)."
    )
    offload_optimizer: str = option(
        "none",
        "--offload-optimizer",
        "Where master weights and optimizer state live: none on the device, cpu in host memory, nvme in files.",
        choices=OFFLOAD_PLACES,
    )
    offload_params: str = option(
        "none",
        "--offload-params",
        "Where the sharded weights of --zero-stage 3 live between uses.",
        choices=OFFLOAD_PLACES,
    )
    offload_activations: bool = switch(
        "--offload-activations",
        "With full recomputation: keep the inputs of layers in host memory, on a CPU in files, until the backward.",
    )
    offload_dir: str | None = option(
        None, "--offload-dir", "Where offload files take their space: a directory on a local disk of each machine."
    )
    offload_delayed_update: bool = switch(
        "--offload-delayed-update",
        "Update offloaded weights beside the next forward and backward, which then use weights one update old.",
    )
    device: str | None = option(
        None, "--device", "Where to run; default cuda where there is one, else cpu.", choices=("cpu", "cuda")
    )
    distributed_timeout_minutes: float = option(
        10.0, "--distributed-timeout-minutes", "A collective that takes longer ends the job.", unit="minutes"
    )

    def context_kind_of(self, layer: int) -> str:
        """How a layer attends over context-parallel ranks."""
        kinds = self.cp_comm_type or ("allgather",)
        return kinds[layer if len(kinds) > 1 else 0]

    @property
    def context_head_ranks(self) -> int:
        """Consecutive context-parallel ranks that exchange heads in layers of kind a2a+p2p; 1 where no layer is, or no
        sample is cut."""
        sizes = self.hierarchical_context_parallel_sizes
        is_asked = self.context_parallel_size > 1 and sizes and "a2a+p2p" in self.cp_comm_type
        return int(sizes[0]) if is_asked else 1


@dataclass(frozen=True)
class ParallelConfig(GivenParallel):
    """The layout of a number of ranks."""

    data_parallel_size: int = 1
    world_size: int = 1
    virtual_stages: int | None = None
    context_cut: str = "contiguous"

    @property
    def overlap_chunks(self) -> int:
        """Chunks in which products of tensor-parallel layers and their collectives run beside each other; 1 is none."""
        overlaps = self.tp_comm_overlap and self.tensor_model_parallel_size > 1
        return self.tp_comm_overlap_chunks if overlaps else 1
