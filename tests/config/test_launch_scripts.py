"""Launch command lines of several generations of Megatron-LM parse, and resolve at the number of ranks they are for."""

from __future__ import annotations

import shlex

import pytest

from megatron3d.config.check import check, checked
from megatron3d.config.cli import parse_args
from megatron3d.config.run import GivenRun
from megatron3d.errors import ConfigError

GPT_345M = """
    --num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 1024 --max-position-embeddings 1024
    --micro-batch-size 4 --global-batch-size 16 --lr 0.00015 --train-iters 500000 --lr-decay-iters 320000
    --lr-decay-style cosine --min-lr 1.0e-5 --weight-decay 1e-2 --lr-warmup-fraction .01 --clip-grad 1.0 --fp16
    --data-path corpus_text_document --vocab-file gpt2-vocab.json --merge-file gpt2-merges.txt --data-impl mmap
    --split 949,50,1 --log-interval 100 --save-interval 10000 --eval-interval 1000 --eval-iters 10
    --distributed-backend nccl --save ckpt --load ckpt
"""
GPT_175B = """
    --num-layers 96 --hidden-size 12288 --num-attention-heads 96 --seq-length 2048 --max-position-embeddings 2048
    --micro-batch-size 1 --global-batch-size 1536 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95
    --init-method-std 0.006 --clip-grad 1.0 --fp16 --lr 6.0e-5 --lr-decay-style cosine --min-lr 6.0e-6
    --tensor-model-parallel-size 8 --pipeline-model-parallel-size 16 --vocab-file v.json --merge-file m.txt
    --log-interval 100 --save-interval 10000 --eval-interval 1000 --save c --load c --eval-iters 10
"""
LLAMA_8B = """
    --use-mcore-models --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
    --group-query-attention --num-query-groups 8 --kv-channels 128 --seq-length 8192 --max-position-embeddings 8192
    --position-embedding-type rope --rotary-base 1000000 --rotary-percent 1.0 --attention-dropout 0.0
    --hidden-dropout 0.0 --swiglu --normalization RMSNorm --init-method-std 0.0134 --attention-backend fused
    --untie-embeddings-and-output-weights --disable-bias-linear --micro-batch-size 1 --global-batch-size 128
    --train-samples 1953125000 --lr-decay-samples 1949218748 --lr-warmup-samples 3906252 --lr 0.00015 --min-lr 0.00001
    --lr-decay-style cosine --clip-grad 1.0 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --bf16
    --grad-reduce-in-bf16 --cross-entropy-loss-fusion --calculate-per-token-loss --manual-gc
    --empty-unused-memory-level 1 --exit-duration-in-mins 235 --tensor-model-parallel-size 2 --context-parallel-size 1
    --sequence-parallel --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --mock-data
    --tokenizer-type NullTokenizer --vocab-size 128256 --data-cache-path cache --split "'99,1,0'"
    --no-create-attention-mask-in-dataloader --no-mmap-bin-files --num-workers 1 --log-interval 1 --eval-iters 32
    --eval-interval 100 --save-interval 1000 --log-throughput --profile --profile-step-start 4 --profile-step-end 6
    --ckpt-format torch_dist --distributed-timeout-minutes 60 --save c --load c --tensorboard-dir t
"""
SCRIPTS = {
    # The first GPT-2 scripts on prepared data, with their spellings of 2019 and 2020.
    "gpt2_345m_2020": (
        """--model-parallel-size 2 --num-layers 24 --hidden-size 1024 --num-attention-heads 16 --batch-size 8
        --seq-length 1024 --max-position-embeddings 1024 --train-iters 500000 --lr-decay-iters 320000 --save c --load c
        --data-path my-gpt2_text_document --vocab-file gpt2-vocab.json --merge-file gpt2-merges.txt --data-impl mmap
        --split 949,50,1 --distributed-backend nccl --lr 0.00015 --min-lr 1.0e-5 --lr-decay-style cosine
        --weight-decay 1e-2 --clip-grad 1.0 --warmup .01 --checkpoint-activations --log-interval 100
        --save-interval 10000 --eval-interval 1000 --eval-iters 10 --fp16 --DDP-impl torch""",
        8,
    ),
    "gpt_345m": (GPT_345M, 4),
    "gpt_345m_tp_sp_pp": (
        GPT_345M + "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel",
        8,
    ),
    "gpt3_175b_samples": (
        GPT_175B
        + """--rampup-batch-size 16 16 5859375 --train-samples 146484375 --lr-decay-samples 126953125
        --lr-warmup-samples 183105 --data-path 0.2 A 0.3 B 0.5 C --split 98,2,0 --tensorboard-dir t
        --activations-checkpoint-method uniform""",
        128 * 8,
    ),
    "gpt3_175b_iterations": (
        GPT_175B
        + """--rampup-batch-size 16 16 5859375 --train-iters 500000 --lr-warmup-fraction .001 --lr-decay-iters 430000
        --data-path D --split 949,50,1 --use-flash-attn --attention-softmax-in-fp32""",
        128,
    ),
    "gpt3_175b_step_schedule": (
        GPT_175B
        + """--step-batch-size-schedule "0:16 2.4B:320 4.8B:624 7.2B:928 9.6B:1232 12B:1536" --train-iters 500000
        --lr-warmup-fraction .001 --lr-decay-iters 430000 --data-path D --attention-backend auto""",
        128,
    ),
    "sc21": (
        """--tensor-model-parallel-size 2 --pipeline-model-parallel-size 4 --micro-batch-size 1 --global-batch-size 512
        --num-layers 48 --hidden-size 8192 --num-attention-heads 64 --DDP-impl local --data-path D --vocab-file v
        --merge-file m --log-interval 5 --seq-length 2048 --max-position-embeddings 2048 --train-iters 500
        --lr-decay-iters 320 --lr 0.0001 --min-lr 0.00001 --lr-decay-style cosine --lr-warmup-fraction 0.01
        --split 969,30,1 --eval-iters 100 --eval-interval 1000 --clip-grad 1.0 --fp16 --loss-scale 8192
        --checkpoint-activations --no-scatter-gather-tensors-in-pipeline""",
        64,
    ),
    "llama_8b": (LLAMA_8B, 8),
    "llama_2_7b": (
        """--use-mcore-models --transformer-impl transformer_engine --num-layers 32 --hidden-size 4096
        --ffn-hidden-size 11008 --num-attention-heads 32 --seq-length 4096 --max-position-embeddings 4096 --swiglu
        --use-rotary-position-embeddings --no-position-embedding --normalization RMSNorm --disable-bias-linear
        --untie-embeddings-and-output-weights --no-masked-softmax-fusion --attention-softmax-in-fp32
        --tokenizer-type Llama2Tokenizer --tokenizer-model tokenizer.model --make-vocab-size-divisible-by 1
        --micro-batch-size 1 --global-batch-size 256 --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine
        --lr-warmup-iters 2000 --train-iters 250000 --weight-decay 0.1 --clip-grad 1.0 --adam-beta2 0.95
        --attention-dropout 0 --hidden-dropout 0 --bf16 --tensor-model-parallel-size 4 --sequence-parallel
        --use-distributed-optimizer --recompute-activations --no-load-optim --no-load-rng --no-save-rng --data-path D
        --no-gradient-accumulation-fusion --accumulate-allreduce-grads-in-fp32 --initial-loss-scale 65536""",
        8,
    ),
    # Megatron-DeepSpeed's script for 1.3B parameters, with its tokens and its large bound in samples.
    "deepspeed_1.3b": (
        """--override-opt_param-scheduler --adam-beta1 0.9 --adam-beta2 0.95 --tensor-model-parallel-size 2
        --init-method-std 0.013 --lr-decay-tokens 300000000000 --lr-warmup-tokens 3000000000 --micro-batch-size 8
        --exit-duration-in-mins 30000000 --global-batch-size 512 --num-layers 24 --hidden-size 2048
        --num-attention-heads 16 --seq-length 2048 --max-position-embeddings 2048 --train-tokens 300000000000
        --train-samples 292968750 --lr 2.0e-4 --min-lr 1.0e-6 --lr-decay-style cosine --split 949,50,1
        --log-interval 10 --eval-interval 100 --eval-iters 10 --save-interval 10000 --weight-decay 0.1 --clip-grad 1.0
        --hysteresis 2 --num-workers 0 --fp16 --seed 1234 --load c --save c --tensorboard-queue-size 1
        --no-async-tensor-model-parallel-allreduce --log-timers-to-tensorboard --log-batch-size-to-tensorboard
        --log-validation-ppl-to-tensorboard --tensorboard-dir t --checkpoint-activations --vocab-file v
        --log-optimizer-states-to-tensorboard --merge-file m --data-path D --data-impl mmap --deepspeed
        --zero-stage 1 --pipeline-model-parallel-size 1 --no-pipeline-parallel --deepspeed-activation-checkpointing
        --num-experts 1 --moe-expert-parallel-size 1 --moe-loss-coeff 0.01 --moe-train-capacity-factor 1.0
        --normalization layernorm""",
        16,
    ),
    "zero_bubble": (
        """--pipeline-model-parallel-size 8 --num-layers 30 --hidden-size 3072 --num-attention-heads 32
        --exit-interval 10 --seq-length 1024 --max-position-embeddings 1024 --micro-batch-size 1
        --global-batch-size 24 --lr 6.0e-5
        --train-samples 146484375 --lr-decay-samples 126953125 --lr-warmup-samples 183105 --min-lr 6.0e-6
        --lr-decay-style cosine --log-interval 10 --eval-iters 1 --eval-interval 10000 --data-path D --split 98,2,0
        --tokenizer-type GPTSentencePieceTokenizer --tokenizer-model t.model --clip-grad 8.0 --weight-decay 0.1
        --adam-beta1 0.9 --adam-beta2 0.95 --init-method-std 0.006 --no-barrier-with-level-1-timing
        --profile-step-start 5 --profile-step-end 10 --transformer-impl local --use-legacy-models --use-flash-attn
        --no-bias-dropout-fusion --no-create-attention-mask-in-dataloader --untie-embeddings-and-output-weights
        --allow-padding-num-layers --no-pre-communication-optimization --initial-loss-scale 65536 --fp16
        --enable-zero-bubble --zero-bubble-pipeline-timers-start-iter 3 --zero-bubble-pipeline-timers-end-iter 5
        --zero-bubble-max-pending-backward 16 --enable-optimizer-post-validation""",
        8,
    ),
    "nemotron_tiktoken": (
        """--use-mcore-models --num-layers 32 --hidden-size 4096 --num-attention-heads 32 --seq-length 4096
        --max-position-embeddings 4096 --micro-batch-size 1 --global-batch-size 768 --train-samples 1000000
        --lr 3e-4 --min-lr 3e-6 --lr-decay-style WSD --lr-wsd-decay-samples 1000 --lr-wsd-decay-style minus_sqrt
        --tokenizer-type TikTokenizer --tokenizer-model vocab.json --tiktoken-pattern v2 --vocab-size 131072
        --tiktoken-num-special-tokens 1000 --apply-layernorm-1p --squared-relu --position-embedding-type rope
        --rotary-percent 0.5 --no-position-embedding --untie-embeddings-and-output-weights --disable-bias-linear
        --attention-dropout 0 --hidden-dropout 0 --normalization RMSNorm --bf16 --tensor-model-parallel-size 8
        --sequence-parallel --use-distributed-optimizer --data-path D --save c --load c""",
        8,
    ),
    "bert_of_2019": (
        """--num-layers 24 --hidden-size 1024 --num-attention-heads 16 --micro-batch-size 8 --global-batch-size 64
        --seq-length 512 --max-position-embeddings 512 --train-iters 2000000 --save c --load c --data-path D_sentence
        --vocab-file bert-vocab.txt --data-impl mmap --split 949,50,1 --distributed-backend nccl --lr 0.0001
        --lr-decay-style linear --min-lr 1.0e-5 --lr-decay-iters 990000 --weight-decay 1e-2 --clip-grad 1.0
        --lr-warmup-fraction .01 --log-interval 100 --save-interval 10000 --eval-interval 1000 --eval-iters 10 --fp16
        --checkpoint-activations --DDP-impl local --bert-no-binary-head --mask-prob 0.15 --short-seq-prob 0.1
        --tokenizer-type BertWordPieceLowerCase --num-workers 2""",
        8,
    ),
    "bert_340m": (
        """--num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 512 --max-position-embeddings 512
        --attention-backend auto --micro-batch-size 4 --global-batch-size 32 --train-iters 1000000 --weight-decay 1e-2
        --clip-grad 1.0 --fp16 --lr 0.0001 --lr-decay-iters 990000 --lr-decay-style linear --min-lr 1.0e-5
        --weight-decay 1e-2 --lr-warmup-fraction .01 --clip-grad 1.0 --tensor-model-parallel-size 8
        --pipeline-model-parallel-size 16 --data-path D --vocab-file bert-vocab.txt --split 949,50,1 --log-interval 100
        --save-interval 10000 --eval-interval 1000 --save c --load c --eval-iters 10 --tensorboard-dir t""",
        128,
    ),
}


