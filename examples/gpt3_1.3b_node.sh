#!/usr/bin/env bash
# GPT-3 1.3B on one node of eight GPUs: TP2 x DP4 with sequence parallelism, ZeRO 1 and bf16.
# Set DATA (a prefix of token files), VOCAB, MERGES and CHECKPOINTS. A restart of the same command resumes from the
# latest checkpoint. SIGTERM and SIGUSR1 to this process have it save and stop, for which it has 10 minutes: exec lets
# torchrun take its place, so that the signals arrive. docs/stopping.md has more, and what to do on torch before 2.13.
# check: skip (needs 8 GPUs and data)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${DATA:?prefix of .bin/.idx files}" "${VOCAB:?vocab.json}" "${MERGES:?merges.txt}" "${CHECKPOINTS:?directory}"

exec torchrun --standalone --nproc-per-node "${GPUS:-8}" --max-restarts 3 --shutdown-timeout 600 \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 pretrain_gpt.py \
    --preset gpt3-1.3b --tensor-model-parallel-size 2 --sequence-parallel --zero-stage 1 --bf16 \
    --micro-batch-size 4 --global-batch-size 512 --train-iters 100000 \
    --lr 2e-4 --min-lr 2e-5 --lr-decay-style cosine --lr-warmup-iters 700 --weight-decay 0.1 --adam-beta2 0.95 \
    --clip-grad 1.0 --recompute-granularity selective \
    --data-path "$DATA" --tokenizer-type GPT2BPETokenizer --vocab-file "$VOCAB" --merge-file "$MERGES" \
    --save "$CHECKPOINTS" --save-interval 1000 --keep-last 3 --eval-interval 1000 --eval-iters 10 \
    --log-interval 10 --metrics-file "$CHECKPOINTS/metrics.jsonl" --tensorboard-dir "$CHECKPOINTS/tensorboard" "$@"
