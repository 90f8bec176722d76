"""Flags of Megatron-LM that are accepted with a line, and nothing more: nobody counts on their effect.

Each row says, truthfully of each of its flags, what is done instead. The lookups are in `megatron.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["how", "done", "report"]


@dataclass(frozen=True)
class Accepted:
    """Flags without effect here, by how many values follow: none (`switches`), one (`valued`), any (`lists`).

    `kind` says why nobody counts on them: they choose *how* the same result is reached (speed, memory, formats), they
    ask for what is *done* anyway, or they ask for a *report* that `reason` names another source of.
    """

    kind: Kind
    reason: str
    switches: str = ""
    valued: str = ""
    lists: str = ""


ACCEPTED: tuple[Accepted, ...] = (
    Accepted(
        "how",
        "there is one implementation of the model, in torch with Triton kernels",
        switches="--use-mcore-models --use-legacy-models --enable-experimental --use-te-activation-func",
        valued="--transformer-impl",
    ),
    Accepted(
        "how",
        "kernels are chosen by device and dtype, and fused where that is faster",
        switches="""
        --masked-softmax-fusion --no-masked-softmax-fusion --scaled-masked-softmax-fusion
        --no-scaled-masked-softmax-fusion --scaled-upper-triang-masked-softmax-fusion --bias-gelu-fusion
        --no-bias-gelu-fusion --bias-swiglu-fusion --no-bias-swiglu-fusion --bias-dropout-fusion
        --no-bias-dropout-fusion --no-rope-fusion --cross-entropy-loss-fusion --no-gradient-accumulation-fusion
        --no-gradient-reduce-div-fusion --no-persist-layer-norm --disable-jit-fuser --fused-residual-rmsnorm
        --use-fused-weighted-squared-relu --use-transformer-engine-op-fuser --use-flash-attn""",
        valued="--cross-entropy-fusion-impl --onnx-safe --attention-backend --flash-attention-version",
    ),
    Accepted(
        "done",
        "attention computes its softmax in fp32, and norms their statistics",
        switches="--attention-softmax-in-fp32 --fp32-layernorm",
    ),
    Accepted(
        "how",
        "scores of attention are scaled once, by the square root of the head size, which is the same function",
        switches="--apply-query-key-layer-scaling --no-query-key-layer-scaling",
    ),
    Accepted(
        "done",
        "gradients are kept and summed in fp32 unless --grad-reduce-in-bf16 is given",
        switches="--accumulate-allreduce-grads-in-fp32 --fp32-allreduce",
    ),
    Accepted(
        "how",
        "flat gradient buffers per block replace it, reduced during the last backward unless --no-overlap-grad-reduce",
        switches="""
        --no-contiguous-buffers-in-local-ddp --use-contiguous-buffers-in-ddp --overlap-grad-reduce
        --ddp-average-in-collective --no-delay-grad-reduce --no-align-grad-reduce --disable-align-grad-reduce
        --ddp-pad-buckets-for-high-nccl-busbw""",
        valued="""
        --DDP-impl --ddp-bucket-size --ddp-num-buckets --distrib-opt-comm-mem-savings --disrib-opt-comm-mem-savings""",
    ),
    Accepted(
        "how",
        "--exp-avg-dtype and --exp-avg-sq-dtype say by themselves how the optimizer keeps its state",
        switches="--use-precision-aware-optimizer",
    ),
    Accepted(
        "how",
        "when the updated weights are gathered changes no result",
        switches="""
        --overlap-param-gather-with-optimizer-step --delay-param-gather --align-param-gather --no-align-param-gather""",
    ),
    Accepted(
        "how",
        "when and through which buffers ranks communicate changes no result",
        switches="""
        --no-async-tensor-model-parallel-allreduce --async-tensor-model-parallel-allreduce
        --async-tensor-parallel-allreduce --scatter-gather-tensors-in-pipeline --no-scatter-gather-tensors-in-pipeline
        --use-ring-exchange-p2p --overlap-p2p-communication --no-overlap-p2p-communication
        --overlap-p2p-communication-warmup-flush --defer-embedding-wgrad-compute --delay-wgrad-compute --tp-comm-overlap
        --tp-comm-overlap-rs-dgrad --tp-comm-bulk-dgrad --tp-comm-bulk-wgrad --tp-comm-split-ag --tp-comm-split-rs
        --disable-tp-comm-bulk-dgrad --disable-tp-comm-bulk-wgrad --disable-tp-comm-overlap-ag
        --disable-tp-comm-overlap-rs --disable-tp-comm-split-ag --disable-tp-comm-split-rs --no-tp-comm-bulk-dgrad
        --no-tp-comm-bulk-wgrad --no-tp-comm-overlap-ag --no-tp-comm-overlap-rs --no-tp-comm-split-ag
        --no-tp-comm-split-rs --no-clone-scatter-output-in-embedding --disable-clone-scatter-output-in-embedding
        --use-nccl-ub --use-sharp --disable-symmetric-registration --create-all-gather-group
        --high-priority-a2a-comm-stream --use-pipelining""",
        valued="""
        --wgrad-deferral-limit --tp-comm-overlap-cfg --tp-comm-bootstrap-backend --symmetric-ar-type
        --nccl-communicator-config-path --sharp-enabled-group --pipeline-model-parallel-comm-backend
        --suggested-communication-unit-size""",
        lists="--high-priority-stream-groups",
    ),
    Accepted(
        "how",
        "the launcher and --device decide where ranks run and how they talk",
        switches="--disable-gloo-process-groups --initialize-socket-comms",
        valued="--local-rank --local_rank --distributed-backend --lazy-mpu-init",
    ),
    Accepted(
        "how",
        "initial weights depend on the seed and the parameter's name alone",
        switches="--use-cpu-initialization --use-gpu-initialization --no-initialization --init-model-with-meta-device",
    ),
    Accepted(
        "done",
        "projections into the residual stream start with --init-method-std / sqrt(2 x layers), but for --norm-"
        "position post",
        switches="--deep-init",
    ),
    Accepted(
        "how",
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
        "how",
        "checkpoints have one format, which any layout writes in parallel and any layout loads",
        switches="""
        --use-dist-ckpt --auto-detect-ckpt-format --no-ckpt-fully-parallel-save --ckpt-assume-constant-structure
        --distrib-optim-fully-reshardable-mem-efficient --dist-ckpt-save-pre-mcore-014
        --ckpt-fully-parallel-load-per-rank-objects --ckpt-pg-tensors-cache-create --ckpt-drop-redundant-extra-state
        --disable-msc""",
        valued="""
        --ckpt-format --dist-ckpt-format --dist-ckpt-workers --override-checkpoint-version
        --ckpt-fully-parallel-load-exchange-algo --ckpt-fully-parallel-load-process-group
        --ckpt-fully-parallel-save-process-group --ckpt-pg-tensors-cache-path""",
    ),
    Accepted(
        "how",
        "saves are synchronous: training goes on when the checkpoint is on the disk",
        switches="--async-save --use-persistent-ckpt-worker --async-ckpt-use-cpu-shm",
        valued="--async-strategy --async-ckpt-cpu-priority --async-ckpt-io-priority",
    ),
    Accepted(
        "done",
        "every rank writes and reads its own part, which any other layout can load",
        switches="--dist-ckpt-optim-fully-reshardable --ckpt-fully-parallel-save --ckpt-fully-parallel-load",
    ),
    Accepted(
        "done",
        "each save is read back before it counts, and each load compares the checksums of all that it reads",
        switches="--verify-integrity",
    ),
    Accepted(
        "done",
        "optimizer state is saved and loaded unless --no-save-optim or --no-load-optim is given",
        switches="--save-optim --load-optim",
    ),
    Accepted(
        "done",
        "a load is always strict: every tensor must be there, whole and of the right shape",
        switches="--no-ckpt-load-validate-sharding-integrity --disable-ckpt-load-validate-sharding-integrity",
        valued="--dist-ckpt-strictness",
    ),
    Accepted(
        "done",
        "special tokens are put into token files by tools/preprocess_data.py, and training reads the files as they are",
        switches="--tokenizer-hf-include-special-tokens --tokenizer-hf-no-include-special-tokens",
    ),
    Accepted(
        "how",
        "tokenizers of Hugging Face's kind are always the fast ones, of the tokenizers library",
        switches="--tokenizer-hf-use-fast",
    ),
    Accepted(
        "done",
        "pretraining copies no tokenizer beside the checkpoints; run.json names its files",
        switches="--no-save-tokenizer-assets --disable-save-tokenizer-assets",
    ),
    Accepted(
        "how",
        "random numbers are derived from the seed, the step and the place in the model, so no state is stored",
        switches="""
        --no-load-rng --no-save-rng --disable-load-rng --disable-save-rng --save-rng --load-rng --save-all-rng
        --load-all-rng --te-rng-tracker""",
    ),
    Accepted(
        "how",
        "token files are mapped, and samples are computed from their number, so there is no index to build or cache",
        switches="""
        --mmap-warmup --skip-mmap-warmup --no-mmap-bin-files --no-create-attention-mask-in-dataloader
        --dataloader-fast-cache-load --dataloader-defer-npy-index-mmap""",
        valued="""
        --data-impl --data-cache-path --cache-dir --num-dataset-builder-threads --mid-level-dataset-surplus
        --object-storage-cache-path --s3-cache-path""",
    ),
    Accepted(
        "how",
        "samples have one seeded order, of which each data-parallel rank reads its part",
        switches="--no-data-sharding",
    ),
    Accepted(
        "done",
        "a resumed run reads on at the sample where the checkpoint stopped",
        switches="--resume-dataloader",
    ),
    Accepted(
        "done",
        "losses are summed and divided once by the global token count",
        switches="--calculate-per-token-loss",
    ),
    Accepted(
        "done",
        "each line of the log has tokens/s, TFLOP/s and, on a GPU, the peak of its memory",
        switches="--log-throughput --log-device-memory-used",
        valued="--log-memory-interval",
    ),
    Accepted(
        "report",
        "rates are means over the steps since the last line",
        valued="--throughput-window-size --runtime-time-unit",
    ),
    Accepted(
        "report",
        "norms of weights, zeros in gradients and logits of attention are not measured; loss, gradient norm and "
        "learning rate are",
        switches="--log-params-norm --log-num-zeros-in-grad --log-zeros --log-max-attention-logit",
    ),
    Accepted(
        "report",
        "no progress.txt is written; --metrics-file has every step, and exit_status.json how the run ended",
        switches="--log-progress",
    ),
    Accepted(
        "report",
        "energy is not measured",
        switches="--log-energy",
    ),
    Accepted(
        "report",
        "TensorBoard and Weights & Biases get every step by Megatron-LM's names too: losses, learning-rate, grad-norm, "
        "batch-size, loss-scale, iteration-time, throughput, and of evaluations losses and perplexities",
        switches="""
        --log-batch-size-to-tensorboard --log-validation-ppl-to-tensorboard --log-throughput-to-tensorboard
        --log-l2-norm-grad-to-tensorboard --no-log-learnig-rate-to-tensorboard --no-log-loss-scale-to-tensorboard
        --disable-log-loss-scale-to-tensorboard""",
        valued="--tensorboard-log-interval --tensorboard-queue-size",
    ),
    Accepted(
        "report",
        "TensorBoard gets each step's time (iteration-time) and peak_memory_bytes, but no timers of its parts, no "
        "other numbers of the allocator, no run time and no number of ranks; --metrics-file has the layout",
        switches="""
        --log-timers-to-tensorboard --log-memory-to-tensorboard --no-log-memory-to-tensorboard
        --log-world-size-to-tensorboard --log-runtime-to-tensorboard""",
        valued="--memory-keys",
    ),
    Accepted(
        "report",
        "each line of the log has the time of a step; --profile-pipeline DIR shows where one step's time went",
        switches="--no-barrier-with-level-1-timing",
        valued="--timing-log-level --timing-log-option",
    ),
    Accepted(
        "report",
        "the log has no levels and no warnings to filter: a line each --log-interval steps, and one for each event",
        switches="--set-level-for-all-loggers --no-filter-warnings --disable-filter-warnings",
        valued="--logging-level",
        lists="--modules-to-filter",
    ),
    Accepted(
        "report",
        "the whole run is written to run.json beside each checkpoint, and printed at the start",
        valued="--config-logger-dir --save-config-filepath",
    ),
    Accepted(
        "report",
        "torch's profiler is not run; --profile-pipeline DIR draws one step of the pipeline, and writes a trace of it",
        switches="""
        --profile --use-pytorch-profiler --nvtx-ranges --record-shapes --pytorch-profiler-collect-callstack
        --pytorch-profiler-collect-chakra --pytorch-profiler-collect-shapes""",
        valued="--profile-step-start --profile-step-end",
        lists="--profile-ranks",
    ),
    Accepted(
        "report",
        "the run reports to its log, --metrics-file, TensorBoard and Weights & Biases, and to no other service",
        switches="""
        --enable-one-logger --no-one-logger --one-logger-async --enable-onelogger --test-mode
        --run-workload-inspector-server --otel-enabled""",
        valued="""
        --one-logger-project --one-logger-run-name --one-logger-entity --otel-service-name --otel-span-groups
        --app-tag-run-name --app-tag-run-version""",
    ),
    Accepted(
        "done",
        "batches are read by threads of the rank, which end with it",
        switches="--exit-signal-handler-for-dataloader",
    ),
    Accepted(
        "done",
        "every step waits for the device, so no rank runs ahead",
        valued="--train-sync-interval",
    ),
)