def parse(text: str, said: list[str] | None = None, architecture: str = "gpt") -> GivenRun:
    lines: list[str] = [] if said is None else said
    program = f"pretrain_{architecture}.py"
    return parse_args(
        shlex.split(text), program=program, description="Pretrain.", log=lines.append, architecture=architecture
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_classic_script_starts(name: str) -> None:
    text, world_size = SCRIPTS[name]
    assert check(parse(text, architecture="bert" if name.startswith("bert") else "gpt"), world_size) == []


def test_each_flag_without_meaning_gets_one_line() -> None:
    said: list[str] = []
    parse(LLAMA_8B, said)
    without_meaning = """
        --use-mcore-models --cross-entropy-loss-fusion --calculate-per-token-loss
        --manual-gc --empty-unused-memory-level --overlap-grad-reduce --data-cache-path
        --no-create-attention-mask-in-dataloader --no-mmap-bin-files --log-throughput --ckpt-format"""
    assert [line.split()[0] for line in said] == shlex.split(without_meaning)


def test_values_of_the_345m_script_arrive() -> None:
    text, world_size = SCRIPTS["gpt_345m_tp_sp_pp"]
    run = checked(parse(text), world_size)
    assert (run.parallel.data_parallel_size, run.parallel.sequence_parallel) == (2, True)
    assert (run.model.ffn_hidden_size, run.model.kv_channels, run.model.activation) == (4096, 64, "gelu_tanh")
    assert run.data.tokenizer_type == "GPT2BPETokenizer"
    assert run.optim.precision == "fp16"


def test_values_of_the_bert_scripts_arrive() -> None:
    new, old = (
        checked(parse(SCRIPTS[n][0], architecture="bert"), SCRIPTS[n][1]) for n in ("bert_340m", "bert_of_2019")
    )
    assert (new.model.activation, new.model.norm_position, new.model.num_token_types) == ("gelu", "pre", 2)
    assert new.model.has_binary_head and new.data.tokenizer_type == "BertWordPieceLowerCase"
    assert (old.model.has_binary_head, old.model.num_token_types, old.data.mask_prob) == (False, 0, 0.15)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--norm-position post", "--norm-position post means nothing to a GPT"),
        ("--bert-no-binary-head", "--bert-no-binary-head means nothing to a GPT"),
        ("--num-token-types 3", "--num-token-types 3 means nothing to a GPT"),
    ],
)
def test_options_of_a_bert_are_refused_for_a_gpt(words: str, sentence: str) -> None:
    (problem,) = check(parse(f"{SCRIPTS['gpt_345m_tp_sp_pp'][0]} {words}"), SCRIPTS["gpt_345m_tp_sp_pp"][1])
    assert sentence in problem


