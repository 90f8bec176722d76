#!/usr/bin/env bash
# From nothing to a trained GPT: set-up, corpus, tokenizer, training in three dimensions, text, and the proof that the
# layout did not change the result. Everything goes to out/quickstart, which is made anew each time.
#
#   bash tools/quickstart.sh
#
# Needs Python 3.11 or 3.12 and a package index; about 5 minutes on two cores besides the installation. Uses GPUs where
# there are some, else four processes on the CPU. PYTHON and TORCH_INDEX_URL are explained in tools/setup_env.sh; the
# variables below can be set from outside too, such as ITERATIONS=50.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

: "${CORPUS_MB:=8}" "${VOCAB_SIZE:=2048}"
: "${NUM_LAYERS:=4}" "${HIDDEN_SIZE:=128}" "${NUM_HEADS:=4}" "${SEQ_LENGTH:=256}"
: "${MICRO_BATCH:=8}" "${GLOBAL_BATCH:=16}" "${ITERATIONS:=400}" "${LEARNING_RATE:=5e-3}"
default_prompt=$'class Queue:\n    """Create a queue'
: "${PROMPT:=$default_prompt}" "${NEW_TOKENS:=120}"
COMPARED_STEPS=10

out=out/quickstart
started=$SECONDS
step() { printf '\n== %s (%d s)\n' "$1" $((SECONDS - started)); }

bash tools/setup_env.sh run
started=$SECONDS
python=.venv/bin/python
rm -rf "$out"
mkdir -p "$out"

step "Corpus: the standard library's sources and the topics of help()"
"$python" tools/quickstart_corpus.py --output "$out/corpus.jsonl" --max-mb "$CORPUS_MB"

step "Tokenizer: byte-level BPE of $VOCAB_SIZE tokens"
"$python" tools/train_tokenizer.py --input "$out/corpus.jsonl" --output-dir "$out/tokenizer" --vocab-size "$VOCAB_SIZE"

tokenizer=(--tokenizer-type GPT2BPETokenizer
    --vocab-file "$out/tokenizer/vocab.json" --merge-file "$out/tokenizer/merges.txt")

step "Tokens: text to the indexed files of Megatron-LM"
"$python" tools/preprocess_data.py --input "$out/corpus.jsonl" --json-keys text --output-prefix "$out/corpus" \
    "${tokenizer[@]}" --append-eod --workers 2

# The device and the layout: four processes on the CPU, or as many of the four as there are GPUs.
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
device=cuda
case $gpus in
    0) device=cpu processes=4 tp=2 pp=2 ;;
    1) processes=1 tp=1 pp=1 ;;
    2 | 3) processes=2 tp=2 pp=1 ;;
    *) processes=4 tp=2 pp=2 ;;
esac
layout=(--device "$device" --tensor-model-parallel-size "$tp" --pipeline-model-parallel-size "$pp")
if [ "$tp" -gt 1 ]; then layout+=(--sequence-parallel); fi

# One list for both runs: they differ in layout alone. Dropout is off, as is usual where the data are not repeated.
run=(
    --num-layers "$NUM_LAYERS" --hidden-size "$HIDDEN_SIZE" --num-attention-heads "$NUM_HEADS"
    --seq-length "$SEQ_LENGTH" --max-position-embeddings "$SEQ_LENGTH"
    --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
    --hidden-dropout 0 --attention-dropout 0
    --data-path "$out/corpus_text_document" --split 97,3,0 "${tokenizer[@]}"
    --micro-batch-size "$MICRO_BATCH" --global-batch-size "$GLOBAL_BATCH" --train-iters "$ITERATIONS"
    --lr "$LEARNING_RATE" --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-fraction 0.1
    --weight-decay 0.1 --clip-grad 1.0 --adam-beta2 0.95 --log-interval 10
)

step "Training: TP $tp x PP $pp, $processes processes, $device"
# Each process one thread: four of them share what may be two cores.
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} .venv/bin/torchrun --standalone --nproc-per-node "$processes" \
    pretrain_gpt.py "${run[@]}" "${layout[@]}" \
    --eval-interval 100 --eval-iters 5 --save "$out/checkpoint" --save-interval "$ITERATIONS" \
    --metrics-file "$out/metrics.jsonl"
"$python" -c 'import sys; from megatron3d.train.loss_plot import plot_losses; plot_losses(*sys.argv[1:])' \
    "$out/metrics.jsonl" "$out/loss.png"

step "Text: what the model makes of '${PROMPT//$'\n'/\\n}'"
"$python" tools/generate_text.py --load "$out/checkpoint" --prompt "$PROMPT" --max-new-tokens "$NEW_TOKENS" \
    --temperature 0.3 --top-p 0.9 --seed 1 | tee "$out/sample.txt"

step "The same run in one process: its first $COMPARED_STEPS steps"
reference=$device
if [ "$processes" = 1 ]; then reference=cpu; fi # Where the run was one process itself, the device is what differs.
"$python" pretrain_gpt.py "${run[@]}" --device "$reference" --eval-iters 0 --exit-interval "$COMPARED_STEPS" \
    --metrics-file "$out/metrics_one_process.jsonl" || code=$?
if [ "${code:-0}" != 75 ]; then # 75: stopped on request before its last step, which is what --exit-interval asks for.
    printf 'the run in one process ended with exit code %s instead of 75\n' "${code:-0}" >&2
    exit 1
fi

step "Done"
"$python" - "$COMPARED_STEPS" "$out/metrics.jsonl" "$out/metrics_one_process.jsonl" <<'PYTHON'
import json
import sys

steps = int(sys.argv[1])


def first_losses(path):
    """Losses of the first steps of a metrics file, by step."""
    with open(path) as file:
        records = [json.loads(line) for line in file]
    losses = {record["step"]: record["loss"] for record in records if "loss" in record}
    return dict(sorted(losses.items())[:steps])


parallel, single = first_losses(sys.argv[2]), first_losses(sys.argv[3])
if parallel.keys() != single.keys() or len(single) != steps:
    sys.exit(f"the two runs cannot be compared: {sys.argv[2]} has steps {list(parallel)}, {sys.argv[3]} {list(single)}")
largest = max(abs(parallel[step] - single[step]) / abs(single[step]) for step in single)
print(f"largest relative difference of the first {steps} losses from the run in one process: {largest:.2e}")
PYTHON
cat <<EOF
$out/corpus.jsonl              the text, one document a line
$out/tokenizer/                vocab.json and merges.txt
$out/corpus_text_document.*    the tokens: .bin and .idx
$out/checkpoint/               the trained model; tools/generate_text.py --load $out/checkpoint --prompt "import "
$out/metrics.jsonl             every loss, gradient norm and rate; loss.png is its picture
$out/sample.txt                the text above
$out/metrics_one_process.jsonl the first $COMPARED_STEPS steps in one process
EOF
printf 'took %d s without the installation\n' $((SECONDS - started))
