"""What becomes of Megatron-LM's flags that are no option of ours: a synonym, accepted with a line, or refused by name.

The rule: a flag is *accepted* where leaving it out changes neither the trained weights nor what is read, so an old
launch script starts and says in one line what it lost (speed hints, kernels, log lines, storage formats). A flag that
would change the model, the data or the optimizer is *refused*, with what to use instead. A *synonym* sets one of our
options to a fixed value; it yields to that option's own flag.

The lists follow the arguments of Megatron-LM from 2019 to 2026. Anything else is an unknown flag (see `cli.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Accepted:
    """Flags without meaning here, by how many values follow: none (`switches`), one (`valued`), any (`lists`)."""

    reason: str
    switches: str = ""
    valued: str = ""
    lists: str = ""


@dataclass(frozen=True)
class Refused:
    """Flags of a feature that is not here: exact names, and prefixes that end in a hyphen."""

    instead: str
    flags: str = ""
    prefixes: str = ""


# Later rows win over earlier ones, as rotary positions do over --no-position-embedding in Megatron-LM.
SYNONYMS: Mapping[str, Mapping[tuple[str, str], Any]] = MappingProxyType(
    {
        "--no-position-embedding": {("model", "position_embedding_type"): "none"},
        "--use-rotary-position-embeddings": {("model", "position_embedding_type"): "rope"},
        "--multi-query-attention": {("model", "group_query_attention"): True, ("model", "num_query_groups"): 1},
        "--erf-gelu": {("model", "activation"): "gelu"},
        "--checkpoint-attention": {("train", "recompute_granularity"): "selective"},
        "--checkpoint-activations": {
            ("train", "recompute_granularity"): "full",
            ("train", "recompute_method"): "uniform",
        },
    }
)

ACCEPTED: tuple[Accepted, ...] = (
    Accepted(
        "there is one implementation of the model, in torch with Triton kernels",
        switches="--use-mcore-models --use-legacy-models --enable-experimental --use-te-activation-func",
        valued="--transformer-impl",
    ),
    Accepted(
        "kernels are chosen by device and dtype, and fused where that is faster",
        switches="""
        --masked-softmax-fusion --no-masked-softmax-fusion --scaled-masked-softmax-fusion
        --no-scaled-masked-softmax-fusion --scaled-upper-triang-masked-softmax-fusion --bias-gelu-fusion
        --no-bias-gelu-fusion --bias-swiglu-fusion --no-bias-swiglu-fusion --bias-dropout-fusion
        --no-bias-dropout-fusion --no-rope-fusion --cross-entropy-loss-fusion --no-gradient-accumulation-fusion
        --no-gradient-reduce-div-fusion --no-persist-layer-norm --disable-jit-fuser --fused-residual-rmsnorm
        --use-fused-weighted-squared-relu --use-transformer-engine-op-fuser
        --disable-bf16-reduced-precision-matmul""",
        valued="--cross-entropy-fusion-impl --onnx-safe",
    ),
    Accepted(
        "attention runs through torch's scaled_dot_product_attention, with its softmax in fp32",
        switches="""
        --use-flash-attn --attention-softmax-in-fp32 --apply-query-key-layer-scaling --no-query-key-layer-scaling
        --fp32-layernorm""",
        valued="--attention-backend --flash-attention-version",
    ),
    Accepted(
        "gradients are kept and summed in fp32 unless --grad-reduce-in-bf16 is given, and weights in fp32",
        switches="""
        --accumulate-allreduce-grads-in-fp32 --fp32-allreduce --fp32-embedding --fp32-tokentypes
        --ddp-reduce-scatter-with-fp32-accumulation""",
    ),
    Accepted(
        "flat gradient buffers per block replace it, reduced during the last backward unless --no-overlap-grad-reduce",
        switches="""
        --no-contiguous-buffers-in-local-ddp --use-contiguous-buffers-in-ddp --overlap-grad-reduce
        --ddp-average-in-collective --no-delay-grad-reduce --no-align-grad-reduce --disable-align-grad-reduce
        --ddp-pad-buckets-for-high-nccl-busbw""",
        valued="""
        --DDP-impl --ddp-bucket-size --ddp-num-buckets --distrib-opt-comm-mem-savings
        --disrib-opt-comm-mem-savings""",
    ),
    Accepted(
        "--exp-avg-dtype and --exp-avg-sq-dtype say by themselves how the optimizer keeps its state",
        switches="--use-precision-aware-optimizer",
    ),
    Accepted(
        "when the updated weights are gathered changes no result",
        switches="""
        --overlap-param-gather-with-optimizer-step --delay-param-gather
        --align-param-gather --no-align-param-gather""",
    ),
    Accepted(
        "when and through which buffers ranks communicate changes no result",
        switches="""
        --no-async-tensor-model-parallel-allreduce --async-tensor-model-parallel-allreduce
        --async-tensor-parallel-allreduce --scatter-gather-tensors-in-pipeline
        --no-scatter-gather-tensors-in-pipeline --use-ring-exchange-p2p --overlap-p2p-communication
        --no-overlap-p2p-communication --overlap-p2p-communication-warmup-flush --defer-embedding-wgrad-compute
        --delay-wgrad-compute --tp-comm-overlap --tp-comm-overlap-rs-dgrad --tp-comm-bulk-dgrad
        --tp-comm-bulk-wgrad --tp-comm-split-ag --tp-comm-split-rs --disable-tp-comm-bulk-dgrad
        --disable-tp-comm-bulk-wgrad --disable-tp-comm-overlap-ag --disable-tp-comm-overlap-rs
        --disable-tp-comm-split-ag --disable-tp-comm-split-rs --no-tp-comm-bulk-dgrad --no-tp-comm-bulk-wgrad
        --no-tp-comm-overlap-ag --no-tp-comm-overlap-rs --no-tp-comm-split-ag --no-tp-comm-split-rs
        --no-clone-scatter-output-in-embedding --disable-clone-scatter-output-in-embedding --use-nccl-ub
        --use-sharp --disable-symmetric-registration --create-all-gather-group --high-priority-a2a-comm-stream
        --use-pipelining""",
        valued="""
        --wgrad-deferral-limit --tp-comm-overlap-cfg --tp-comm-bootstrap-backend --symmetric-ar-type
        --nccl-communicator-config-path --sharp-enabled-group --pipeline-model-parallel-comm-backend
        --suggested-communication-unit-size""",
        lists="--high-priority-stream-groups",
    ),
    Accepted(
        "the launcher and --device decide where ranks run and how they talk",
        switches="--disable-gloo-process-groups --initialize-socket-comms",
        valued="""
        --local-rank --local_rank --distributed-backend --distributed-timeout-seconds-after-init --lazy-mpu-init""",
    ),
    Accepted(
        "initial weights depend on the seed and the parameter's name alone",
        switches="""
        --use-cpu-initialization --use-gpu-initialization --no-initialization --deep-init
        --init-model-with-meta-device""",
    ),
    Accepted(
        "memory is managed by torch and the schedule",
        switches="""
        --manual-gc --no-manual-gc-eval --disable-manual-gc-eval --distribute-saved-activations
        --distribute-checkpointed-activations --distribute-recomputed-activations --deallocate-pipeline-outputs
        --model-parallel-memory-opt --enable-cuda-graph --external-cuda-graph""",
        valued="""
        --manual-gc-interval --empty-unused-memory-level --empty-unused-memory-each-iter --cuda-graph-impl
        --cuda-graph-warmup-steps --mlp-chunks-for-training""",
        lists="--cuda-graph-scope --cuda-graph-modules",
    ),
    Accepted(
        "checkpoints have one format, which any layout writes in parallel, verifies and loads",
        switches="""
        --use-dist-ckpt --auto-detect-ckpt-format --ckpt-fully-parallel-save --no-ckpt-fully-parallel-save
        --ckpt-fully-parallel-load --ckpt-assume-constant-structure --async-save --use-persistent-ckpt-worker
        --dist-ckpt-optim-fully-reshardable --distrib-optim-fully-reshardable-mem-efficient
        --dist-ckpt-save-pre-mcore-014 --exit-on-missing-checkpoint --verify-integrity --save-optim --load-optim
        --async-ckpt-use-cpu-shm --ckpt-fully-parallel-load-per-rank-objects --ckpt-pg-tensors-cache-create
        --ckpt-drop-redundant-extra-state --no-ckpt-load-validate-sharding-integrity
        --disable-ckpt-load-validate-sharding-integrity --disable-msc --no-save-tokenizer-assets
        --disable-save-tokenizer-assets""",
        valued="""
        --ckpt-format --dist-ckpt-format --dist-ckpt-strictness --dist-ckpt-workers --async-strategy
        --save-retain-interval --override-checkpoint-version --async-ckpt-cpu-priority --async-ckpt-io-priority
        --ckpt-fully-parallel-load-exchange-algo --ckpt-fully-parallel-load-process-group
        --ckpt-fully-parallel-save-process-group --ckpt-pg-tensors-cache-path""",
    ),
    Accepted(
        "random numbers are derived from the seed, the step and the place in the model, so no state is stored",
        switches="""
        --no-load-rng --no-save-rng --disable-load-rng --disable-save-rng --save-rng --load-rng --save-all-rng
        --load-all-rng --te-rng-tracker""",
    ),
    Accepted(
        "token files are mapped, and samples are computed from their number, so there is no index to build or cache",
        switches="""
        --mmap-warmup --skip-mmap-warmup --no-mmap-bin-files --no-data-sharding --resume-dataloader
        --no-create-attention-mask-in-dataloader --dataloader-fast-cache-load --dataloader-defer-npy-index-mmap""",
        valued="""
        --data-impl --data-cache-path --cache-dir --num-dataset-builder-threads --mid-level-dataset-surplus
        --object-storage-cache-path --s3-cache-path""",
    ),
    Accepted(
        "losses are summed and divided once by the global token count",
        switches="--calculate-per-token-loss",
    ),
    Accepted(
        "the log always has loss, learning rate, gradient norm, tokens/s, TFLOP/s and memory, and nothing else",
        switches="""
        --log-throughput --log-params-norm --log-num-zeros-in-grad --log-zeros --log-progress --log-energy
        --log-timers-to-tensorboard --log-memory-to-tensorboard --no-log-memory-to-tensorboard
        --log-batch-size-to-tensorboard --log-validation-ppl-to-tensorboard --log-world-size-to-tensorboard
        --no-log-learnig-rate-to-tensorboard --no-log-loss-scale-to-tensorboard
        --disable-log-loss-scale-to-tensorboard --log-throughput-to-tensorboard --log-l2-norm-grad-to-tensorboard
        --log-runtime-to-tensorboard --log-straggler --log-max-attention-logit --log-device-memory-used
        --disable-straggler-on-startup --check-for-spiky-loss --check-for-large-grads --no-filter-warnings
        --disable-filter-warnings --set-level-for-all-loggers --no-barrier-with-level-1-timing""",
        valued="""
        --logging-level --timing-log-level --timing-log-option --tensorboard-log-interval --tensorboard-queue-size
        --log-memory-interval --straggler-ctrlr-port --straggler-minmax-count --config-logger-dir
        --throughput-window-size --runtime-time-unit --wandb-entity --app-tag-run-name --app-tag-run-version
        --save-config-filepath --memory-keys""",
        lists="--report-topk-accuracies --modules-to-filter",
    ),
    Accepted(
        "this version writes no profile",
        switches="""
        --profile --use-pytorch-profiler --record-memory-history --nvtx-ranges --record-shapes
        --pytorch-profiler-collect-callstack --pytorch-profiler-collect-chakra --pytorch-profiler-collect-shapes""",
        valued="--profile-step-start --profile-step-end --memory-snapshot-path",
        lists="--profile-ranks",
    ),
    Accepted(
        "the run reports to its own log, TensorBoard and metrics file, and to no other service",
        switches="""
        --enable-one-logger --no-one-logger --one-logger-async --enable-ft-package --calc-ft-timeouts
        --adlr-autoresume --enable-onelogger --test-mode --run-workload-inspector-server --otel-enabled""",
        valued="""
        --one-logger-project --one-logger-run-name --one-logger-entity --adlr-autoresume-interval
        --otel-service-name --otel-span-groups --ft-num-warmup-iters --result-rejected-tracker-filename
        --gpu-sniff-test-interval""",
    ),
    Accepted(
        "results depend on the seed and the layout alone, and a damaged step is an error",
        switches="--deterministic-mode --batch-invariant-mode --exit-signal-handler-for-dataloader",
        valued="""
        --rerun-mode --batch-invariant-backend --train-sync-interval
        --check-weight-hash-across-dp-replicas-interval""",
    ),
)

REFUSED: tuple[Refused, ...] = (
    Refused(
        "mixtures of experts are not in this version; train the dense model without it",
        flags="""
        --num-experts --expert-parallel --expert-tensor-parallel-size --overlap-moe-expert-parallel-comm
        --expert-tensor-parallel-num-weight-shards --use-grouped-gemm-for-dense-mlp
        --use-grouped-gemm-for-shared-expert --overlap-dispatch-backward-with-experts-wgrad
        --ep-overlap-early-attn-memory-release""",
        prefixes="--moe- --inference-moe-",
    ),
    Refused(
        "context parallelism is not in this version; use --sequence-parallel with --tensor-model-parallel-size",
        flags="""
        --hierarchical-context-parallel-sizes --hybrid-context-parallel --cp-comm-type --max-seqlen-per-cp-rank
        --max-seqlen-per-dp-cp-rank""",
    ),
    Refused(
        'a stage that holds the embedding alone is written in --pipeline-model-parallel-layout, such as "E|t*4|t*4L"',
        flags="--standalone-embedding-stage --standalone-embed-stage",
    ),
    Refused(
        "8-bit and 4-bit training are not in this version; use --bf16",
        flags="""
        --disable-fp8-wgrad --no-fp8-wgrad --keep-fp8-transpose-cache --first-last-layers-bf16
        --keep-fp8-transpose-cache-when-using-custom-fsdp --num-layers-at-start-in-bf16
        --num-layers-at-end-in-bf16 --te-precision-config-file --reuse-grad-buf-for-mxfp8-param-ag""",
        prefixes="--fp8- --fp4- --kitchen- --use-kitchen-",
    ),
    Refused(
        "use --zero-stage 1, 2 or 3, which share out optimizer state, gradients and weights over the data-parallel "
        "ranks, and --zero-shard-size for groups of them",
        flags="""
        --use-torch-fsdp2 --use-custom-fsdp --use-megatron-fsdp --data-parallel-sharding-strategy
        --torch-fsdp2-no-reshard-after-forward --outer-dp-sharding-strategy --enable-full-sharding-in-hsdp
        --num-distributed-optimizer-instances --no-use-layer-wise-param-layout --tensor-parallel-num-weight-shards
        --no-strict-fsdp-dtensor-load --disable-strict-fsdp-dtensor-load""",
        prefixes="--fsdp- --megatron-fsdp- --gtp-",
    ),
    Refused(
        "use --offload-optimizer cpu, which keeps all master weights and optimizer state in host memory and updates "
        "them there",
        flags="""
        --optimizer-cpu-offload --optimizer-offload-fraction --overlap-cpu-optimizer-d2h-h2d
        --use-torch-optimizer-for-cpu-offload --no-pin-cpu-grads --no-pin-cpu-params""",
    ),
    Refused(
        "gradients are reduced and weights updated in fp32, on the device of the weights; leave it out",
        flags="""
        --main-grads-dtype --main-params-dtype
        --optimizer-cuda-graph
        --load-main-params-from-ckpt --ddp-param-name-patterns-for-fp32-local-accumulation
        --dump-param-to-param-group-map""",
    ),
    Refused(
        "one learning rate holds for all parameters; use --lr and --min-lr",
        flags="--decoupled-lr --decoupled-min-lr --head-lr-mult --lr-warmup-percent",
        prefixes="--mup-",
    ),
    Refused(
        "biases and norms are not decayed, all else is; use --weight-decay",
        flags="--no-weight-decay-cond-type --apply-wd-to-qk-layernorm --use-mup",
    ),
    Refused(
        "residuals and losses have the precision of the layers; give neither --bf16 nor --fp16, or leave it out",
        flags="--fp32-residual-connection --fp16-lm-cross-entropy --embedding-weights-in-fp32",
    ),
    Refused(
        "weights start from a normal distribution; use --init-method-std",
        flags="--init-method-xavier-uniform --embedding-init-method-std --data-parallel-random-init",
    ),
    Refused(
        "use --swiglu, --squared-relu or --activation with one of its choices",
        flags="--quick-geglu --activation-func-clamp-value --glu-linear-offset",
    ),
    Refused(
        "positions are rotated without scaling; use --rotary-base and --rotary-percent",
        flags="""
        --use-rope-scaling --rope-scaling-factor --rotary-scaling-factor --mscale --mscale-all-dim --rope-type
        --rotary-seq-len-interpolation-factor --no-rope-freq --mrope-section
        --no-yarn-correction-range-round-to-int""",
        prefixes="--yarn- --relative-attention-",
    ),
    Refused(
        "use the attention of this version: full, causal, with MHA, GQA or MQA (--num-query-groups)",
        flags="""
        --window-size --window-attn-skip-freq --softmax-type --qk-l2-norm --multi-latent-attention --q-lora-rank
        --kv-lora-rank --qk-head-dim --qk-pos-emb-head-dim --v-head-dim --attention-output-gate
        --experimental-attention-variant --cache-mla-latents --mla-down-proj-fusion --qk-clip
        --disable-dsa-indexer-rotate-activation --disable-dsa-indexer-scoring-relu
        --no-dsa-indexer-rotate-activation --no-dsa-indexer-scoring-relu""",
        prefixes="--dsa- --linear- --gdp- --qk-clip-",
    ),
    Refused(
        "adapters are not in this version; train all weights, with --finetune to start from a checkpoint",
        prefixes="--lora --peft",
    ),
    Refused(
        "use --rampup-batch-size START INCREMENT SAMPLES, --step-batch-size-schedule or --global-batch-size",
        flags="""
        --decrease-batch-size-if-needed --num-microbatches --num-microbatches-in-minibatch
        --phase-transition-iterations --max-num-samples""",
    ),
    Refused(
        "recompute whole layers or attention, by --recompute-granularity full or selective",
        flags="""
        --recompute-modules --cpu-offloading-num-layers --fine-grained-activation-offloading --offload-modules
        --min-offloaded-tensor-size --activation-offload-fraction --delay-offload-until-cuda-graph
        --delta-offload-bytes-across-pp-ranks""",
        prefixes="--cpu-offloading- --fine-grained-offloading-",
    ),
    Refused(
        "raw text is prepared once by tools/preprocess_data.py; then use --data-path PREFIX",
        flags="""
        --train-data --valid-data --test-data --text-key --eval-text-key --loose-json --lazy-loader
        --presplit-sentences --use-tfrecords --use-npy-data-loader --delim --input-data-sizes-file --data-loader
        --shuffle --val-data-path --allow-trivial-doc""",
    ),
    Refused(
        "name the tokenizer by --tokenizer-type, with --tokenizer-model, or --vocab-file and --merge-file",
        flags="""
        --tokenizer-path --tokenizer-model-type --tokenizer-metadata --tokenizer-special-tokens --legacy-tokenizer
        --vocab-extra-ids --trust-remote-code --chat-template --use-gigatoken --no-pad-vocab-size
        --disable-pad-vocab-size --padded-vocab-size --allow-ambiguous-pad-tokens --tokenizer-sentencepiece-legacy""",
        prefixes="""
        --tokenizer-hf- --null-tokenizer- --tokenizer-sentencepiece- --disable-tokenizer-
        --no-tokenizer-""",
    ),
    Refused(
        "give the corpora of all splits by --data-path, or --train-data-path, --valid-data-path and --test-data-path; "
        "each is read in one seeded order",
        flags="""
        --per-split-data-args-path --per-dataset-sequences-path --dataloader-type --dataloader_type
        --renormalize-blend-weights --dataloader-inter-document-masking --full-validation
        --multiple-validation-sets --validation-set-names --sft --sft-tokenizer-prompt-format --epochs
        --data-epochs --sample-rate --data-per-class-fraction --classes-fraction --iter-per-epoch""",
        prefixes="--fim-",
    ),
    Refused(
        "evaluate during training by --eval-interval and --eval-iters",
        flags="""
        --skip-train --eval-batch-size --eval-seq-length --eval-max-preds-per-seq --start-eval-at-iter
        --eval-global-batch-size --eval-micro-batch-size --iterations-to-skip --overlapping-eval --strict-lambada
        --cloze-eval --eval-hf --load-openai""",
    ),
    Refused(
        "the model is described by the flags; take those of a checkpoint by --config CHECKPOINT/run.json",
        flags="""
        --use-checkpoint-args --use-mp-args-from-checkpoint-args --yaml-cfg --spec --model-spec
        --no-use-tokenizer-model-from-checkpoint-args --disable-use-tokenizer-model-from-checkpoint-args""",
        prefixes="--heterogeneous-",
    ),
    Refused(
        "use --load with --finetune, --ckpt-step or --keep-last, and tools/convert_checkpoint.py for other formats",
        flags="""
        --pretrained-checkpoint --bert-load --vit-load --pretrained-bert --most-recent-k --override-ckpt-iteration
        --save-iters --ckpt-convert-format --ckpt-convert-save --load-model-opt-format
        --ckpt-convert-update-legacy-dist-opt-format --exit-signal --validate-model-load""",
        prefixes="--non-persistent-",
    ),
    Refused(
        "Muon orthogonalises whole matrices at every layout, with torch's products; leave it out",
        flags="--muon-tp-mode --muon-use-syrk",
    ),
    Refused(
        "this model is not in this version; use pretrain_gpt.py's own model flags",
        flags="""
        --is-hybrid-model --encoder-tensor-model-parallel-size --encoder-pipeline-model-parallel-size
        --pipeline-model-parallel-split-rank --decoder-num-layers --decoder-seq-length --num-unique-layers
        --param-sharing-style --num-classes --num-channels --patch-dim --img-dim --img-h --img-w --mask-type
        --mask-factor --swin-backbone-type --use-regular-masking --use-random-spans --freeze-all-layers
        --async-indexer --projection-dim --pool-type --shared-query-context-model --cased-vocab --faiss-use-gpu
        --evidence-data-path --embedding-path --index-reload-interval --use-one-sent-docs --debug
        --enable-mhc-connections""",
        prefixes="""
        --retro- --block- --indexer- --cased- --ner- --hash- --mtp- --mamba- --hybrid- --mhc- --engram- --vision-
        --dino- --ict- --biencoder- --retriever- --disable-mamba-""",
    ),
    Refused(
        "BERT is masked by --mask-prob of all tokens; embeddings are not written while training",
        flags="""
        --bert-embedder-type --output-bert-embeddings --max-preds-per-seq --titles-data-path --query-in-block-prob""",
    ),
    Refused(
        "reinforcement learning and distillation are not in this version",
        flags="--perform-rl-step --refit-method --output-logit-dtype",
        prefixes="--rl- --grpo- --langrl- --logits-",
    ),
    Refused(
        "checkpoints are written by --save and --save-interval; single gradients or activations are not",
        prefixes="--save-activations- --save-dgrads- --save-wgrads- --save-params- --save-tokens-per-expert-",
        flags="--enable-msc",
    ),
    Refused(
        "text is generated by tools/generate_text.py",
        flags="""
        --sample-input-file --sample-output-file --num-samples --out-seq-length --genfile --greedy --recompute
        --temperature --top_k --top_p --flash-decode --enable-chunked-prefill --disable-chunked-prefill
        --max-tokens-to-oom --num-speculative-tokens --nccl-all-reduce-for-prefill --mlp-chunks-for-prefill
        --decode-only-cuda-graphs --use-legacy-static-engine""",
        prefixes="--inference-",
    ),
    Refused(
        "a failing rank ends the job, and the launcher starts it again from the latest checkpoint",
        flags="--replication --replication-jump --replication-factor --error-injection-rate --error-injection-type",
        prefixes="--inprocess- --fault-injector- --flight-recorder- --disable-flight-recorder- --no-flight-recorder-",
    ),
    Refused(
        "the order of ranks is tensor, then data, then pipeline, and cannot be changed",
        flags="--use-tp-pp-dp-mapping --fake-process-group",
    ),
)


# Values at which a refused flag asks for what is done anyway.
HARMLESS_VALUES: Mapping[str, str] = MappingProxyType(
    {
        "--dataloader-type": "single",
        "--softmax-type": "vanilla",
        "--rope-type": "rope",
        "--rotary-seq-len-interpolation-factor": "1",
        "--cp-comm-type": "p2p",
        "--data-parallel-sharding-strategy": "no_shard",
        "--num-distributed-optimizer-instances": "1",
        "--expert-tensor-parallel-size": "1",
        "--cpu-offloading-num-layers": "0",
        "--vocab-extra-ids": "0",
        "--head-lr-mult": "1.0",
        "--main-grads-dtype": "fp32",
        "--main-params-dtype": "fp32",
        "--muon-tp-mode": "duplicated",
    }
)


def accepted(flag: str) -> tuple[str, str] | None:
    """(reason, number of values) of a flag that is accepted without effect, the number as in argparse: 0, 1 or *."""
    for row in ACCEPTED:
        for arity, names in (("0", row.switches), ("1", row.valued), ("*", row.lists)):
            if flag in names.split():
                return row.reason, arity
    return None


def refused(flag: str) -> str | None:
    """What to use instead of a flag whose feature is not here, or None if the flag is not such a one."""
    for row in REFUSED:
        if flag in row.flags.split() or any(flag.startswith(prefix) for prefix in row.prefixes.split()):
            return row.instead
    return None
