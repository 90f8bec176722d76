"""Options of experts: what they mean, and a sentence for each combination that no router or layout can be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron3d.config.check import check, resolve
from megatron3d.config.cli import parse_args
from megatron3d.config.experts import balance_losses, expert_layers
from megatron3d.config.run import GivenRun

SHAPE = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --vocab-size 64 --micro-batch-size 2 "
    "--global-batch-size 12 --lr 1e-3 --mock-data --train-iters 5 --device cpu"
)
EIGHT = "--num-experts 8"


def given(words: str, *, architecture: str = "gpt") -> GivenRun:
    program = f"pretrain_{architecture}.py"
    return parse_args(f"{SHAPE} {words}".split(), program=program, description="", architecture=architecture)


@pytest.mark.parametrize(
    ("frequency", "layers"),
    [
        ("1", (True, True, True, True)),
        ("2", (True, False, True, False)),
        ("3", (True, False, False, True)),
        ("([0]*1+[1]*3)", (False, True, True, True)),
        ("[1, 0] * 2", (True, False, True, False)),
        ("2*[0]+[1]+[0]", (False, False, True, False)),
        ("1::2", (False, True, False, True)),
        ("::3", (True, False, False, True)),
    ],
)
def test_a_layer_frequency_is_a_number_or_a_list(frequency: str, layers: tuple[bool, ...]) -> None:
    assert expert_layers(frequency, 4) == layers
    model = resolve(given(f"{EIGHT} --moe-layer-freq {frequency.replace(' ', '')}"), 1).model
    assert [model.experts_of(layer) for layer in range(4)] == [8 * has for has in layers]
    assert model.num_expert_layers == sum(layers)


@pytest.mark.parametrize(
    "frequency",
    ["0", "[1]*5", "[2]*4", "often", "__import__('os')", "[1]*4-[0]", "[1]*10**9", "(" * 300, "[[1]]*4", "0::0", ":2"],
)
def test_a_frequency_of_another_length_or_form_is_refused(frequency: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        expert_layers(frequency, 4)


def test_several_numbers_of_experts_are_those_of_the_layers_that_have_some() -> None:
    model = resolve(given("--num-experts 2 4 8 --moe-layer-freq [1,0,1,1]"), 1).model
    assert [model.experts_of(layer) for layer in range(4)] == [2, 0, 4, 8]
    assert model.num_experts == 8 and model.has_experts
    assert resolve(given("--num-experts-by-layer 2 4 8 --moe-layer-freq [1,0,1,1]"), 1).model == model
    assert resolve(replace(given(""), model=model), 1).model == model, "resolving twice is once"


def test_the_losses_of_balance_have_a_weight_each() -> None:
    assert balance_losses((), ()) == (("seq_aux_loss", 0.01),)
    assert balance_losses(("none",), ()) == ()
    assert balance_losses((), ("0",)) == ()
    assert balance_losses(("aux_loss", "global_aux_loss"), ("0.1", "1e-3")) == (
        ("aux_loss", 0.1),
        ("global_aux_loss", 1e-3),
    )


@pytest.mark.parametrize(
    ("words", "world", "sentence"),
    [
        (f"{EIGHT} --moe-router-topk 9", 1, "--moe-router-topk 9 chooses among 8 experts"),
        (f"{EIGHT} --moe-router-topk 1", 1, "add --moe-router-pre-softmax"),
        (f"{EIGHT} --moe-router-pre-softmax --moe-router-score-function sigmoid", 1, "leave one out"),
        (f"{EIGHT} --moe-router-enable-expert-bias", 1, "use --moe-router-score-function sigmoid"),
        (f"{EIGHT} --moe-router-num-groups 4", 1, "--moe-router-num-groups 4 needs --moe-router-group-topk"),
        (f"{EIGHT} --moe-router-group-topk 2", 1, "--moe-router-group-topk 2 needs --moe-router-num-groups"),
        (f"{EIGHT} --moe-router-num-groups 3 --moe-router-group-topk 1", 1, "does not divide --num-experts 8"),
        (f"{EIGHT} --moe-router-num-groups 4 --moe-router-group-topk 5", 1, "--moe-router-group-topk of at most 4"),
        (f"{EIGHT} --moe-layer-freq [1]*3", 1, "is about 3 layers, and there are 4"),
        (f"{EIGHT} --moe-layer-freq [0]*4", 1, "leaves no layer with experts"),
        (f"{EIGHT} --moe-router-load-balancing-type sinkhorn", 1, "sinkhorn is not among the losses"),
        (f"{EIGHT} --moe-router-load-balancing-type none aux_loss", 1, "give none alone, or leave it out"),
        (f"{EIGHT} --moe-aux-loss-coeff 0.1 0.2", 1, "has 2 weights for the 1 losses"),
        (f"{EIGHT} --moe-aux-loss-coeff much", 1, "--moe-aux-loss-coeff much is no weight"),
        (f"{EIGHT} --moe-router-load-balancing-type aux_loss aux_loss", 1, "names a loss twice"),
        (f"{EIGHT} --moe-router-load-balancing-type none --moe-aux-loss-coeff 0.1", 1, "has no loss; leave one out"),
        (f"{EIGHT} --moe-token-drop-policy random", 1, "give --moe-expert-capacity-factor too"),
        (f"{EIGHT} --moe-router-bias-update-rate 0.1", 1, "give --moe-router-enable-expert-bias too"),
        (f"{EIGHT} --moe-shared-expert-gate", 1, "give --moe-shared-expert-intermediate-size too"),
        (f"{EIGHT} --moe-min-capacity 4", 1, "give --moe-expert-capacity-factor too"),
        (f"{EIGHT} --moe-pad-expert-input-to-capacity", 1, "give --moe-expert-capacity-factor too"),
        (f"{EIGHT} --recompute-reuse-communication", 1, "none are without --recompute-granularity full"),
        (f"{EIGHT} --moe-expert-capacity-factor 0", 1, "it must be above 0"),
        (f"{EIGHT} --moe-input-jitter-eps 1", 1, "it must be at least 0 and below 1"),
        (f"{EIGHT} --expert-model-parallel-size 3", 3, "does not divide --num-experts 8"),
        (f"{EIGHT} --expert-model-parallel-size 4", 6, "does not divide the 6 ranks of a pipeline stage"),
        (f"{EIGHT} --expert-tensor-parallel-size 3", 3, "--moe-ffn-hidden-size 128 is not a multiple of"),
        (
            f"{EIGHT} --expert-model-parallel-size 2 --zero-stage 1 --zero-shard-size 3",
            6,
            "are no whole number of the 2 ranks that hold all experts once",
        ),
        ("--moe-router-topk 3", 1, "--moe-router-topk 3 is about experts; give --num-experts"),
        ("--moe-aux-loss-coeff 0.1", 1, "--moe-aux-loss-coeff 0.1 is about experts"),
        ("--expert-tensor-parallel-size 2", 2, "--expert-tensor-parallel-size 2 shards experts"),
        ("--num-experts 0", 1, "it must be at least 1"),
        ("--num-experts 4 8", 1, "has 2 numbers for the 4 layers with experts"),
        ("--num-experts 4 8 8 1", 1, "has 1, and each layer with experts has at least 2"),
        ("--num-experts 4 8 many 8", 1, "--num-experts 4 8 many 8 has many"),
        ("--num-experts 3 --num-experts-by-layer 4 4 8 8", 1, "contradict each other; give one of them"),
        ("--num-experts 3 6 4 3 --expert-model-parallel-size 3", 3, "does not divide --num-experts 4"),
        ("--num-experts 2 4 8 8 --moe-router-topk 4", 1, "--moe-router-topk 4 chooses among 2 experts"),
        (f"{EIGHT} --mlp-type residual --moe-shared-expert-intermediate-size 8", 1, "leave one out"),
        ("--mlp-type residual", 1, "--mlp-type residual is about experts; give --num-experts"),
    ],
)
def test_what_no_mixture_of_experts_can_be_is_refused_in_a_sentence(words: str, world: int, sentence: str) -> None:
    problems = check(given(words), world)
    assert len(problems) == 1 and sentence in problems[0], problems


def test_experts_are_those_of_a_decoder() -> None:
    (problem,) = check(given(f"{EIGHT} --bert-no-binary-head", architecture="bert"), 1)
    assert problem.startswith("--num-experts 8 means nothing to a BERT; leave it out, or use pretrain_gpt.py")


def test_names_of_deepspeed_are_those_options() -> None:
    run = given(f"{EIGHT} --topk 4 --moe-loss-coeff 0.1 --moe-expert-parallel-size 2")
    model, parallel = run.model, run.parallel
    assert (model.moe_router_topk, model.moe_aux_loss_coeff, parallel.expert_model_parallel_size) == (4, ("0.1",), 2)
    pyramid = resolve(given("--num-experts 4 8 --expert-interval 2 --mlp-type residual"), 1).model
    assert [pyramid.experts_of(layer) for layer in range(4)] == [0, 4, 0, 8] and pyramid.mlp_type == "residual"
