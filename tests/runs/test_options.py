"""Options of a run, each by what it must change (or must not): losses, batch sizes, files."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from megatron3d.checkpoint.load import assemble, tensor_shapes
from megatron3d.config.sections.data import DataConfig
from megatron3d.data.build import build_gpt_data
from tests.dist.pool import Pool
from tests.runs.harness import (
    MOCK,
    TINY,
    VOCAB_SIZE,
    losses,
    on_rank,
    random_documents,
    records,
    run_ok,
    steps,
    words,
    write_tokens,
)

# Sums in another order: fp32 rounding, amplified by a few optimizer steps. Measured: under 1e-6.
OTHER_LAYOUT = 1e-5
# A dense model in plain torch beside ours: fp32 rounding of one forward.
DENSE = 1e-5
DROPOUT = "--hidden-dropout 0.2 --attention-dropout 0.2"
PP2 = "--pipeline-model-parallel-size 2"


def _in_pool(pool: Pool, world_size: int, *options: str | Path) -> None:
    """Run on the pool and fail unless every rank ended well."""
    for ended in pool.run(world_size, on_rank, words(*options)):
        assert ended.code == 0, ended.err


def _trained(metrics: Path, *options: str | Path) -> list[float]:
    """Losses of a run in one process."""
    run_ok(*options, "--metrics-file", metrics)
    return losses(metrics)


def _valid_losses(metrics: Path) -> dict[int, float]:
    return {record["step"]: record["valid_loss"] for record in records(metrics) if "valid_loss" in record}


# --- Batches and length -----------------------------------------------------------------------------------------------

# From 2 to 8 by 2 over 12 samples: sizes 2, 4, 6 take 4 consumed samples each, and 8 begins at 12.
RAMP = f"{MOCK} --micro-batch-size 1 --rampup-batch-size 2 2 12 --global-batch-size 8"
RAMP_SIZES = [2, 2, 4, 6, 8, 8]
RAMP_CONSUMED = [2, 4, 8, 14, 22, 30]


def test_the_batch_ramps(tmp_path: Path) -> None:
    _trained(tmp_path / "metrics.jsonl", RAMP)
    assert [record["batch_size"] for record in steps(tmp_path / "metrics.jsonl")] == RAMP_SIZES
    assert [record["consumed_samples"] for record in steps(tmp_path / "metrics.jsonl")] == RAMP_CONSUMED


def test_the_batch_ramps_alike_at_two_data_parallel_ranks_and_across_a_resume(pool: Pool, tmp_path: Path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    expected = _trained(one, RAMP)
    _in_pool(pool, 2, RAMP, "--train-iters 3 --metrics-file", two, "--save", tmp_path / "save")
    _in_pool(pool, 2, RAMP, "--metrics-file", two, "--save", tmp_path / "save")
    assert [record["batch_size"] for record in steps(two)] == RAMP_SIZES
    assert [record["consumed_samples"] for record in steps(two)] == RAMP_CONSUMED
    assert losses(two) == pytest.approx(expected, rel=OTHER_LAYOUT)


def _by_samples(samples: int) -> str:
    return MOCK.replace("--train-iters 6", f"--train-samples {samples}")


def test_a_run_by_samples_leaves_out_the_last_incomplete_batch(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    options = (_by_samples(52), "--lr-decay-style linear --lr-decay-samples 52 --lr-warmup-samples 16")
    assert len(_trained(metrics, *options)) == 6
    assert steps(metrics)[-1]["consumed_samples"] == 48
    # Warm-up over 16 samples, then linear to 0 at 52; a step is made at the samples before it.
    expected = [0.0, 3e-3 / 2, 3e-3, *(3e-3 * (52 - consumed) / 36 for consumed in (24, 32, 40))]
    assert [record["lr"] for record in steps(metrics)] == pytest.approx(expected)


def test_a_run_by_samples_ramps_too(tmp_path: Path) -> None:
    _trained(tmp_path / "metrics.jsonl", _by_samples(31), "--micro-batch-size 1 --rampup-batch-size 2 2 12")
    assert [record["batch_size"] for record in steps(tmp_path / "metrics.jsonl")] == RAMP_SIZES


# --- Data -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two token files: one uses ids 1 to 20, the other the whole vocabulary."""
    folder = tmp_path_factory.mktemp("corpora")
    narrow = [[token % 20 + 1 for token in document[:-1]] + [0] for document in random_documents(2)]
    return write_tokens(folder / "narrow", narrow), write_tokens(folder / "wide", random_documents(3))


