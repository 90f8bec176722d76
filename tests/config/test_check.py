"""Every problem of a run that its options show, each in a sentence that names option, value and fix."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron3d.config.check import check, resolve, with_vocab_size
from megatron3d.config.cli import parse_args
from megatron3d.config.derive import derive, derive_model
from megatron3d.config.run import DraftRun, GivenRun
from megatron3d.config.sections.model import GivenModel
from megatron3d.errors import ConfigError
from megatron3d.optim.schedule import settings_from_config
from megatron3d.pipeline.split.stages import split_layers

BASE = {
    "--num-layers": "4",
    "--hidden-size": "64",
    "--num-attention-heads": "8",
    "--seq-length": "32",
    "--micro-batch-size": "2",
    "--lr": "1e-3",
    "--train-iters": "100",
    "--vocab-size": "1000",
    "--mock-data": None,
}


def run_with(change: str = "", drop: str = "") -> GivenRun:
    """A small valid run with some flags changed or added, and some dropped."""
    words = [word for flag, value in BASE.items() if flag not in drop.split() for word in (flag, value) if word]
    return parse_args([*words, *change.split()], program="t", description="t", log=print)


def draft_with(change: str = "", drop: str = "") -> DraftRun:
    """The same on one rank, derived and not judged."""
    return derive(run_with(change, drop), 1)


def problems_of(change: str = "", *, world: int = 1, drop: str = "") -> list[str]:
    return check(run_with(change, drop), world)


def test_the_base_run_has_no_problem_and_resolves() -> None:
    assert problems_of() == []
    run = resolve(run_with(), 4)
    assert (run.model.ffn_hidden_size, run.model.kv_channels, run.model.num_query_groups) == (256, 8, 8)
    assert (run.model.max_position_embeddings, run.model.activation) == (32, "gelu_tanh")
    assert (run.train.global_batch_size, run.optim.lr_decay_iters) == (8, 100)
    assert (run.parallel.world_size, run.parallel.data_parallel_size, run.parallel.zero_stage) == (4, 4, 0)


@pytest.mark.parametrize("minutes", ["0", "-1", "1e9", "1e13"])
def test_a_timeout_that_gloo_or_python_cannot_count_is_refused(minutes: str) -> None:
    (problem,) = problems_of(f"--distributed-timeout-minutes {minutes}")
    assert "--distributed-timeout-minutes" in problem and "above 0 and at most 525600" in problem
    assert problems_of("--distributed-timeout-minutes 525600") == []


def test_resolving_twice_is_resolving_once() -> None:
    config = run_with(
        "--swiglu --recompute-method uniform --use-distributed-optimizer --step-batch-size-schedule 0:8,1K:16"
    )
    run = resolve(config, 4)
    assert resolve(run, 4) == run


@pytest.mark.parametrize(
    ("change", "world", "expected"),
    [
        # The layout.
        (
            "--tensor-model-parallel-size 3",
            3,
            "--num-attention-heads 8 is not a multiple of --tensor-model-parallel-size 3",
        ),
        ("--tensor-model-parallel-size 3", 3, "--ffn-hidden-size 256 is not a multiple"),
        (
            "--tensor-model-parallel-size 4 --num-attention-heads 12 --hidden-size 96 --num-query-groups 6",
            4,
            "--num-query-groups 6 does not divide --tensor-model-parallel-size 4, nor does that divide it; use "
            "--tensor-model-parallel-size 1, 2, 3, 6 or 12, or another --num-query-groups.",
        ),
        (
            "--tensor-model-parallel-size 4 --num-query-groups 1 --kv-channels 6",
            4,
            "--num-query-groups 1 makes 4 of --tensor-model-parallel-size 4 ranks share a key and value head, whose "
            "size --kv-channels 6 is not a multiple of that; use --tensor-model-parallel-size 1 or 2, or another",
        ),
        ("--tensor-model-parallel-size 8 --ffn-hidden-size 100", 8, "--ffn-hidden-size 100 is not a multiple"),
        (
            "--tensor-model-parallel-size 8 --sequence-parallel --seq-length 36",
            8,
            "--seq-length (with --sequence-parallel) 36",
        ),
        (
            "--pipeline-model-parallel-size 8",
            8,
            "--pipeline-model-parallel-size 8 is more than --num-layers 4 can fill",
        ),
        (
            "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 4",
            2,
            "0 layers besides the 4 fixed ones",
        ),
        (
            "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1 "
            "--decoder-last-pipeline-num-layers 2",
            2,
            "hold 3 layers on 2 stages, but --num-layers is 4",
        ),
        ("--decoder-first-pipeline-num-layers 1", 1, "needs more than one pipeline stage"),
        (
            "--pipeline-model-parallel-size 2 --decoder-last-pipeline-num-layers 1 "
            "--account-for-loss-in-pipeline-split",
            2,
            "already fixes what --account-for-loss-in-pipeline-split would work out",
        ),
        ("--pipeline-schedule zigzag", 1, "--pipeline-schedule zigzag is not known; use one of: gpipe, 1f1b"),
        (
            "--tensor-model-parallel-size 4",
            6,
            "A world of 6 ranks is not a multiple of tensor 4 x pipeline 1 = 4; start 4 or 8",
        ),
        ("--tensor-model-parallel-size 4", 2, "start 4 ranks"),
        ("--zero-stage 2 --zero-shard-size 4", 6, "--zero-shard-size 4 does not divide the 6 data-parallel ranks"),
        ("--zero-shard-size 2", 2, "--zero-shard-size 2 shards nothing with --zero-stage 0"),
        ("--zero-stage 1 --zero-shard-size 0", 2, "it must be at least 1"),
        (
            "--context-parallel-size 2",
            2,
            "--attention-dropout 0.1 with --context-parallel-size 2 would draw other masks",
        ),
        (
            "--context-parallel-size 4 --seq-length 60",
            4,
            "--seq-length 60 is not a multiple of 8, as --context-parallel-size 4 (--cp-cut zigzag) ask for; use "
            "--seq-length 56 or 64",
        ),
        (
            "--context-parallel-size 4 --seq-length 6",
            4,
            "--seq-length 6 has fewer tokens than 8, as --context-parallel-size 4 (--cp-cut zigzag) ask for; use "
            "--seq-length 8",
        ),
        (
            "--context-parallel-size 2 --tensor-model-parallel-size 4 --sequence-parallel --seq-length 12",
            8,
            "--seq-length 12 is not a multiple of 8, as --context-parallel-size 2 (--cp-cut zigzag) and "
            "--sequence-parallel with --tensor-model-parallel-size 4 ask for; use --seq-length 8 or 16",
        ),
        ("--cp-comm-type ring", 1, "--cp-comm-type ring is none of allgather, p2p, a2a, a2a+p2p"),
        ("--cp-comm-type allgather p2p allgather", 1, "has 3 kinds for --num-layers"),
        ("--expert-model-parallel-size 2", 2, "--expert-model-parallel-size 2 shards experts, and a GPT without"),
        # The model.
        ("--hidden-size 100", 1, "--hidden-size 100 is not a multiple of --num-attention-heads 8"),
        (
            "--num-query-groups 3",
            1,
            "--num-query-groups 3 does not divide --num-attention-heads 8; use one of 1, 2, 4 or 8",
        ),
        (
            "--seq-length 64 --max-position-embeddings 32",
            1,
            "--seq-length 64 is longer than --max-position-embeddings 32",
        ),
        ("--position-embedding-type rope --kv-channels 7", 1, "--kv-channels 7 x --rotary-percent 1 is 7"),
        ("--position-embedding-type rope --rotary-percent 0.1", 1, "is 0; choose them so that it is even and positive"),
        ("--swiglu --squared-relu", 1, "--swiglu and --squared-relu ask for different activations"),
        ("--openai-gelu --activation relu", 1, "--openai-gelu and --activation relu ask for different"),
        ("--swiglu --hidden-size 16", 1, "gives an MLP of width 0; give --ffn-hidden-size"),
        ("--hidden-dropout 1.0", 1, "--hidden-dropout 1.0 is outside its range"),
        ("--attention-dropout -0.1", 1, "--attention-dropout -0.1 is outside its range"),
        ("--num-layers -2", 1, "--num-layers -2 is outside its range (Transformer layers); it must be at least 1"),
        ("--rotary-percent 1.5", 1, "it must be above 0 and at most 1"),
        # Length and batches.
        ("--train-samples 100", 1, "--train-iters 100 and --train-samples 100 both set the length"),
        ("--lr-decay-samples 10", 1, "--lr-decay-samples 10 counts samples, but the run is given by --train-iters"),
        ("--lr-warmup-samples 10", 1, "use --lr-warmup-iters, or --train-samples"),
        ("--global-batch-size 30 --micro-batch-size 4", 2, "use 24 or 32, or --micro-batch-size 3 or 5"),
        (
            "--global-batch-size 3",
            2,
            "--global-batch-size 3 is not a multiple of micro-batch 2 x data-parallel 2 = 4; use 4.",
        ),
        ("--rampup-batch-size 4 2", 1, "is not three whole numbers"),
        ("--rampup-batch-size 4 x 100 --global-batch-size 8", 1, "is not three whole numbers"),
        ("--rampup-batch-size 3 2 100 --global-batch-size 8", 1, "starts at 3, which is not a multiple"),
        ("--rampup-batch-size 4 3 100 --global-batch-size 8", 1, "rises by 3, which is not a multiple"),
        ("--rampup-batch-size 16 2 100 --global-batch-size 8", 1, "starts above --global-batch-size 8"),
        (
            "--rampup-batch-size 2 4 100 --global-batch-size 8",
            1,
            "8 - 2 is not a multiple of 4; use --global-batch-size",
        ),
        ("--step-batch-size-schedule 0:16,1K", 1, "has the pair '1K', which is not TOKENS:SIZE"),
        ("--step-batch-size-schedule 1K:16", 1, "must start at 0 tokens"),
        ("--step-batch-size-schedule 0:16,1K:17", 1, "has the size 17"),
        ("--step-batch-size-schedule 0:16,1K:32 --global-batch-size 16", 1, "is not the last size 32"),
        ("--step-batch-size-schedule 0:16 --rampup-batch-size 2 2 10", 1, "both set how the batch grows"),
        # The optimizer.
        ("--min-lr 1e-2", 1, "--min-lr 0.01 is above --lr 0.001"),
        ("--lr-warmup-init 1e-2", 1, "--lr-warmup-init 0.01 is above --lr 0.001"),
        ("--lr-warmup-iters 100", 1, "--lr-warmup-iters 100 is not shorter than the decay of 100 iters"),
        ("--lr-warmup-iters 30 --lr-decay-iters 20", 1, "is not shorter than the decay of 20 iters"),
        ("--lr-warmup-iters 10 --lr-warmup-fraction 0.1", 1, "both set the warm-up"),
        ("--lr-decay-style WSD", 1, "give --lr-wsd-decay-iters, such as 10"),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 101", 1, "is longer than the whole decay of 100"),
        ("--bf16 --fp16", 1, "--bf16 and --fp16 are both given"),
        ("--min-loss-scale 8 --initial-loss-scale 4", 1, "--min-loss-scale 8 is above --initial-loss-scale 4"),
        ("--start-weight-decay 0.1", 1, "mean nothing while --weight-decay-incr-style is constant"),
        ("--weight-decay-incr-style linear", 1, "needs --start-weight-decay (given: None)"),
        (
            "--weight-decay-incr-style linear --start-weight-decay 0.2 --end-weight-decay 0.1",
            1,
            "--start-weight-decay 0.2 is above --end-weight-decay 0.1",
        ),
        # Recomputation.
        ("--recompute-activations --recompute-granularity full", 1, "asks for selective recomputation"),
        ("--recompute-granularity selective --recompute-method block", 1, "needs --recompute-granularity full"),
        ("--recompute-num-layers 2", 1, "has no meaning without --recompute-granularity full"),
        ("--recompute-granularity full --recompute-method block", 1, "needs --recompute-num-layers"),
        # Data.
        ("--data-path A", 1, "--data-path and --mock-data are different sources"),
        ("--data-temperature 0", 1, "--data-temperature 0 is not above 0"),
        (
            "--train-data-path 1 A 2 B --valid-data-path A --data-temperature 3",
            1,
            "--data-temperature 3 makes weights of the sizes of corpora, but --train-data-path gives weights",
        ),
        ("--multiple-validation-sets", 1, "is for corpora, and --mock-data has none"),
        (
            "--sample-order megatron --multiple-validation-sets",
            1,
            "--multiple-validation-sets is not for --sample-order",
        ),
        ("--validation-set-names a b", 1, "--validation-set-names a b names corpora that are not evaluated one by one"),
        ("--multiple-validation-sets --validation-set-names a a", 1, "gives a name twice"),
        ("--split 0,1,1", 1, "leaves nothing to train on"),
        ("--split 1,2,3,4", 1, "is not one to three shares"),
        ("--split a,b", 1, "is not one to three shares"),
        ("--tokenizer-type GPT2BPETokenizer --vocab-file v", 1, "reads --merge-file, which is not given"),
        ("--tokenizer-type HuggingFaceTokenizer", 1, "reads --tokenizer-model, which is not given"),
        # Checkpoints.
        ("--keep-last 2", 1, "--keep-last 2 needs --save"),
        ("--save c --keep-last 0", 1, "--keep-last 0 is outside its range"),
        ("--ckpt-step 5", 1, "--ckpt-step 5 needs --load"),
        ("--finetune", 1, "there is no --load"),
        (
            "--override-opt-param-scheduler --use-checkpoint-opt_param-scheduler",
            1,
            "from the flags and --use-checkpoint-opt_param-scheduler from the checkpoint",
        ),
    ],
)
def test_a_problem_is_named_with_its_fix(change: str, world: int, expected: str) -> None:
    problems = problems_of(change, world=world)
    assert any(expected in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("drop", "expected"),
    [
        ("--num-layers", "--num-layers is missing"),
        ("--hidden-size", "--hidden-size is missing"),
        ("--num-attention-heads", "--num-attention-heads is missing"),
        ("--seq-length", "--seq-length is missing"),
        ("--micro-batch-size", "--micro-batch-size is missing"),
        ("--lr", "--lr is missing"),
        ("--train-iters", "--train-iters is missing, and so is --train-samples"),
        ("--mock-data", "No data is given"),
        ("--vocab-size", "The size of the vocabulary is unknown"),
    ],
)
def test_a_missing_option_is_the_only_problem(drop: str, expected: str) -> None:
    (problem,) = problems_of(drop=drop)
    assert expected in problem


def test_the_sentence_of_the_style_guide_is_said() -> None:
    assert problems_of("--global-batch-size 30 --micro-batch-size 4", world=2) == [
        "--global-batch-size 30 is not a multiple of micro-batch 4 x data-parallel 2 = 8; "
        "use 24 or 32, or --micro-batch-size 3 or 5."
    ]


def test_a_precision_of_fp32_products_is_for_gpus() -> None:
    assert problems_of("--fp32-matmul-precision high --device cpu") == [
        "--fp32-matmul-precision high is for GPUs, and --device is cpu, where matrices in fp32 are multiplied in fp32; "
        "drop it."
    ]
    assert problems_of("--fp32-matmul-precision high --device cuda") == []
    assert problems_of("--fp32-matmul-precision highest --device cpu") == []


def test_flash_attn_is_refused_where_nothing_would_use_it_and_where_it_is_missing() -> None:
    """The package is for CUDA machines, and tests have none."""
    assert problems_of("--packed-attention flash-attn --device cpu") == [
        "--packed-attention flash-attn is for documents that --reset-attention-mask separates; give both or none.",
        "--packed-attention flash-attn computes in 16 bits; give --bf16 or --fp16, or drop it.",
        "--packed-attention flash-attn is for CUDA devices, and --device is cpu; drop it.",
        "--packed-attention flash-attn needs the package flash-attn, which is not installed; install or drop it.",
    ]


def test_an_attention_backend_is_refused_where_it_has_no_kernel() -> None:
    assert problems_of("--attention-backend fused --device cpu --reset-attention-mask") == [
        "--attention-backend fused has no attention within documents, which --reset-attention-mask asks for; use auto "
        "or flash.",
        "--attention-backend fused is cuDNN's, which is for CUDA devices, and --device is cpu; use auto.",
    ]
    cut = "--context-parallel-size 2 --attention-dropout 0"
    assert problems_of(f"--attention-backend unfused {cut}", world=2) == [
        "--attention-backend unfused has no attention over samples that --context-parallel-size 2 cuts; use auto or "
        "flash."
    ]
    assert problems_of(f"--attention-backend flash {cut}", world=2) == []


def test_all_problems_are_collected_and_raised_together() -> None:
    change = "--num-layers 0 --num-query-groups 3 --bf16 --fp16 --min-lr 1 --split x --keep-last 3"
    problems = problems_of(change, drop="--mock-data")
    assert len(problems) == 7, problems
    with pytest.raises(ConfigError) as raised:
        resolve(run_with(change, "--mock-data"), 1)
    assert str(raised.value).split("\n") == problems


def test_nothing_given_is_all_missing_and_nothing_else() -> None:
    problems = check(GivenRun(), 1)
    assert len(problems) == 9
    assert all("missing" in p or "unknown" in p or "No data" in p for p in problems)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--swiglu", ("swiglu", 128)),
        ("--activation geglu", ("geglu", 128)),
        ("--squared-relu", ("squared_relu", 256)),
        ("--openai-gelu", ("gelu_tanh", 256)),
        ("--swiglu --activation swiglu --ffn-hidden-size 96", ("swiglu", 96)),
    ],
)
def test_activation_and_ffn_width_are_derived(flags: str, expected: tuple[str, int]) -> None:
    model = resolve(run_with(flags), 1).model
    assert (model.activation, model.ffn_hidden_size) == expected


@given(st.integers(24, 40000))
def test_gated_ffn_width_is_megatrons(hidden_size: int) -> None:
    model = derive_model(GivenModel(hidden_size=hidden_size, swiglu=True))
    assert model.ffn_hidden_size == int((hidden_size * 4 * 2 / 3) / 64) * 64


def test_switches_become_values() -> None:
    run = resolve(
        run_with("--use-distributed-optimizer --sequence-parallel --group-query-attention --recompute-activations"), 2
    )
    assert run.parallel.zero_stage == 1
    assert not run.parallel.sequence_parallel
    assert run.model.num_query_groups == 1
    assert run.train.recompute_granularity == "selective"
    full = resolve(run_with("--recompute-granularity full"), 1).train
    assert (full.recompute_method, full.recompute_num_layers) == ("uniform", 1)


def test_decay_lengths_follow_the_length_of_the_run() -> None:
    by_samples = resolve(run_with("--train-samples 500", "--train-iters"), 1).optim
    assert (by_samples.lr_decay_samples, by_samples.lr_decay_iters) == (500, None)


def test_uneven_pipelines_and_few_microbatches_are_no_problem() -> None:
    assert problems_of("--pipeline-model-parallel-size 3", world=3) == []
    assert problems_of("--pipeline-model-parallel-size 4 --decoder-first-pipeline-num-layers 1", world=4) == []
    counted = "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split"
    assert problems_of(f"--pipeline-model-parallel-size 6 {counted}", world=6) == []


def test_a_smaller_vocabulary_flag_than_the_tokenizers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--vocab-size 1000 is smaller than the 1001 ids .* use --vocab-size 1001"):
        with_vocab_size(draft_with("--tokenizer-type ByteTokenizer"), 1001)


def test_the_vocabulary_is_the_tokenizers_or_a_larger_flag() -> None:
    assert with_vocab_size(draft_with(), 300).model.vocab_size == 1000
    assert with_vocab_size(draft_with("--tokenizer-type ByteTokenizer", "--vocab-size"), 300).model.vocab_size == 300


def test_the_null_tokenizers_extra_id_is_counted_once() -> None:
    once = with_vocab_size(draft_with("--tokenizer-type NullTokenizer"), 1001)
    assert (once.model.vocab_size, once.data.eod_token) == (1001, 1000)
    assert with_vocab_size(once, 1002) == once


def test_an_end_of_document_id_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match="--eod-token 5000 is not in the vocabulary of 1000 ids"):
        with_vocab_size(draft_with("--eod-token 5000"), 300)


@settings(max_examples=60, deadline=None)
@given(
    world=st.integers(1, 24),
    tp=st.integers(1, 6),
    pp=st.integers(1, 6),
    micro=st.integers(1, 5),
    batch=st.integers(1, 60),
)
def test_a_run_without_problems_factors_exactly(world: int, tp: int, pp: int, micro: int, batch: int) -> None:
    change = (
        f"--tensor-model-parallel-size {tp} --pipeline-model-parallel-size {pp} --micro-batch-size {micro} "
        f"--global-batch-size {batch} --num-layers 4 --num-attention-heads 4 --ffn-hidden-size 12"
    )
    works = world % (tp * pp) == 0 and 4 % tp == 0 and pp <= 4 and batch % (micro * (world // (tp * pp))) == 0
    problems = problems_of(change, world=world)
    assert (problems == []) == works
    for problem in problems:
        assert problem.endswith(".")


@settings(max_examples=150, deadline=None)
@given(
    layers=st.integers(1, 8),
    stages=st.integers(1, 6),
    first=st.none() | st.integers(1, 8),
    last=st.none() | st.integers(1, 8),
    counted=st.tuples(st.booleans(), st.booleans()),
)
def test_pipelines_are_refused_exactly_where_the_split_fails(
    layers: int, stages: int, first: int | None, last: int | None, counted: tuple[bool, bool]
) -> None:
    change = f"--num-layers {layers} --pipeline-model-parallel-size {stages}"
    change += f" --decoder-first-pipeline-num-layers {first}" if first else ""
    change += f" --decoder-last-pipeline-num-layers {last}" if last else ""
    change += " --account-for-embedding-in-pipeline-split" if counted[0] else ""
    change += " --account-for-loss-in-pipeline-split" if counted[1] else ""
    try:
        split_layers(layers, stages, first=first, last=last, count_embedding=counted[0], count_loss=counted[1])
        splits = True
    except ConfigError:
        splits = False
    assert (problems_of(change, world=stages) == []) == splits


@pytest.mark.parametrize(
    "change",
    [
        "--lr-decay-style cosine --lr-warmup-iters 10",
        "--lr-decay-style WSD --lr-wsd-decay-iters 10",
        "--lr-warmup-fraction 0.5 --min-lr 1e-5",
        "--weight-decay-incr-style cosine --start-weight-decay 0.1 --end-weight-decay 0.2",
    ],
)
def test_a_run_without_problems_has_a_learning_rate_schedule(change: str) -> None:
    run = resolve(run_with(change), 1)
    assert settings_from_config(run.optim, run.train).decay == 100
