"""The table of what each option means to a resumed run: complete, and true of resolved values."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron3d.config import resume
from megatron3d.config.check import resolve
from megatron3d.config.cli import parse_args
from megatron3d.config.options import BY_KEY, SECTIONS
from megatron3d.config.resume import COMPARED_ELSEWHERE, EFFECTS, Effect, differences
from megatron3d.config.run import RunConfig
from tests.runs.harness import MOCK

ALL_FIELDS = {(section, field.name) for section, kind in SECTIONS.items() for field in dataclasses.fields(kind)}

ROPE = "--position-embedding-type rope"
YARN = "--position-embedding-type yarn --yarn-original-max-position-embeddings 8"


def resolved(options: str = "", *, architecture: str = "gpt", base: str = MOCK) -> RunConfig:
    argv = f"{base} {options}".split()
    run = parse_args(argv, program="p", description="d", log=lambda line: None, architecture=architecture)
    return resolve(run, 1)


def differences_by_line(saved: RunConfig, now: RunConfig) -> dict[str, Effect]:
    return {str(one): one.effect for one in differences(saved, now)}


def test_every_field_of_every_section_has_an_effect_and_nothing_else_has() -> None:
    """A new option must be given a class here, by whoever adds it."""
    assert set(EFFECTS) == ALL_FIELDS


def test_no_field_has_two_effects() -> None:
    """The table is written as words, in which a name could stand twice."""
    words = [
        (section, name)
        for section, by_effect in resume._TABLE.items()
        for names in by_effect.values()
        for name in names.split()
    ]
    assert sorted(words) == sorted(set(words))


def test_equal_runs_do_not_differ_whatever_their_layout() -> None:
    assert (
        differences_by_line(
            resolved(), resolved("--micro-batch-size 4 --zero-stage 1 --log-interval 7 --recompute-activations")
        )
        == {}
    )


@pytest.mark.parametrize(
    ("options", "line", "effect"),
    [
        ("--num-layers 1", "--num-layers: checkpoint 2, this run 1", Effect.FUNCTION),
        ("--num-attention-heads 2", "--num-attention-heads: checkpoint 4, this run 2", Effect.FUNCTION),
        ("--num-attention-heads 2", "--kv-channels: checkpoint 8, this run 16", Effect.FUNCTION),
        ("--squared-relu", "--activation: checkpoint gelu_tanh, this run squared_relu", Effect.FUNCTION),
        ("--norm-epsilon 1e-6", "--norm-epsilon: checkpoint 1e-05, this run 1e-06", Effect.FUNCTION),
        ("--disable-bias-linear", "--disable-bias-linear: checkpoint off, this run on", Effect.FUNCTION),
        ("--reset-position-ids --eod-token 3", "--reset-position-ids: checkpoint off, this run on", Effect.FUNCTION),
        (
            f"{ROPE} --rotary-base 5e5",
            "--position-embedding-type: checkpoint learned_absolute, this run rope",
            Effect.FUNCTION,
        ),
        ("--seed 7", "--seed: checkpoint 1234, this run 7", Effect.SAMPLES),
        ("--seq-length 8 --max-position-embeddings 16", "--seq-length: checkpoint 16, this run 8", Effect.SAMPLES),
        ("--adam-beta2 0.95", "--adam-beta2: checkpoint 0.999, this run 0.95", Effect.REPORTED),
        ("--clip-grad 0.5", "--clip-grad: checkpoint 1, this run 0.5", Effect.REPORTED),
        ("--hidden-dropout 0.1", "--hidden-dropout: checkpoint 0, this run 0.1", Effect.REPORTED),
        ("--global-batch-size 16", "--global-batch-size: checkpoint 8, this run 16", Effect.REPORTED),
        ("--bf16", "precision (--bf16, --fp16): checkpoint fp32, this run bf16", Effect.REPORTED),
        ("--bf16 --fp8-format e4m3", "--fp8-format: checkpoint none, this run e4m3", Effect.REPORTED),
    ],
)
def test_a_changed_option_is_named_with_both_values(options: str, line: str, effect: Effect) -> None:
    assert differences_by_line(resolved(), resolved(options))[line] is effect


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "--activation gelu_tanh"),
        ("--swiglu", "--activation swiglu"),
        ("", "--num-query-groups 4 --kv-channels 8 --ffn-hidden-size 128 --max-position-embeddings 16"),
        ("--optimizer adam", "--optimizer adamw"),
        ("--optimizer sgd", "--optimizer sgd --adam-beta1 0.8 --muon-momentum 0.5"),
        ("", "--rotary-base 500000"),
        (
            f"{ROPE} --rotary-scaling linear --rotary-scaling-factor 4",
            f"{ROPE} --rotary-seq-len-interpolation-factor 4",
        ),
        (f"{ROPE} --use-rope-scaling", f"{ROPE} --rotary-scaling llama3 --rope-scaling-factor 8"),
        (f"{ROPE} --rotary-scaling yarn --yarn-original-max-position-embeddings 8", f"{YARN} --rope-scaling-factor 2"),
        ("--position-embedding-type rope", "--position-embedding-type rope --max-position-embeddings 64"),
        ("--data-path a --split 969,30,1", "--data-path a --split 969.0,30,1.0"),
        ("--bf16", "--bf16 --initial-loss-scale 8"),
    ],
)
def test_values_that_mean_the_same_or_nothing_are_no_difference(before: str, after: str) -> None:
    base = MOCK.replace("--mock-data", "") if "--data-path" in before else MOCK
    assert differences_by_line(resolved(before, base=base), resolved(after, base=base)) == {}


def test_masking_counts_for_a_bert_alone() -> None:
    changed = "--mask-prob 0.3"
    bert = {"architecture": "bert"}
    saved, now = (resolved(options, **bert) for options in ("", changed))
    assert differences_by_line(saved, now) == {"--mask-prob: checkpoint 0.15, this run 0.3": Effect.SAMPLES}
    assert differences_by_line(resolved(), resolved(changed)) == {}


OFF_SWITCHES = [
    key
    for key, option in BY_KEY.items()
    if option.flag.kind == "off" and EFFECTS[key] is not Effect.FREE and key not in COMPARED_ELSEWHERE
]


def test_a_length_that_changes_megatrons_order_of_samples_is_told_as_that() -> None:
    """Another length is another order there, unless the run says how many samples decide it."""
    files = MOCK.replace("--mock-data", "--data-path a")
    saved, longer = (
        resolved(f"--sample-order megatron --train-iters {iters} --eval-iters 0", base=files) for iters in (3, 9)
    )
    (line,) = (one for one in differences(saved, longer) if one.effect is Effect.SAMPLES)
    assert str(line).endswith("checkpoint 24, this run 72") and line.option.startswith("--sample-order-samples")
    options = "--sample-order megatron --train-iters 9 --eval-iters 0 --sample-order-samples 24"
    assert differences(saved, resolved(options, base=files)) == []


def test_batches_decide_the_samples_of_a_curriculum() -> None:
    files = MOCK.replace("--mock-data", "--data-path a")
    curriculum = "--curriculum-metric m --curriculum-index i --curriculum-steps 2"
    for more, effect in ((curriculum, Effect.SAMPLES), ("", Effect.REPORTED)):
        saved, now = (resolved(f"{more} --global-batch-size {size}", base=files) for size in (8, 16))
        assert differences_by_line(saved, now) == {"--global-batch-size: checkpoint 8, this run 16": effect}


@pytest.mark.parametrize("key", OFF_SWITCHES)
def test_a_flag_that_switches_something_off_is_on_in_the_run_that_has_it(key: tuple[str, str]) -> None:
    spelling = BY_KEY[key].spelling
    kind = "bert" if key[1] in ("bert_binary_head", "mask_whole_words") else "gpt"
    base = "--optimizer muon" if key[1].startswith("muon") else YARN if key[1].startswith("yarn") else ""
    base = "--bf16 --fp8-format hybrid" if key[1] == "fp8_wgrad" else base
    without, given = (resolved(f"{base} {more}", architecture=kind) for more in ("", spelling))
    assert f"{spelling}: checkpoint off, this run on" in differences_by_line(without, given)
    assert f"{spelling}: checkpoint on, this run off" in differences_by_line(given, without)


def _another(value: Any, kind: str, choices: tuple[Any, ...]) -> Any:
    if choices:
        return next(choice for choice in choices if choice != value)
    if isinstance(value, bool):
        return not value
    if kind == "list":
        return (*value, "2")
    return f"{value},1" if isinstance(value, str) else (value or 0) + 1


# Runs in which, together, every option has an effect.
RUNS = (
    "",
    "--reset-position-ids --eod-token 3 --position-embedding-type rope",
    "--disable-bias-linear --fp16",
    "--fp16 --loss-scale 8",
    "--num-layers 4 --bf16 --fp8-format e4m3 --first-last-layers-bf16",
    YARN,
    f"{ROPE} --use-rope-scaling",
    *(f"--optimizer {name}" for name in ("sgd", "lion", "muon")),
)


FIM = "--fim-data --fim-split-sample <file> --fim-fragment-rate 0.5 --tokenizer-type ByteTokenizer"


@pytest.fixture(scope="module")
def runs() -> list[RunConfig]:
    found = [resolved(options) for options in RUNS]
    files = MOCK.replace("--mock-data", "--data-path a")
    orders = [resolved(more, base=files) for more in ("", "--sample-order megatron", FIM)]
    return [*found, resolved(architecture="bert"), *orders]


@pytest.mark.parametrize("key", [k for k, e in EFFECTS.items() if e is not Effect.FREE and k not in COMPARED_ELSEWHERE])
def test_a_change_of_any_option_that_is_not_free_is_told_in_a_run_where_it_counts(
    key: tuple[str, str], runs: list[RunConfig]
) -> None:
    section, name = key
    option = BY_KEY[key]
    effects = set()
    for run in runs:
        value = _another(option.value_in(run), option.flag.kind, option.flag.choices)
        changed = dataclasses.replace(getattr(run, section), **{name: value})
        effects |= {one.effect for one in differences(run, dataclasses.replace(run, **{section: changed}))}
    assert EFFECTS[key] in effects
