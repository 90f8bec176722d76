"""Names that other frameworks have for our options, for the hint at a flag that is not known.

The nearest spelling is a poor guide between frameworks: `--num-key-value-heads` of Hugging Face is near
`--num-attention-heads` and means `--num-query-groups`. So names are looked up here first, and only a near-identical
spelling is suggested otherwise. The names are those of Hugging Face's model configurations and TrainingArguments,
DeepSpeed, GPT-NeoX, torchtitan, nanoGPT, fairseq and NeMo.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# Our flag -> names elsewhere of the same value.
_SAME_VALUE = {
    "--num-layers": "num-hidden-layers n-layer n-layers layers depth encoder-layers decoder-layers",
    "--hidden-size": "n-embd d-model embed-dim embedding-dim hidden-dim model-dim dim encoder-embed-dim "
    "decoder-embed-dim width",
    "--num-attention-heads": "n-head n-heads num-heads heads attention-heads encoder-attention-heads "
    "decoder-attention-heads",
    "--num-query-groups": "num-key-value-heads num-kv-heads n-kv-head n-kv-heads kv-heads num-attention-heads-kv",
    "--ffn-hidden-size": "n-inner d-ff ffn-dim ffn-hidden-dim mlp-dim encoder-ffn-embed-dim decoder-ffn-embed-dim",
    "--seq-length": "block-size max-seq-len max-seq-length seq-len sequence-length context-length context-size "
    "n-ctx tokens-per-sample",
    "--max-position-embeddings": "n-positions max-positions max-target-positions",
    "--kv-channels": "head-dim dim-head attention-head-dim",
    "--norm-epsilon": "layer-norm-eps layer-norm-epsilon layernorm-eps rms-norm-eps rms-norm-epsilon norm-eps",
    "--rotary-base": "rope-theta rope-base rotary-emb-base rotary-position-embeddings-theta",
    "--rotary-percent": "rotary-pct partial-rotary-factor",
    "--rotary-scaling": "rope-scaling rope-scaling-type",
    "--rotary-low-freq-factor": "low-freq-factor",
    "--rotary-high-freq-factor": "high-freq-factor",
    "--rotary-attention-factor": "rope-attention-factor",
    "--activation": "hidden-act activation-function activation-fn",
    "--hidden-dropout": "dropout resid-pdrop residual-dropout hidden-dropout-prob",
    "--attention-dropout": "attn-pdrop attention-dropout-prob attention-probs-dropout-prob",
    "--init-method-std": "initializer-range init-std",
    "--micro-batch-size": "per-device-train-batch-size per-gpu-train-batch-size train-micro-batch-size-per-gpu "
    "device-batch-size local-batch-size mbs",
    "--global-batch-size": "train-batch-size total-batch-size gbs",
    "--gradient-accumulation-steps": "grad-accum-steps accumulate-grad-batches update-freq grad-acc-steps "
    "gradient-accumulation",
    "--train-iters": "max-steps max-iters max-update max-updates num-steps num-train-steps total-steps "
    "training-steps train-steps steps iterations num-iterations",
    "--lr": "learning-rate max-lr peak-lr",
    "--lr-decay-style": "lr-scheduler lr-scheduler-type lr-schedule",
    "--lr-warmup-iters": "warmup-steps warmup-iters warmup-updates lr-warmup-steps num-warmup-steps",
    "--lr-warmup-fraction": "warmup-ratio warmup-fraction",
    "--lr-decay-iters": "decay-steps lr-decay-steps",
    "--min-lr": "end-lr lr-min",
    "--clip-grad": "max-grad-norm max-norm gradient-clipping grad-clip clip-norm gradient-clip-val grad-norm-clip",
    "--weight-decay": "wd",
    "--adam-beta1": "beta1",
    "--adam-beta2": "beta2",
    "--adam-eps": "adam-epsilon",
    "--optimizer": "optim optimizer-type optimizer-name",
    "--save": "output-dir out-dir save-dir save-path checkpoint-dir checkpoint-folder ckpt-dir save-checkpoint",
    "--load": "resume-from-checkpoint resume-from load-dir restore-file load-checkpoint load-path",
    "--save-interval": "save-steps save-freq save-every checkpoint-interval save-interval-updates ckpt-interval",
    "--keep-last": "save-total-limit keep-latest-k keep-last-n-checkpoints keep-last-epochs",
    "--eval-interval": "eval-steps eval-freq eval-every validate-interval val-check-interval",
    "--log-interval": "logging-steps log-freq log-every print-freq steps-per-print",
    "--tensorboard-dir": "logging-dir tensorboard-logdir tb-dir",
    "--wandb-exp-name": "wandb-name wandb-run-name",
    "--num-workers": "dataloader-num-workers",
    "--data-path": "dataset data data-dir dataset-path dataset-name train-file train-files data-prefix",
    "--tokenizer-model": "tokenizer tokenizer-file tokenizer-name tokenizer-dir",
    "--merge-file": "merges-file merges",
    "--tensor-model-parallel-size": "tensor-parallel-size tensor-parallel-degree tensor-parallel tp tp-size tp-degree "
    "tensor-parallelism",
    "--pipeline-model-parallel-size": "pipeline-parallel-size pipeline-parallel-degree pipeline-parallel pp pp-size "
    "pp-degree pipe-parallel-size",
    "--context-parallel-size": "cp cp-size context-parallel-degree",
    "--expert-model-parallel-size": "ep ep-size expert-parallel-degree",
    "--zero-stage": "zero zero-optimization-stage zero-level zero-redundancy-stage",
    "--seed": "random-seed",
    "--recompute-activations": "gradient-checkpointing activation-checkpointing use-activation-checkpointing",
    "--use-rotary-position-embeddings": "rope use-rope rotary",
    "--untie-embeddings-and-output-weights": "no-tie-word-embeddings no-share-input-output-embed",
    "--disable-bias-linear": "no-bias no-linear-bias",
}

# Names whose value needs another form here: what to write instead.
_ADVICE = {
    "name the update rule by --optimizer, such as --optimizer adam": "adam adamw sgd lion lamb muon adafactor",
    "write --bf16 or --fp16; neither means fp32": "dtype precision mixed-precision torch-dtype param-dtype "
    "train-precision fp32",
    "the data-parallel size follows from the ranks that torchrun starts: ranks / (tensor x pipeline)": "dp dp-size "
    "data-parallel-size data-parallel-degree data-parallel data-parallel-replicate-degree data-parallel-shard-degree",
    "use --zero-stage 3, which shards weights, gradients and optimizer state": "fsdp sharding-strategy zero3 "
    "use-fsdp full-sharding",
    "use --offload-optimizer cpu, and with --zero-stage 3 --offload-params cpu": "offload zero-offload "
    "fsdp-offload-params",
    "give the length by --train-iters, --train-samples or --train-tokens": "num-train-epochs num-epochs epoch "
    "max-epoch max-epochs",
    "ranks are started by torchrun --nproc-per-node N --nnodes M": "gpus num-gpus n-gpus ngpus nproc-per-node "
    "nproc nnodes num-nodes world-size devices",
    "output layer and embedding are tied unless --untie-embeddings-and-output-weights is given": "tie-word-embeddings "
    "tie-embeddings share-input-output-embed share-decoder-input-output-embed",
    "tools/estimate.py predicts the memory of a run without starting it": "dry-run dryrun",
    "write --compile, or nothing for blocks as they are": "torch-compile no-compile torch-compile-backend",
    "write both by --adam-beta1 and --adam-beta2": "betas adam-betas",
    "use --tensorboard-dir, --wandb-project or --metrics-file": "report-to log-file log-dir",
    "start it by torchrun, once on each node": "launcher master-addr master-port node-rank rdzv-endpoint",
    "use --moe-token-drop-policy random, with --moe-expert-capacity-factor": "use-rts rts moe-use-rts",
}


def _by_name(rows: Mapping[str, str]) -> Mapping[str, str]:
    return MappingProxyType({name: target for target, names in rows.items() for name in names.split()})


OPTION_BY_FOREIGN_NAME: Mapping[str, str] = _by_name(_SAME_VALUE)
ADVICE_BY_FOREIGN_NAME: Mapping[str, str] = _by_name(_ADVICE)


def plain_name(flag: str) -> str:
    """A flag as the tables have it: without leading hyphens, in small letters, with hyphens between its parts."""
    return flag.lstrip("-").replace("_", "-").replace(".", "-").lower()
