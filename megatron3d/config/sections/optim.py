"""The optimizer, its schedules, and the numbers it works in."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron3d.config.fields import off_switch, option, switch
from megatron3d.config.update_rules import UPDATE_RULES


@dataclass(frozen=True)
class GivenOptim:
    """How weights are updated and in which precision, as it is given; `precision` follows from two switches."""

    optimizer: str = option(
        "adam",
        "--optimizer",
        "The update rule; adam is AdamW (decoupled decay).",
        choices=tuple(UPDATE_RULES),
    )
    optimizer_implementation: str = option(
        "torch",
        "--optimizer-implementation",
        "Whose fused Adam to use; the others must be installed.",
        choices=("torch", "apex", "transformer-engine"),
    )
    lr: float | None = option(None, "--lr", "Peak learning rate.")
    min_lr: float = option(0.0, "--min-lr", "Learning rate at the end of the decay.")
    lr_decay_style: str = option(
        "linear",
        "--lr-decay-style",
        "Shape of the decay.",
        choices=("constant", "linear", "cosine", "inverse-square-root", "WSD"),
    )
    lr_decay_iters: int | None = option(
        None, "--lr-decay-iters", "Iterations until min-lr; default --train-iters.", unit="iterations"
    )
    lr_decay_samples: int | None = option(
        None, "--lr-decay-samples", "Samples until min-lr; default --train-samples.", unit="samples"
    )
    lr_warmup_iters: int = option(0, "--lr-warmup-iters", "Iterations of linear warm-up.", unit="iterations")
    lr_warmup_samples: int = option(0, "--lr-warmup-samples", "Samples of linear warm-up.", unit="samples")
    lr_decay_tokens: int | None = option(
        None,
        "--lr-decay-tokens",
        "The decay length in tokens; without a sequence-length curriculum rounded to samples of --seq-length.",
        unit="tokens",
    )
    lr_warmup_tokens: int | None = option(
        None, "--lr-warmup-tokens", "The warm-up in tokens, rounded as --lr-decay-tokens.", unit="tokens"
    )
    lr_warmup_fraction: float | None = option(
        None, "--lr-warmup-fraction", "Warm-up as a fraction of the decay length.", also=("--warmup",)
    )
    lr_warmup_init: float = option(0.0, "--lr-warmup-init", "Learning rate at the start of the warm-up.")
    lr_wsd_decay_style: str = option(
        "exponential",
        "--lr-wsd-decay-style",
        "Shape of the last phase of WSD.",
        choices=("exponential", "linear", "cosine", "minus_sqrt"),
    )
    lr_wsd_decay_iters: int | None = option(
        None, "--lr-wsd-decay-iters", "Length of the last phase of WSD.", unit="iterations"
    )
    lr_wsd_decay_samples: int | None = option(
        None, "--lr-wsd-decay-samples", "Length of the last phase of WSD.", unit="samples"
    )
    weight_decay: float = option(0.01, "--weight-decay", "Decoupled weight decay of matrices.")
    start_weight_decay: float | None = option(
        None, "--start-weight-decay", "Weight decay at the start of its schedule.", also=("--start-wd",)
    )
    end_weight_decay: float | None = option(
        None, "--end-weight-decay", "Weight decay at the end of its schedule.", also=("--end-wd",)
    )
    weight_decay_incr_style: str = option(
        "constant",
        "--weight-decay-incr-style",
        "Shape of the weight-decay schedule.",
        choices=("constant", "linear", "cosine"),
        also=("--wd-incr-style",),
    )
    clip_grad: float = option(1.0, "--clip-grad", "Largest global gradient norm; 0 does not clip.")
    adam_beta1: float = option(0.9, "--adam-beta1", "First-moment coefficient.")
    adam_beta2: float = option(0.999, "--adam-beta2", "Second-moment coefficient.")
    adam_eps: float = option(1e-8, "--adam-eps", "Added to the square root of the second moment.")
    decoupled_weight_decay: bool = off_switch(
        "--no-decoupled-weight-decay", "Adam as first published: the decay is added to the gradient."
    )
    exp_avg_dtype: str = option(
        "fp32", "--exp-avg-dtype", "Dtype of the first moment (adam, lion, lamb).", choices=("fp32", "bf16")
    )
    exp_avg_sq_dtype: str = option(
        "fp32", "--exp-avg-sq-dtype", "Dtype of the second moment (adam, lamb).", choices=("fp32", "bf16")
    )
    sgd_momentum: float = option(0.9, "--sgd-momentum", "Momentum of SGD.")
    lion_beta1: float = option(0.95, "--lion-beta1", "Share of the momentum in the direction of Lion.")
    lion_beta2: float = option(0.98, "--lion-beta2", "Coefficient of the momentum of Lion.")
    muon_momentum: float = option(0.9, "--muon-momentum", "Momentum of Muon.")
    muon_nesterov: bool = switch(
        "--muon-nesterov", "Nesterov's momentum, as in the Muon of Jordan et al.", also=("--muon-use-nesterov",)
    )
    muon_split_qkv: bool = off_switch(
        "--muon-no-split-qkv", "Orthogonalise fused matrices (query, key, value; gate, up) as one."
    )
    muon_scale_mode: str = option(
        "spectral",
        "--muon-scale-mode",
        "How the update of Muon depends on the matrix's shape.",
        choices=("spectral", "unit_rms_norm", "shape_scaling"),
    )
    muon_extra_scale_factor: float = option(
        1.0, "--muon-extra-scale-factor", "Factor of Muon's update; 0.2 with spectral has the size of AdamW's."
    )
    muon_coefficient_type: str = option(
        "quintic",
        "--muon-coefficient-type",
        "Coefficients of the Newton-Schulz iteration.",
        choices=("simple", "quintic"),
    )
    muon_num_ns_steps: int = option(5, "--muon-num-ns-steps", "Newton-Schulz iterations of Muon.", unit="iterations")
    muon_fp32_matmul_prec: str = option(
        "high",
        "--muon-fp32-matmul-prec",
        "Products of the Newton-Schulz iteration: low and medium in bf16, high in fp32.",
        choices=("low", "medium", "high"),
    )
    muon_scalar_optimizer: str = option(
        "adam",
        "--muon-scalar-optimizer",
        "What updates tables, biases and norms beside Muon.",
        choices=("adam", "lion"),
    )
    bf16: bool = switch("--bf16", "Compute in bf16 with fp32 master weights.")
    fp16: bool = switch("--fp16", "Compute in fp16 with fp32 master weights and loss scaling.")
    loss_scale: float | None = option(None, "--loss-scale", "A fixed loss scale for fp16; default dynamic.")
    initial_loss_scale: float = option(2.0**32, "--initial-loss-scale", "First value of the dynamic loss scale.")
    min_loss_scale: float = option(
        1.0,
        "--min-loss-scale",
        "Smallest dynamic loss scale; non-finite gradients below it end the run.",
        also=("--min-scale",),
    )
    loss_scale_window: int = option(
        1000,
        "--loss-scale-window",
        "Finite steps after which the scale doubles, and the count of --hysteresis starts again.",
        unit="iterations",
    )
    hysteresis: int = option(
        2, "--hysteresis", "Non-finite steps after which the scale halves; a fixed one ends the run.", unit="iterations"
    )
    check_for_nan_in_loss_and_grad: bool = off_switch(
        "--no-check-for-nan-in-loss-and-grad",
        "Go on when a loss or gradient is not finite (fp32, bf16); weights that are not finite are never saved.",
        also=("--no-check-for-nan-in-loss", "--disable-check-for-nan-in-loss"),
    )

    @property
    def precision(self) -> str:
        """ "fp32", "bf16" or "fp16": what the layers compute in."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"


@dataclass(frozen=True)
class OptimConfig(GivenOptim):
    """How weights are updated, resolved: lengths are in the unit of the run, iterations or samples."""

    lr: float = field(kw_only=True)
