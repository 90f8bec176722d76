"""Flags of Megatron-LM that are refused by name: each would change the model, the data, the optimizer or what protects
a run, and says what to use instead. The lookups are in `megatron.py`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Refused:
    """Flags of a feature that is not here: exact names, and prefixes that end in a hyphen."""

    instead: str
    flags: str = ""
    prefixes: str = ""


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
        "use --zero-stage 1, 2 or 3, which shard optimizer state, gradients and weights over the data-parallel "
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
        flags="--decoupled-lr --decoupled-min-lr --head-lr-mult --lr-warmup-percent --use-mup",
        prefixes="--mup-",
    ),
    Refused(
        "biases and norms are not decayed, all else is; use --weight-decay",
        flags="--no-weight-decay-cond-type --apply-wd-to-qk-layernorm",
    ),
    Refused(
        "residuals, embeddings and losses have the precision of the layers; give neither --bf16 nor --fp16, or leave "
        "it out",
        flags="""
        --fp32-residual-connection --fp16-lm-cross-entropy --embedding-weights-in-fp32 --fp32-embedding
        --fp32-tokentypes""",
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
        --disable-pad-vocab-size --padded-vocab-size --allow-ambiguous-pad-tokens --tokenizer-sentencepiece-legacy
        --tokenizer-hf-no-use-fast""",
        prefixes="""
        --null-tokenizer- --tokenizer-sentencepiece- --disable-tokenizer- --no-tokenizer-""",
    ),
    Refused(
        "give the corpora of all splits by --data-path, or --train-data-path, --valid-data-path and --test-data-path; "
        "each is read in one seeded order",
        flags="""
        --per-split-data-args-path --per-dataset-sequences-path --dataloader-type --dataloader_type
        --renormalize-blend-weights --dataloader-inter-document-masking --full-validation
        --multiple-validation-sets --validation-set-names --sft --sft-tokenizer-prompt-format
        --data-epochs --sample-rate --data-per-class-fraction --classes-fraction --iter-per-epoch""",
        prefixes="--fim-",
    ),
    Refused(
        "evaluate during training by --eval-interval and --eval-iters",
        flags="""
        --skip-train --eval-batch-size --eval-seq-length --eval-max-preds-per-seq --start-eval-at-iter
        --eval-global-batch-size --eval-micro-batch-size --overlapping-eval --strict-lambada
        --cloze-eval --eval-hf --load-openai""",
    ),
    Refused(
        "the model is described by the flags; take those of a checkpoint by --use-checkpoint-args",
        flags="""
        --use-mp-args-from-checkpoint-args --yaml-cfg --spec --model-spec
        --no-use-tokenizer-model-from-checkpoint-args --disable-use-tokenizer-model-from-checkpoint-args""",
        prefixes="--heterogeneous-",
    ),
    Refused(
        "use --load with --finetune, --ckpt-step or --keep-last, and tools/convert_checkpoint.py for other formats",
        flags="""
        --bert-load --vit-load --pretrained-bert --most-recent-k --override-ckpt-iteration
        --save-iters --ckpt-convert-format --ckpt-convert-save --load-model-opt-format
        --ckpt-convert-update-legacy-dist-opt-format --validate-model-load""",
        prefixes="--non-persistent-",
    ),
    Refused(
        "Muon orthogonalises whole matrices at every layout, with torch's products; leave it out",
        flags="--muon-tp-mode --muon-use-syrk",
    ),
    Refused(
        "the length of a run is counted in steps, samples or tokens; use --train-iters, --train-samples or "
        "--train-tokens",
        flags="--epochs",
    ),
    Refused("it is a switch of programs that are not in this version; leave it out", flags="--debug"),
    Refused(
        "this model is not in this version; use pretrain_gpt.py's own model flags",
        flags="""
        --is-hybrid-model --encoder-tensor-model-parallel-size --encoder-pipeline-model-parallel-size
        --pipeline-model-parallel-split-rank --decoder-num-layers --decoder-seq-length --num-unique-layers
        --param-sharing-style --num-classes --num-channels --patch-dim --img-dim --img-h --img-w --mask-type
        --mask-factor --swin-backbone-type --use-regular-masking --use-random-spans --freeze-all-layers
        --async-indexer --projection-dim --pool-type --shared-query-context-model --cased-vocab --faiss-use-gpu
        --evidence-data-path --embedding-path --index-reload-interval --use-one-sent-docs
        --enable-mhc-connections --report-topk-accuracies""",
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
        "a failing rank ends the job, a hanging one does after --distributed-timeout-minutes, SIGTERM saves first, and "
        "the launcher starts it again from the latest checkpoint (torchrun --max-restarts, or requeueing)",
        flags="""
        --replication --replication-jump --replication-factor --enable-ft-package --calc-ft-timeouts
        --ft-num-warmup-iters --adlr-autoresume --adlr-autoresume-interval""",
        prefixes="--inprocess- --fault-injector- --flight-recorder- --disable-flight-recorder- --no-flight-recorder-",
    ),
    Refused(
        "the order of ranks is tensor, then data, then pipeline, and cannot be changed",
        flags="--use-tp-pp-dp-mapping --fake-process-group",
    ),
    Refused(
        "steps are not run twice to be compared; --check-weight-hash-across-dp-replicas-interval finds ranks whose "
        "values were damaged, and a loss or gradient that is not finite is an error",
        flags="""
        --rerun-mode --error-injection-rate --error-injection-type --result-rejected-tracker-filename
        --gpu-sniff-test-interval""",
    ),
    Refused(
        "loss and gradient norm of every step are in --metrics-file, --clip-grad limits the norm, and "
        "--iterations-to-skip leaves out the samples of a bad step",
        flags="--check-for-spiky-loss --check-for-large-grads",
    ),
    Refused(
        "--profile-pipeline DIR shows for one step when each rank computed what, and so which one is slow",
        flags="--log-straggler --disable-straggler-on-startup --straggler-ctrlr-port --straggler-minmax-count",
    ),
    Refused(
        "no memory snapshot is written; tools/estimate.py and the run's own first lines say what each rank will hold, "
        "and each line of the log what it held at most",
        flags="--record-memory-history --memory-snapshot-path",
    ),
    Refused(
        "on a CPU equal runs are equal to the last bit; on a GPU the backward of torch's attention may add in another "
        "order each time, and nothing here forbids it; leave the flag out",
        flags="--deterministic-mode --batch-invariant-mode --batch-invariant-backend",
    ),
    Refused(
        "products keep torch's default reductions; leave it out, or train without --bf16",
        flags="--disable-bf16-reduced-precision-matmul",
    ),
    Refused(
        "gradients are summed in the dtype in which they travel; leave --grad-reduce-in-bf16 out too for fp32",
        flags="--ddp-reduce-scatter-with-fp32-accumulation",
    ),
    Refused(
        "one limit holds from the start to the end; use --distributed-timeout-minutes",
        flags="--distributed-timeout-seconds-after-init",
    ),
    Refused(
        "SIGTERM, SIGINT and SIGUSR1 save and stop the run; send one of these",
        flags="--exit-signal",
    ),
    Refused(
        "files are read from and written to mounted file systems; leave it out",
        flags="--enable-msc",
    ),
)