def test_a_blend_reads_both_corpora(pool: Pool, corpora: tuple[Path, Path], tmp_path: Path) -> None:
    narrow, wide = corpora
    options = f"{TINY} --train-iters 25 --split 1"
    only_narrow = _trained(tmp_path / "narrow.jsonl", options, "--data-path", narrow)
    only_wide = _trained(tmp_path / "wide.jsonl", options, "--data-path", wide)
    blend = ("--data-path 0.5", narrow, "0.5", wide)
    both = _trained(tmp_path / "both.jsonl", options, *blend)
    # 20 ids in use are learnt quickly (log 20 = 3.0), 101 hardly (log 101 = 4.6), and half of each lies between.
    assert only_narrow[-1] + 0.2 < both[-1] < only_wide[-1] - 0.2
    _in_pool(pool, 2, options, *blend, "--metrics-file", tmp_path / "two.jsonl")
    # As in docs/numerics.md: at this rate rounding differences grow from 1e-7 after 20 steps to 4e-5 after 25.
    assert losses(tmp_path / "two.jsonl")[:20] == pytest.approx(both[:20], rel=OTHER_LAYOUT)


def test_splits_may_have_files_of_their_own(corpora: tuple[Path, Path], tmp_path: Path) -> None:
    narrow, wide = corpora
    metrics = tmp_path / "metrics.jsonl"
    # Megatron-LM's order depends on the length of the run, which the script has to hand to it.
    order = "--train-iters 25 --eval-iters 2 --sample-order megatron"
    options = (TINY, order, "--train-data-path", narrow, "--valid-data-path", wide)
    trained = _trained(metrics, *options)
    assert _valid_losses(metrics)[25] > trained[-1] + 0.5, "validation must have read the other corpus"


@pytest.mark.parametrize("options", ["--reset-position-ids", "--reset-attention-mask", "--eod-mask-loss", "all three"])
@pytest.mark.parametrize("positions", ["learned_absolute", "rope"])
def test_document_boundaries_change_the_loss_as_a_dense_model_says(
    tmp_path: Path, options: str, positions: str
) -> None:
    """The first loss against a GPT written down in plain torch, from the run's own weights (learning rate 0)."""
    flags = "--reset-position-ids --reset-attention-mask --eod-mask-loss" if options == "all three" else options
    prefix = write_tokens(tmp_path / "corpus", random_documents(4, count=200, length=6))
    base = f"{TINY} --train-iters 1 --lr 0 --split 1 --eod-token 0 --position-embedding-type {positions}"
    command = (base, "--init-method-std 0.3 --data-path", prefix)
    plain = _trained(tmp_path / "plain.jsonl", *command)
    (loss,) = _trained(tmp_path / "metrics.jsonl", *command, flags, "--save", tmp_path / "save")
    stream = build_gpt_data(
        DataConfig(data_path=(str(prefix),), split="1"), seq_length=16, vocab_size=VOCAB_SIZE, eod_token=0
    ).train
    weights = {
        name.removeprefix("model/"): assemble(tmp_path / "save/iter_0000001", name)
        for name in tensor_shapes(tmp_path / "save/iter_0000001")
        if name.startswith("model/")
    }
    sums = [_dense_loss(weights, torch.from_numpy(stream.sample(number)), flags) for number in range(8)]
    expected = sum(total for total, _ in sums) / sum(count for _, count in sums)
    assert loss == pytest.approx(expected, rel=DENSE)
    assert abs(loss - plain[0]) > 100 * DENSE * loss, "the option must make a difference here"


