"""Models of the planner's tests, as command lines: small, but large enough that each kind of memory counts."""

from __future__ import annotations

NO_DROPOUT = "--hidden-dropout 0 --attention-dropout 0"
DROPOUT = "--hidden-dropout 0.1 --attention-dropout 0.1"
_SIZES = "--hidden-size 96 --num-attention-heads 4 --vocab-size 1000 --seq-length 192"
_BATCH = "--micro-batch-size 2 --global-batch-size 4"
GPT = f"--num-layers 4 {_SIZES} --max-position-embeddings 192 {_BATCH}"
LLAMA = (
    f"--num-layers 4 {_SIZES} {_BATCH} --group-query-attention --num-query-groups 2 --position-embedding-type rope "
    "--normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights " + NO_DROPOUT
)
BERT = f"--num-layers 4 {_SIZES} --max-position-embeddings 192 {_BATCH} {DROPOUT}"
# Short sequences in a wide model: most of its memory is state.
WIDE = (
    "--num-layers 8 --hidden-size 144 --num-attention-heads 4 --vocab-size 2000 --seq-length 32 "
    f"--max-position-embeddings 32 --micro-batch-size 1 --global-batch-size 4 {NO_DROPOUT}"
)

SELECTIVE = "--recompute-granularity selective"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