def test_values_of_the_llama_script_arrive() -> None:
    text, world_size = SCRIPTS["llama_8b"]
    run = checked(parse(text), world_size)
    assert (run.model.num_query_groups, run.model.activation, run.parallel.zero_stage) == (8, "swiglu", 1)
    assert (run.data.split, run.optim.lr_decay_samples, run.train.global_batch_size) == ("99,1,0", 1949218748, 128)


def test_the_8_bit_llama_script_is_refused_flag_by_flag() -> None:
    """Its fp8 is accepted, but for delayed scaling and weights gathered in fp8."""
    refused = "--fp8-amax-history-len 1024 --fp8-param-gather --decoupled-lr 5.0e-4"
    with pytest.raises(ConfigError) as raised:
        parse(LLAMA_8B + "--fp8-format hybrid " + refused)
    named = [problem.split()[0] for problem in str(raised.value).split("\n")]
    assert named == [word for word in refused.split() if word.startswith("--")]


def test_the_first_scripts_on_raw_text_are_sent_to_preprocessing() -> None:
    with pytest.raises(ConfigError, match=r"--train-data wikipedia .*tools/preprocess_data.py"):
        parse("--num-layers 24 --train-data wikipedia --lazy-loader --loose-json --cache-dir cache --resume-dataloader")