def _dense_loss(weights: dict[str, Tensor], sample: Tensor, flags: str) -> tuple[float, int]:
    """Sum of the losses of one sample and their number, for the model of `TINY`: 2 blocks of 4 heads of 8."""
    tokens, labels = sample[:-1], sample[1:]
    document, position, documents, places = 0, 0, [], []
    for token in tokens.tolist():
        documents.append(document)
        places.append(position)
        position += 1
        if token == 0:
            document, position = document + 1, 0
    position_ids = torch.tensor(places if "--reset-position-ids" in flags else list(range(16)))
    allowed = torch.tensor([
        [key <= query and ("attention" not in flags or documents[key] == documents[query]) for key in range(16)]
        for query in range(16)
    ])  # fmt: skip
    x = weights["embedding.word.weight"][tokens]
    learned = weights.get("embedding.position.weight")
    if learned is not None:
        x = x + learned[position_ids]
    for layer in range(2):
        block = {k.removeprefix(f"layers.{layer}."): v for k, v in weights.items() if k.startswith(f"layers.{layer}.")}
        normed = _norm(x, block, "attention_norm")
        q, k, v = (
            part.unflatten(-1, (4, 8)).transpose(0, 1) for part in _linear(normed, block, "attention.qkv").chunk(3, -1)
        )
        if learned is None:
            q, k = _rotate(q, position_ids), _rotate(k, position_ids)
        scores = (q @ k.transpose(1, 2) / math.sqrt(8)).masked_fill(~allowed, -math.inf)
        x = x + _linear((scores.softmax(-1) @ v).transpose(0, 1).flatten(1), block, "attention.projection")
        hidden = F.gelu(_linear(_norm(x, block, "mlp_norm"), block, "mlp.up"), approximate="tanh")
        x = x + _linear(hidden, block, "mlp.down")
    logits = _norm(x, weights, "head.norm") @ weights["embedding.word.weight"].t()
    each = F.cross_entropy(logits, labels, reduction="none")
    counts = (tokens != 0) if "--eod-mask-loss" in flags else torch.ones(16, dtype=torch.bool)
    return float(each[counts].double().sum()), int(counts.sum())


def _linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)


def _rotate(x: Tensor, position_ids: Tensor) -> Tensor:
    """Rotary positions by complex multiplication: dimension i of a head of 8 pairs with i + 4."""
    angles = position_ids.unsqueeze(1) * 10000.0 ** (-torch.arange(4) / 4)
    rotated = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([rotated.real, rotated.imag], -1)


# --- Precision and optimizer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        "--bf16",
        "--bf16 --grad-reduce-in-bf16",
        "--fp16 --initial-loss-scale 1024",
        "--fp16 --loss-scale 256",
        "--optimizer sgd --lr 0.3",
        "--weight-decay 0.1 --clip-grad 0",
        "--weight-decay-incr-style cosine --start-weight-decay 0 --end-weight-decay 0.1",
        "--lr-decay-style WSD --lr-wsd-decay-iters 2 --lr-wsd-decay-style linear",
        "--lr-decay-style cosine --lr-warmup-fraction 0.3 --min-lr 1e-4",
        "--lr-decay-style inverse-square-root --lr-warmup-iters 2",
    ],
)
def test_the_loss_falls_with_precision_and_optimizer(tmp_path: Path, options: str) -> None:
    found = _trained(tmp_path / "metrics.jsonl", MOCK, options)
    assert found[-1] < found[0] - 0.05


@pytest.mark.parametrize(
    "options", ["--bf16", pytest.param("--fp16 --initial-loss-scale 1024", marks=pytest.mark.slow)]
)
def test_half_precision_stays_near_single_precision(pool: Pool, tmp_path: Path, options: str) -> None:
    """8 bits of mantissa (bf16) keep about 2 digits; losses near 4.5 are means over many tokens and agree better."""
    single = _trained(tmp_path / "single.jsonl", MOCK)
    assert _trained(tmp_path / "half.jsonl", MOCK, options) == pytest.approx(single, rel=5e-3)
    layout = f"--tensor-model-parallel-size 2 --sequence-parallel {PP2} {options}"
    _in_pool(pool, 4, MOCK, layout, "--metrics-file", tmp_path / "layout.jsonl")
    assert losses(tmp_path / "layout.jsonl") == pytest.approx(single, rel=5e-3)


def test_fp16_steps_that_overflow_are_skipped_reported_and_change_no_weight(tmp_path: Path) -> None:
    """At a scale of 2**120 every gradient overflows: nothing moves, and the scale halves after the hysteresis."""
    metrics, save = tmp_path / "metrics.jsonl", tmp_path / "save"
    options = f"--fp16 --initial-loss-scale {2**120} --hysteresis 2 --lr-warmup-iters 3"
    said = run_ok(MOCK, options, "--metrics-file", metrics, "--save", save).out
    found = steps(metrics)
    assert all(record["skipped"] for record in found)
    assert [math.log2(record["loss_scale"]) for record in found] == [120, 120, 119, 118, 117, 116]
    assert all(record["grad_norm"] is None and record["finite"] is False for record in found)
    assert [record["lr"] for record in found] == [0.0] * 6, "the schedule counts updates, not attempts"
    assert "skipped" in said
    run_ok(MOCK, "--fp16 --lr 0 --train-iters 1 --save", tmp_path / "untouched")
    for name in tensor_shapes(save / "iter_0000006"):
        first = assemble(save / "iter_0000006", name)
        assert torch.isfinite(first).all(), name
        if name.startswith("model/"):
            assert torch.equal(first, assemble(tmp_path / "untouched" / "iter_0000001", name)), name


