#!/usr/bin/env bash
# GPT-3 175B on 128 nodes of eight GPUs under Slurm: TP8 x PP16 x DP8, as in Narayanan et al. 2021 (SC21), table 1.
# sbatch examples/gpt3_175b_slurm.sh, with DATA, VOCAB, MERGES and CHECKPOINTS set.
#
# Ten minutes before the time limit Slurm sends SIGUSR1 to the tasks of the job step, which are the torchrun of each
# node (not to this script: that would be --signal=B:USR1). torchrun hands it on and leaves the run 9 minutes to save;
# exit_status.json holds how the run ended, and the job puts itself back into the queue. docs/stopping.md has more.
#SBATCH --job-name=gpt3-175b
#SBATCH --nodes=128
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
# check: skip (needs Slurm and 1024 GPUs)
set -euo pipefail
: "${DATA:?prefix of .bin/.idx files}" "${VOCAB:?vocab.json}" "${MERGES:?merges.txt}" "${CHECKPOINTS:?directory}"
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
rm -f "$CHECKPOINTS/exit_status.json" # of the run before: what is read below must be this one's
trap : TERM USR1 # a signal to this script too must not end it before the run has saved and the lines below are read

# On torch before 2.13 put `python tools/torchrun.py` in place of torchrun, whose --shutdown-timeout it does not have.
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-endpoint "$head_node:29500" --max-restarts 3 \
    --shutdown-timeout 540 --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 pretrain_gpt.py \
    --preset gpt3-175b --tensor-model-parallel-size 8 --pipeline-model-parallel-size 16 --sequence-parallel \
    --pipeline-schedule 1f1b --zero-stage 1 --bf16 --recompute-granularity selective \
    --micro-batch-size 1 --global-batch-size 1536 --rampup-batch-size 16 16 5859375 --train-samples 146484375 \
    --lr 6e-5 --min-lr 6e-6 --lr-decay-style cosine --lr-decay-samples 126953125 --lr-warmup-samples 183105 \
    --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0 \
    --data-path "$DATA" --tokenizer-type GPT2BPETokenizer --vocab-file "$VOCAB" --merge-file "$MERGES" \
    --save "$CHECKPOINTS" --save-interval 500 --keep-last 5 --eval-interval 500 --eval-iters 10 --log-interval 1 \
    --metrics-file "$CHECKPOINTS/metrics.jsonl" || code=$?

# torchrun hides how the run ended. 75 is a stop that was asked for; only one for the time limit is to go on by itself,
# not one that scancel asked for.
if grep -qs '"code": 75.*SIGUSR1' "$CHECKPOINTS/exit_status.json"; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "${code:-0}"
