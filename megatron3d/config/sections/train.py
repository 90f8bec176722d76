"""How long to train, in which batches, and what to report on the way."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron3d.config.fields import option, options, switch
from megatron3d.config.sections.fp8 import GivenFp8
from megatron3d.config.sections.random_ltd import GivenRandomLtd

MATMUL_CHOICES = ("auto", "onednn", "mkl")
ATTENTION_BACKENDS = ("auto", "flash", "fused", "unfused", "local")
FP32_PRECISIONS = ("highest", "high", "medium")
KERNEL_CHOICES = ("auto", "reference", "triton")
PACKED_ATTENTION_CHOICES = ("torch", "flash-attn")


@dataclass(frozen=True)
class GivenTrain(GivenRandomLtd, GivenFp8):
    """The run as it is given. Its length is train_iters, or train_samples and train_tokens, of which the first to be
    reached counts.
    """

    micro_batch_size: int | None = option(
        None,
        "--micro-batch-size",
        "Samples of one forward of one data-parallel rank, B.",
        unit="samples",
        also=("--batch-size",),
    )
    global_batch_size: int | None = option(
        None, "--global-batch-size", "Samples of one optimizer step; default micro-batch x DP.", unit="samples"
    )
    gradient_accumulation_steps: int | None = option(
        None,
        "--gradient-accumulation-steps",
        "Micro-batches of one optimizer step on each data-parallel rank; sets --global-batch-size where that is left "
        "out.",
        unit="micro-batches",
    )
    rampup_batch_size: tuple[str, ...] = options(
        "--rampup-batch-size", "START INCREMENT SAMPLES: grow the global batch linearly over SAMPLES samples."
    )
    step_batch_size_schedule: str | None = option(
        None,
        "--step-batch-size-schedule",
        "TOKENS:SIZE pairs, such as '0:16 2.4B:320': the global batch from each count of tokens on (K, M, B, T).",
    )
    train_iters: int | None = option(None, "--train-iters", "Optimizer steps.", unit="iterations")
    train_samples: int | None = option(None, "--train-samples", "Samples.", unit="samples")
    train_tokens: int | None = option(
        None,
        "--train-tokens",
        "Tokens: the run ends with the first step that reaches them, or at --train-samples if that is sooner.",
        unit="tokens",
    )
    iterations_to_skip: tuple[str, ...] = options(
        "--iterations-to-skip",
        "Iterations, counted from 0 as in Megatron-LM, that consume their samples without training: N is step N + 1.",
    )
    freeze_params: tuple[str, ...] = options(
        "--freeze-params",
        "Patterns of full names of parameters that do not train, such as 'embedding.*' (docs/freezing.md).",
    )
    eval_interval: int = option(1000, "--eval-interval", "Steps between evaluations.", unit="iterations")
    eval_iters: int = option(
        100, "--eval-iters", "Global batches of one evaluation; 0 does not evaluate.", unit="iterations"
    )
    exit_interval: int | None = option(
        None, "--exit-interval", "Save and stop at a multiple of this (docs/stopping.md).", unit="iterations"
    )
    exit_duration_in_mins: float | None = option(
        None, "--exit-duration-in-mins", "Save and stop this time after the start of the process.", unit="minutes"
    )
    exit_signal_handler: bool = switch(
        "--exit-signal-handler",
        "Stop on SIGTERM, SIGINT and SIGUSR1 with a save; this is always on, with or without the flag.",
        also=("--exit-signal-handler-for-training",),
    )
    log_interval: int = option(100, "--log-interval", "Steps between log lines.", unit="iterations")
    tensorboard_dir: str | None = option(None, "--tensorboard-dir", "Where TensorBoard events go (docs/reports.md).")
    wandb_project: str = option("", "--wandb-project", "Weights & Biases project; needs the wandb package.")
    wandb_entity: str = option("", "--wandb-entity", "Weights & Biases user or team; default your own.")
    wandb_exp_name: str = option("", "--wandb-exp-name", "Weights & Biases run name.")
    wandb_save_dir: str = option("", "--wandb-save-dir", "Weights & Biases directory.")
    metrics_file: str | None = option(None, "--metrics-file", "JSON lines: one record a step (docs/reports.md).")
    check_weight_hash_across_dp_replicas_interval: int | None = option(
        None,
        "--check-weight-hash-across-dp-replicas-interval",
        "Compare hashes of all values that several ranks hold this often; before a save it is always done.",
        unit="iterations",
    )
    recompute_granularity: str | None = option(
        None,
        "--recompute-granularity",
        "Recompute activations: whole layers, or attention alone.",
        choices=("full", "selective"),
        also=("--checkpoint-granularity",),
    )
    recompute_activations: bool = switch("--recompute-activations", "The same as --recompute-granularity selective.")
    recompute_method: str | None = option(
        None,
        "--recompute-method",
        "With full: in uniform groups (default), or the first layers of each stage.",
        choices=("uniform", "block"),
        also=("--activations-checkpoint-method", "--checkpoint-method"),
    )
    recompute_num_layers: int | None = option(
        None,
        "--recompute-num-layers",
        "Layers of a group (uniform, default 1) or layers recomputed (block).",
        also=("--checkpoint-num-layers", "--activations-checkpoint-num-layers"),
    )
    recompute_reuse_communication: bool = switch(
        "--recompute-reuse-communication",
        "With full: keep what the collectives of layers give, so that recomputing them communicates nothing.",
        also=("--moe-comm-aware-checkpointing",),
    )
    loss_chunk_size: int | None = option(
        None,
        "--loss-chunk-size",
        "Compute logits and losses for at most so many positions at a time (docs/long_context.md).",
        unit="tokens",
    )
    mlp_chunks_for_training: int = option(
        1,
        "--mlp-chunks-for-training",
        "Run each MLP over so many chunks of the sequence, also again in the backward (docs/long_context.md).",
        unit="chunks",
    )
    matmul: str = option(
        "auto",
        "--matmul",
        "The library of fp32 products on a CPU: torch's own (mkl), oneDNN, or by a measurement at the first start.",
        choices=MATMUL_CHOICES,
    )
    attention_backend: str = option(
        "auto",
        "--attention-backend",
        "The kernel of attention: FlashAttention (flash), cuDNN (fused), two products and a softmax (unfused, local), "
        "or by device, dtype and mask (docs/gpu.md).",
        choices=ATTENTION_BACKENDS,
    )
    fp32_matmul_precision: str = option(
        "highest",
        "--fp32-matmul-precision",
        "How a GPU multiplies fp32 matrices, by torch's names: in fp32 (highest), in TF32 (high), or in bf16 where "
        "that is faster (medium).",
        choices=FP32_PRECISIONS,
    )
    packed_attention: str = option(
        "torch",
        "--packed-attention",
        "The CUDA kernel of attention within documents (--reset-attention-mask): torch's own, or that of the package "
        "flash-attn.",
        choices=PACKED_ATTENTION_CHOICES,
    )
    kernels: str = option(
        "auto",
        "--kernels",
        "Which of a kernel's two implementations runs: by device (auto), plain torch, or Triton (docs/kernels.md).",
        choices=KERNEL_CHOICES,
    )
    compile: bool = switch(
        "--compile", "Let torch.compile fuse what lies between the products of each block (docs/kernels.md)."
    )
    peak_tflops: float | None = option(
        None, "--peak-tflops", "Peak of one device, for MFU where the device is not known.", unit="TFLOP/s"
    )
    profile_pipeline: str | None = option(
        None, "--profile-pipeline", "Folder for a picture and a trace of when each rank computed what in one step."
    )
    profile_pipeline_step: int = option(
        3, "--profile-pipeline-step", "The step to record, counted from the start of this process.", unit="iterations"
    )
    profile: bool = switch("--profile", "Write a trace of some iterations for Perfetto, and where their time went.")
    profile_step_start: int = option(
        10, "--profile-step-start", "The first iteration that --profile records, counted from 0.", unit="iterations"
    )
    profile_step_end: int = option(
        12, "--profile-step-end", "The iteration before which --profile ends.", unit="iterations"
    )
    profile_ranks: tuple[str, ...] = options(
        "--profile-ranks", "Global ranks that --profile records; rank 0 if none is given."
    )
    profile_dir: str = option("profile", "--profile-dir", "Folder that --profile writes to.")

    def skips(self, iteration: int) -> bool:
        """Whether --iterations-to-skip lists this iteration, counted from 0."""
        return any(int(word) == iteration for word in self.iterations_to_skip)


@dataclass(frozen=True)
class DraftTrain(GivenTrain):
    """The run with what can be derived, which may still lack a batch size. Tokens have become samples.

    `batch_size_steps` is --step-batch-size-schedule as pairs of a count of consumed samples and the global batch size
    from there on. `length_levels` are those of a sequence-length curriculum (`config/lengths.py`), pairs of a step,
    counted from 0, and the length of samples from there on; with `splits_samples` a sample becomes several rows.
    """

    batch_size_steps: tuple[tuple[int, int], ...] = ()
    length_levels: tuple[tuple[int, int], ...] = ()
    splits_samples: bool = False


@dataclass(frozen=True)
class TrainConfig(DraftTrain):
    """The run, resolved: its batches are known."""

    micro_batch_size: int = field(kw_only=True)
    global_batch_size: int = field(kw_only=True)