def test_weight_decay_rises_by_its_schedule_and_spares_norms_and_biases(tmp_path: Path) -> None:
    """Plain SGD: two runs part at step 2, whose decay is half of the end value, by lr x decay x weight of step 1."""
    sgd = f"{MOCK} --optimizer sgd --sgd-momentum 0 --lr 0.1 --train-iters 2 --save-interval 1"
    rising = "--weight-decay-incr-style linear --start-weight-decay 0 --end-weight-decay 0.5"
    run_ok(sgd, "--weight-decay 0 --save", tmp_path / "without")
    run_ok(sgd, rising, "--save", tmp_path / "with")
    for name in tensor_shapes(tmp_path / "with/iter_0000002"):
        if not name.startswith("model/"):
            continue
        first, without, decayed = (
            assemble(tmp_path / place, name)
            for place in ("without/iter_0000001", "without/iter_0000002", "with/iter_0000002")
        )
        decays = first.dim() == 2
        torch.testing.assert_close(decayed, without - 0.1 * 0.25 * first * decays, rtol=1e-5, atol=1e-6)
        assert not decays or not torch.equal(decayed, without), name


def test_reduction_during_or_after_the_backward_makes_no_difference(pool: Pool, tmp_path: Path) -> None:
    for name, option in (("during", ""), ("after", "--no-overlap-grad-reduce")):
        _in_pool(pool, 2, MOCK, option, "--zero-stage 1 --metrics-file", tmp_path / name)
    assert losses(tmp_path / "during") == losses(tmp_path / "after")


def test_gathering_during_or_before_the_forward_and_prefetching_make_no_difference(pool: Pool, tmp_path: Path) -> None:
    for stage, pairs in (("2", ("", "--overlap-param-gather")), ("3", ("", "--zero-prefetch-units 3"))):
        for number, option in enumerate(pairs):
            metrics = tmp_path / f"{stage}-{number}"
            _in_pool(pool, 2, MOCK, option, f"--zero-stage {stage} --eval-iters 1 --metrics-file", metrics)
        assert losses(tmp_path / f"{stage}-0") == losses(tmp_path / f"{stage}-1")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_says_what_sharding_costs_under_its_pipeline(pool: Pool, stage: int) -> None:
    argv = words(MOCK, f"--pipeline-model-parallel-size 2 --zero-stage {stage}")
    ended = pool.run(4, on_rank, argv)
    assert [one.code for one in ended] == [0] * 4
    said = [line for line in ended[0].out.splitlines() if "under a pipeline cost" in line]
    assert len(said) == (1 if stage > 1 else 0)
    assert all(("gathers of all weights" in line) == (stage == 3) for line in said)


# --- Model ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        "--untie-embeddings-and-output-weights",
        "--normalization RMSNorm",
        "--position-embedding-type rope",
        "--position-embedding-type rope --rotary-percent 0.5 --rotary-interleaved",
        "--position-embedding-type none",
        "--swiglu --ffn-hidden-size 64",
        "--activation geglu --ffn-hidden-size 64",
        "--squared-relu",
        "--group-query-attention --num-query-groups 2",
        "--group-query-attention",
        "--kv-channels 16",
        "--qk-layernorm",
        "--disable-bias-linear",
        "--disable-bias-linear --add-qkv-bias",
        "--apply-residual-connection-post-layernorm",
        "--max-position-embeddings 64",
        (
            "--normalization RMSNorm --position-embedding-type rope --swiglu --ffn-hidden-size 64 "
            "--disable-bias-linear --untie-embeddings-and-output-weights --group-query-attention --num-query-groups 2"
        ),
    ],
)
def test_the_loss_of_every_model_falls(tmp_path: Path, options: str) -> None:
    found = _trained(tmp_path / "metrics.jsonl", MOCK, options, "--train-iters 3 --lr 1e-2")
    assert found[0] == pytest.approx(math.log(VOCAB_SIZE), rel=0.03), "an ignorant model starts at log V"
    assert found[2] < found[1] < found[0]


@pytest.mark.parametrize(
    "options",
    [
        "--recompute-granularity full",
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 2",
        "--recompute-granularity full --recompute-method block --recompute-num-layers 1",
        "--recompute-activations",
    ],
)
def test_recomputation_changes_no_bit_of_a_loss(tmp_path: Path, options: str) -> None:
    base = f"{MOCK} {DROPOUT} --num-layers 3"
    plain = _trained(tmp_path / "plain.jsonl", base)
    assert _trained(tmp_path / "recomputed.jsonl", base, options) == plain
    assert plain != _trained(tmp_path / "dry.jsonl", f"{MOCK} --num-layers 3"), "dropout must be at work"


def test_recomputation_changes_no_bit_of_a_loss_at_a_layout(pool: Pool, tmp_path: Path) -> None:
    layout = f"{MOCK} {DROPOUT} --tensor-model-parallel-size 2 --sequence-parallel {PP2}"
    for name, option in (("plain", ""), ("full", "--recompute-method uniform"), ("part", "--recompute-activations")):
        _in_pool(pool, 4, layout, option, "--metrics-file", tmp_path / name)
    assert losses(tmp_path / "full") == losses(tmp_path / "plain")
    assert losses(tmp_path / "part") == losses(tmp_path / "plain")


# --- Reports ----------------------------------------------------------------------------------------------------------


def test_the_start_record_tells_what_the_run_is_made_of(pool: Pool, tmp_path: Path) -> None:
    """2 layers of H 32, F 128, V 101 (padded to 104), S 16; a stage with 4 micro-batches idles 1 / (4 + 1)."""
    metrics = tmp_path / "metrics.jsonl"
    _in_pool(pool, 4, MOCK, f"{PP2} --zero-stage 1 --micro-batch-size 1 --metrics-file", metrics)
    start = records(metrics)[0]
    block = 4 * 32 * 32 + 4 * 32 + 2 * 32 * 128 + 128 + 32 + 4 * 32
    assert start["event"] == "start"
    assert start["parameters"] == 2 * block + (101 + 16) * 32 + 2 * 32
    assert start["layout"] == {"tp": 1, "pp": 2, "dp": 2, "zero": 1}
    assert start["schedule"] == "1f1b"
    assert start["predicted_bubble"] == pytest.approx(1 / 5)
    stage = 4 * (block + (104 + 16) * 32)  # bytes of the larger stage, with padding to whole slices
    assert start["bytes_per_rank"]["weights"] == pytest.approx(stage, rel=0.05)
    assert start["bytes_per_rank"]["gradients"] == pytest.approx(stage, rel=0.05)
    # Two moments of half the parameters: the weights themselves are fp32 and serve as masters.
    assert start["bytes_per_rank"]["optimizer"] == pytest.approx(stage, rel=0.05)
    fields = {"step", "loss", "grad_norm", "lr", "consumed_samples", "tokens_per_second", "skipped"}
    assert all(fields <= set(record) for record in steps(metrics))


def test_evaluation_comes_at_its_interval_and_is_the_same_at_another_layout(pool: Pool, tmp_path: Path) -> None:
    options = f"{MOCK} {DROPOUT} --lr 0 --eval-interval 2 --eval-iters 3"
    one, four = tmp_path / "one.jsonl", tmp_path / "four.jsonl"
    _trained(one, options)
    found = _valid_losses(one)
    assert list(found) == [2, 4, 6]
    assert len(set(found.values())) == 1, "the weights do not move, dropout is off, and the samples are the same"
    _in_pool(pool, 4, options, PP2, "--metrics-file", four)
    assert _valid_losses(four) == pytest.approx(found, rel=OTHER_LAYOUT)


def test_tensorboard_gets_the_scalars_of_the_metrics_file(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    expected = _trained(metrics, MOCK, "--eval-iters 1 --eval-interval 3 --tensorboard-dir", tmp_path / "events")
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(expected)
    assert {event.step: event.value for event in events.Scalars("valid_loss")} == pytest.approx(_valid_losses(metrics))
    assert {"lr", "grad_norm", "tokens_per_second"} <= set(events.Tags()["scalars"])


def test_a_config_file_gives_what_flags_leave_open(tmp_path: Path) -> None:
    """The same run from flags and from a file; a flag beats the file."""
    (tmp_path / "run.json").write_text('{"num_layers": 2, "hidden_size": 32, "lr": 1.0}')
    flags = MOCK.replace("--num-layers 2 --hidden-size 32", "")
    from_file = _trained(tmp_path / "file.jsonl", flags, "--config", tmp_path / "run.json")
    assert from_file == _trained(tmp_path / "flags.jsonl", MOCK)
