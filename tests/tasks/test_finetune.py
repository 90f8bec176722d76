"""Fine-tuning, whole: no layout changes it, transformers finds the same losses, the best weights are those kept.

All runs are those of the command-line tool, with dropout off where nothing else is said.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron3d.checkpoint.directory import find_checkpoint, list_checkpoints
from megatron3d.checkpoint.load import assemble, read_document
from megatron3d.convert.hf import read_model
from megatron3d.data.tokenizer import TokenizerSpec
from megatron3d.tasks.glue.average import WeightAverage
from megatron3d.tasks.glue.encode import Encoded, encode
from megatron3d.tasks.glue.finetune import grouped
from megatron3d.tasks.glue.order import training_steps
from megatron3d.tasks.glue.read import read_rows
from megatron3d.tasks.glue.tasks import GLUE_TASKS
from megatron3d.tasks.glue.weights import remember
from megatron3d.train.setup import TrainingSetup
from tests.dist.pool import Pool
from tests.runs.harness import ROOT, losses, on_rank, records, run, steps, words
from tests.tasks.small import (
    COUNTS,
    LABELS,
    QUIET,
    SCRIPT,
    USUAL,
    VOCABULARY,
    bert,
    bert_classifier,
    result,
    tool,
    tuned,
    write_hf,
    write_task,
)

TOLERANCE = 1e-5  # sums in another order: fp32 rounding, amplified by a few optimizer steps
RUNS = count()
DROPOUT = "--hidden-dropout 0.1 --attention-dropout 0.1"
TP2, PP2, SP = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2", "--sequence-parallel"


@dataclass(frozen=True)
class Outcome:
    """What a run left behind: its result, the loss of each step, and the lines of its predictions."""

    result: dict[str, Any]
    losses: list[float]
    predictions: list[str]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory of a small BERT."""
    return write_hf(tmp_path_factory.mktemp("hf"), bert())


@pytest.fixture(scope="module")
def sst(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of SST-2, small."""
    return write_task("sst-2", tmp_path_factory.mktemp("glue") / "SST-2")


@pytest.fixture(scope="module")
def sts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of STS-B, small."""
    return write_task("sts-b", tmp_path_factory.mktemp("glue") / "STS-B")


def outcome_of(folder: Path, task: str, *options: str | Path, pool: Pool | None = None, world_size: int = 1) -> Outcome:
    """Run the tool in this process or on the pool, and read what it left."""
    here = folder / f"run{next(RUNS)}"
    argv = words(f"--task {task}", *options, "--metrics-file", here / "m.jsonl", "--predict", here)
    here.mkdir()
    ended = [run(argv, script=SCRIPT)] if pool is None else pool.run(world_size, on_rank, argv, SCRIPT)
    assert {one.code for one in ended} == {0}, ended[0].err
    assert all(not one.out for one in ended[1:]), "only rank 0 says the result"
    (file,) = here.glob("*.tsv")
    return Outcome(result(ended[0]), losses(here / "m.jsonl"), file.read_text().splitlines())


def assert_same(found: Outcome, expected: Outcome) -> None:
    """Losses of steps and dev, metrics and predictions are alike, but for rounding."""
    assert found.losses == pytest.approx(expected.losses, rel=TOLERANCE)
    assert found.result["loss"] == pytest.approx(expected.result["loss"], rel=TOLERANCE)
    assert found.result["metrics"] == pytest.approx(expected.result["metrics"], abs=TOLERANCE)
    assert found.result["epoch"] == expected.result["epoch"]
    if expected.result["task"] == "sts-b":
        values = [[float(line.split("\t")[1]) for line in one.predictions[1:]] for one in (found, expected)]
        assert values[0] == pytest.approx(values[1], abs=0.0011)  # written with three decimals
    else:
        assert found.predictions == expected.predictions


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory, hf: Path, sst: Path) -> Outcome:
    """SST-2 in one process."""
    return outcome_of(tmp_path_factory.mktemp("one"), "sst-2", "--data-dir", sst, "--hf", hf, USUAL)


LAYOUTS = [
    pytest.param(4, f"{TP2} {PP2} --micro-batch-size 2", id="tp2-pp2"),
    pytest.param(4, f"{PP2} --pipeline-schedule zb-h1 --micro-batch-size 2 --zero-stage 1", id="pp2-dp2-zero-bubble"),
    pytest.param(2, f"{TP2} {SP} --micro-batch-size 4", id="tp2-sp"),
    pytest.param(2, "--zero-stage 2 --micro-batch-size 4", id="dp2-zero2"),
    pytest.param(2, "--zero-stage 3 --micro-batch-size 2", id="dp2-zero3"),
]


@pytest.mark.parity
@pytest.mark.parametrize(("world_size", "options"), LAYOUTS)
def test_the_layout_changes_no_loss_metric_or_prediction(
    pool: Pool, tmp_path: Path, hf: Path, sst: Path, one_process: Outcome, world_size: int, options: str
) -> None:
    arguments = ("--data-dir", sst, "--hf", hf, USUAL, options)
    assert_same(outcome_of(tmp_path, "sst-2", *arguments, pool=pool, world_size=world_size), one_process)


@pytest.mark.parity
def test_a_regression_is_the_same_at_tp2_pp2_with_sequences_cut_and_weights_sharded(
    pool: Pool, tmp_path: Path, hf: Path, sts: Path
) -> None:
    """With dropout: lengths of batches, whole last blocks and who holds which sample of a group change no mask.

    With sequence parallelism batches have an even length and the last block computes all positions.
    """
    arguments = ("--data-dir", sts, "--hf", hf, USUAL, DROPOUT, "--length-group-size 4")
    found = outcome_of(tmp_path, "sts-b", *arguments, f"{TP2} {PP2} {SP} --micro-batch-size 2", pool=pool, world_size=4)
    assert_same(found, outcome_of(tmp_path, "sts-b", *arguments))


def test_gradients_accumulated_over_micro_batches_are_those_of_one(
    tmp_path: Path, hf: Path, sst: Path, one_process: Outcome
) -> None:
    assert len(one_process.losses) == 3 * -(-COUNTS["train"] // 8)
    for micro in (1, 4):
        found = outcome_of(tmp_path, "sst-2", "--data-dir", sst, "--hf", hf, USUAL, f"--micro-batch-size {micro}")
        assert_same(found, one_process)


@pytest.fixture(scope="module")
def one_process_in_groups(tmp_path_factory: pytest.TempPathFactory, hf: Path, sst: Path) -> Outcome:
    """SST-2 in one process, a step's samples in four groups of a length each."""
    folder = tmp_path_factory.mktemp("groups")
    return outcome_of(folder, "sst-2", "--data-dir", sst, "--hf", hf, USUAL, "--length-group-size 2")


GROUP_LAYOUTS = [
    pytest.param(4, f"{TP2} {PP2} {SP} --micro-batch-size 2", id="tp2-pp2-sp"),
    pytest.param(4, f"{PP2} --micro-batch-size 1 --zero-stage 1", id="pp2-dp2"),
    pytest.param(2, f"{PP2} --micro-batch-size 1 --num-layers-per-virtual-pipeline-stage 1", id="pp2-interleaved"),
    pytest.param(2, "--zero-stage 3 --micro-batch-size 1", id="dp2-zero3"),
]


@pytest.mark.parity
@pytest.mark.parametrize(("world_size", "options"), GROUP_LAYOUTS)
def test_groups_of_several_lengths_in_a_step_are_the_same_at_any_layout(
    pool: Pool, tmp_path: Path, hf: Path, sst: Path, one_process_in_groups: Outcome, world_size: int, options: str
) -> None:
    arguments = ("--data-dir", sst, "--hf", hf, USUAL, options, "--length-group-size 2")
    assert_same(outcome_of(tmp_path, "sst-2", *arguments, pool=pool, world_size=world_size), one_process_in_groups)


@pytest.mark.parity
def test_the_same_tokens_are_hidden_at_any_layout_and_none_when_measuring(
    pool: Pool, tmp_path: Path, hf: Path, sst: Path, one_process: Outcome
) -> None:
    arguments = ("--data-dir", sst, "--hf", hf, USUAL, "--token-dropout 0.3")
    hidden = outcome_of(tmp_path, "sst-2", *arguments)
    layout = f"{PP2} --micro-batch-size 2 --zero-stage 1"
    assert_same(outcome_of(tmp_path, "sst-2", *arguments, layout, pool=pool, world_size=4), hidden)
    assert all(abs(here - there) > 1e-3 for here, there in zip(hidden.losses[:3], one_process.losses))
    still = ("--data-dir", sst, "--hf", hf, USUAL, "--lr 1e-9 --lr-warmup-fraction 0 --seed 3 --epochs 1")
    seen, masked = (outcome_of(tmp_path, "sst-2", *still, f"--token-dropout {share}") for share in (0, 0.5))
    assert masked.result["loss"] == pytest.approx(seen.result["loss"], rel=1e-5)
    assert masked.losses != pytest.approx(seen.losses, rel=1e-3)


def test_groups_make_other_steps_of_the_same_samples(one_process: Outcome, one_process_in_groups: Outcome) -> None:
    assert len(one_process_in_groups.losses) == len(one_process.losses)
    assert one_process_in_groups.losses[1:] != pytest.approx(one_process.losses[1:], rel=1e-3)


def test_length_of_batches_changes_nothing(tmp_path: Path, hf: Path, sst: Path, one_process: Outcome) -> None:
    found = outcome_of(tmp_path, "sst-2", "--data-dir", sst, "--hf", hf, USUAL, "--pad-to-multiple-of 8")
    assert_same(found, one_process)


def read(path: Path, task: str, vocabulary: Path) -> Encoded:
    """A file's samples, as the tool makes them."""
    tokenizer = TokenizerSpec("BertWordPieceLowerCase", vocab_file=str(vocabulary)).build()
    return encode(read_rows(path, GLUE_TASKS[task], labelled=True), tokenizer, max_length=24)


@pytest.mark.parametrize(("task", "group"), [("sst-2", 8), ("sst-2", 2), ("sts-b", 8), ("mrpc", 4)])
def test_losses_are_those_of_transformers_on_the_same_batches(tmp_path: Path, task: str, group: int) -> None:
    """The model, its classifier, the loss, AdamW and the clipping are transformers' and torch's own."""
    data = write_task(task, tmp_path / "data")
    model = bert_classifier(GLUE_TASKS[task].num_outputs)
    folder = write_hf(tmp_path / "hf", model)
    options = f"{USUAL} --lr-decay-style constant --lr-warmup-fraction 0 --weight-decay 0.01 --seed 5 --keep-classifier"
    options = f"{options} --length-group-size {group}"
    found = outcome_of(tmp_path, task, "--data-dir", data, "--hf", folder, options)

    model.train()
    model.config.problem_type = "regression" if GLUE_TASKS[task].is_regression else "single_label_classification"
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    decayed, others = ([p for p in model.parameters() if (p.dim() > 1) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=2e-3)
    samples, expected = read(data / "train.tsv", task, folder / "vocab.txt"), []
    for epoch in range(3):
        for step in training_steps(samples.lengths_N, step_size=8, group_size=group, multiple=1, seed=5, epoch=epoch):
            total = torch.zeros(())
            for here in grouped(samples, step).groups:
                mask = torch.ones_like(here.tokens_BS) if here.padding_mask_BS is None else here.padding_mask_BS.long()
                rows = here.weights_B > 0
                named = {
                    "input_ids": here.tokens_BS,
                    "token_type_ids": here.token_types_BS,
                    "attention_mask": mask,
                    "labels": here.labels_B,
                }
                if rows.any():
                    loss = model(**{name: values[rows] for name, values in named.items()}).loss
                    total = total + loss * rows.sum() / step.num_samples
            total.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            expected.append(total.item())
    assert found.losses == pytest.approx(expected, rel=1e-4)  # AdamW's first steps amplify the rounding of gradients


@pytest.mark.parametrize("task", GLUE_TASKS)
def test_each_task_is_learned_from_its_official_files(tmp_path: Path, hf: Path, task: str) -> None:
    spec = GLUE_TASKS[task]
    write_task(task, tmp_path / "glue" / spec.folder)
    options = f"--epochs 1 --lr 1e-3 --global-batch-size 14 {QUIET} --max-seq-length 32"
    ended = tool(f"--task {task}", "--data-dir", tmp_path / "glue", "--hf", hf, options, "--predict", tmp_path / "p")
    assert ended.code == 0, ended.err
    found = result(ended)
    endings = ("_m", "_mm") if task == "mnli" else ("",)
    assert set(found["metrics"]) == {f"{metric}{ending}" for metric in spec.metrics for ending in endings}
    assert all(-1 <= value <= 1 for value in found["metrics"].values())
    assert [Path(path).name for path in found["predictions"]] == [f"{name}.tsv" for name in spec.test]
    for path in found["predictions"]:
        header, *lines = Path(path).read_text().splitlines()
        assert header == "index\tprediction"
        numbers, labels = zip(*(line.split("\t") for line in lines))
        assert numbers == tuple(map(str, range(COUNTS["test"])))
        if spec.is_regression:
            assert all(0 <= float(label) <= 5 for label in labels)
        else:
            assert set(labels) <= set(LABELS.get(task, ("0", "1")))


def test_the_best_weights_are_kept_saved_and_predicted_with(tmp_path: Path, hf: Path, sts: Path) -> None:
    metrics, save = tmp_path / "m.jsonl", tmp_path / "save"
    wild = f"--epochs 5 --lr 5e-3 --max-seq-length 24 --global-batch-size 8 --seed 4 {QUIET}"
    more = ("--metrics-file", metrics, "--save", save, "--predict", tmp_path / "during")
    found = tuned("--task sts-b", "--data-dir", sts, "--hf", hf, wild, *more)
    measured = [record for record in records(metrics) if "valid_loss" in record]
    best = max(measured, key=lambda record: record["valid_pearson"] + record["valid_spearman"])
    assert measured[0]["step"] < best["step"] < measured[-1]["step"], "choose a seed whose best is in the middle"
    consumed = 0.0
    for record in (record for record in records(metrics) if "loss" in record):
        consumed += record["tokens_per_second"] * record["step_time_s"]
        assert record["consumed_tokens"] == pytest.approx(consumed) and consumed > 0
        assert record["tflops_per_device"] > 0 and record["peak_memory_bytes"] > 0
    assert (found["step"], found["epoch"]) == (best["step"], measured.index(best) + 1)
    assert found["metrics"] == {name: best[f"valid_{name}"] for name in ("pearson", "spearman")}
    assert [path.name for path in list_checkpoints(save)] == [f"iter_{best['step']:07d}"]
    assert read_document(find_checkpoint(save), "task")["metrics"] == found["metrics"]
    again = f"--epochs 0 --max-seq-length 24 --global-batch-size 8 {QUIET}"
    after = tuned("--task sts-b", "--data-dir", sts, "--load", save, again, "--predict", tmp_path / "after")
    assert (after["metrics"], after["loss"]) == (found["metrics"], found["loss"])
    during = (tmp_path / "during" / "STS-B.tsv").read_text()
    assert (tmp_path / "after" / "STS-B.tsv").read_text() == during


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_metrics_file_on_a_full_device_does_not_end_a_fine_tuning(tmp_path: Path, hf: Path, sts: Path) -> None:
    ended = tool(
        "--task sts-b",
        "--data-dir",
        sts,
        "--hf",
        hf,
        f"--epochs 1 --lr 1e-3 --max-seq-length 24 {QUIET} --metrics-file /dev/full",
    )
    assert ended.code == 0, ended.err
    assert result(ended)["step"] > 0
    ended.says("--metrics-file /dev/full cannot be written: No space left", "Training continues", "missed")
    assert ended.err.count("No space left") == 1


def test_measuring_within_epochs_changes_no_step_and_finds_better_weights(tmp_path: Path, hf: Path, sts: Path) -> None:
    wild = f"--epochs 3 --lr 5e-3 --max-seq-length 24 --global-batch-size 4 {QUIET}"
    arguments = ("--task sts-b", "--data-dir", sts, "--hf", hf, wild, "--metrics-file")
    tuned(*arguments, tmp_path / "epochs.jsonl")
    found = tuned(*arguments, tmp_path / "steps.jsonl", "--eval-interval 2", "--predict", tmp_path / "during")
    seldom, often = (records(tmp_path / f"{name}.jsonl") for name in ("epochs", "steps"))
    assert losses(tmp_path / "steps.jsonl") == losses(tmp_path / "epochs.jsonl")
    measured = [record for record in often if "valid_loss" in record]
    at = [record["step"] for record in measured]
    assert at == [2, 4, 6, 7, 8, 10, 12, 14, 16, 18, 20, 21], "every second step, and each epoch of seven once"
    by_step = {record["step"]: record["valid_loss"] for record in measured}
    assert all(by_step[one["step"]] == one["valid_loss"] for one in seldom if "valid_loss" in one)
    best = max(measured, key=lambda record: record["valid_pearson"] + record["valid_spearman"])
    assert best["step"] % 7 and (found["step"], found["epoch"]) == (best["step"], 1 + best["step"] // 7)


EMA = "--ema-decay 0.8 --eval-interval 5"


@pytest.mark.parity
@pytest.mark.parametrize("options", [f"{TP2} {PP2}", f"{TP2} --zero-stage 3", "--zero-stage 1 --micro-batch-size 2"])
def test_averaged_weights_are_the_same_at_any_layout(
    pool: Pool, tmp_path: Path, hf: Path, sst: Path, one_process: Outcome, options: str
) -> None:
    arguments = ("--data-dir", sst, "--hf", hf, USUAL, EMA)
    one = outcome_of(tmp_path, "sst-2", *arguments)
    assert_same(outcome_of(tmp_path, "sst-2", *arguments, options, pool=pool, world_size=4), one)
    assert one.losses == one_process.losses, "the training continues from its own weights"
    assert one.result["loss"] != pytest.approx(one_process.result["loss"], rel=1e-3)


def test_the_saved_average_is_that_of_the_weights_after_each_step(
    tmp_path: Path, hf: Path, sts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, seen = "layers.1.mlp.up.weight", []
    start, add = WeightAverage.__init__, WeightAverage.add

    def watched_start(self: WeightAverage, parts: TrainingSetup, decay: float) -> None:
        start(self, parts, decay)
        seen.append(remember(parts)[name])

    def watched_add(self: WeightAverage) -> None:
        seen.append(remember(self.parts)[name])
        add(self)

    monkeypatch.setattr(WeightAverage, "__init__", watched_start)
    monkeypatch.setattr(WeightAverage, "add", watched_add)
    options = f"--epochs 1 --lr 2e-3 --max-seq-length 24 --global-batch-size 7 {QUIET} --ema-decay 0.25"
    tuned("--task sts-b", "--data-dir", sts, "--hf", hf, options, "--save", tmp_path)
    assert len(seen) == 1 + 4, "four steps"
    mean = seen[0]
    for weight, kept in zip(seen[1:], (2 / 11, 3 / 12, 0.25, 0.25)):  # from the second step on the decay is full
        mean = kept * mean + (1 - kept) * weight
    saved = assemble(find_checkpoint(tmp_path), f"model/{name}").reshape(-1)
    torch.testing.assert_close(saved, mean, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(saved, seen[-1], rtol=1e-4)


def test_frozen_parameters_are_saved_as_they_were(tmp_path: Path, hf: Path, sts: Path) -> None:
    options = f"--epochs 1 --lr 2e-3 --max-seq-length 24 --global-batch-size 7 {QUIET} --ema-decay 0.25"
    frozen = "--freeze-params embedding.* layers.0.*"
    tuned("--task sts-b", "--data-dir", sts, "--hf", hf, options, frozen, "--save", tmp_path)
    saved = find_checkpoint(tmp_path)
    same = {
        name
        for name, tensor in read_model(hf).tensors.items()
        if not name.startswith("head.") and torch.equal(assemble(saved, f"model/{name}"), tensor)
    }
    assert same == {n for n in read_model(hf).tensors if n.startswith(("embedding.", "layers.0."))} != set()


def test_a_checkpoint_of_any_layout_is_measured_at_another_with_its_own_classifier(
    pool: Pool, tmp_path: Path, hf: Path, sts: Path
) -> None:
    saved = words("--task sts-b", "--data-dir", sts, "--hf", hf, USUAL, f"{TP2} {PP2}", "--save", tmp_path / "save")
    (first, *_) = pool.run(4, on_rank, saved, SCRIPT)
    assert first.code == 0, first.err
    again = f"--epochs 0 --max-seq-length 24 {QUIET}"
    found = tool("--task sts-b", "--data-dir", sts, "--load", tmp_path / "save", again)
    assert result(found)["metrics"] == pytest.approx(result(first)["metrics"], abs=TOLERANCE)
    assert result(found)["loss"] == pytest.approx(result(first)["loss"], rel=TOLERANCE)
    assert "a new" not in found.err


@pytest.mark.parametrize(("options", "new"), [("", "head.classifier"), ("--bert-no-binary-head", "head.pooler")])
def test_pretraining_at_one_layout_is_fine_tuned_at_another(
    pool: Pool, tmp_path: Path, sst: Path, options: str, new: str
) -> None:
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(VOCABULARY) + "\n")
    shape = (
        "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --micro-batch-size 2 --mock-data "
        "--global-batch-size 4 --train-iters 2 --lr 1e-3 --tokenizer-type BertWordPieceLowerCase --num-workers 0 "
        "--make-vocab-size-divisible-by 4 --eval-iters 0 --device cpu --zero-stage 1"
    )
    argv = words(shape, options, TP2, "--vocab-file", vocabulary, "--save", tmp_path / "pretrained")
    assert {one.code for one in pool.run(2, on_rank, argv, ROOT / "pretrain_bert.py")} == {0}
    arguments = ("--data-dir", sst, "--load", tmp_path / "pretrained", USUAL)
    one = outcome_of(tmp_path, "sst-2", *arguments, "--save", tmp_path / "tuned")
    assert_same(outcome_of(tmp_path, "sst-2", *arguments, PP2, pool=pool, world_size=2), one)
    said = tool("--task sst-2", *arguments).err
    assert "with a new head.classifier" in said and new in said
    # What came from pretraining was trained on, not drawn anew: one small step changes it little.
    name = "model/layers.0.mlp.up.weight"
    before, after = (assemble(find_checkpoint(tmp_path / kind), name) for kind in ("pretrained", "tuned"))
    assert 0 < (before - after).abs().max() < 0.05


def test_several_seeds_are_several_runs_and_their_mean(tmp_path: Path, hf: Path, sts: Path) -> None:
    arguments = ("--task sts-b", "--data-dir", sts, "--hf", hf, USUAL)
    kept = ("--save", tmp_path / "s", "--predict", tmp_path / "p", "--metrics-file", tmp_path / "m.jsonl")
    found = tuned(*arguments, "--seeds 1 2 3", *kept)
    alone = [tuned(*arguments, f"--seed {seed}") for seed in (1, 2, 3)]
    assert [one["seed"] for one in found["runs"]] == [1, 2, 3]
    assert [one["metrics"] for one in found["runs"]] == [one["metrics"] for one in alone]
    values = [one["metrics"]["pearson"] for one in alone]
    assert len(set(values)) == 3
    mean = sum(values) / 3
    assert found["metrics"]["pearson"] == pytest.approx(mean)
    spread = (sum((value - mean) ** 2 for value in values) / 2) ** 0.5
    assert found["standard_deviations"]["pearson"] == pytest.approx(spread)
    for seed in (1, 2, 3):
        assert find_checkpoint(tmp_path / "s" / f"seed-{seed}").is_dir()
        assert (tmp_path / "p" / f"seed-{seed}" / "STS-B.tsv").is_file()
        assert len(steps(tmp_path / f"m-seed-{seed}.jsonl")) == 12


def test_dropout_is_on_unless_switched_off_and_the_same_each_time(tmp_path: Path, hf: Path, sst: Path) -> None:
    short = ("--data-dir", sst, "--hf", hf, "--epochs 1 --lr 1e-3 --device cpu --max-seq-length 24")
    first, second = (outcome_of(tmp_path, "sst-2", *short) for _ in range(2))
    without = outcome_of(tmp_path, "sst-2", *short, "--hidden-dropout 0 --attention-dropout 0")
    assert first.losses == second.losses and first.losses[0] != without.losses[0]


def test_bf16_learns_nearly_the_same(tmp_path: Path, hf: Path, sst: Path, one_process: Outcome) -> None:
    found = outcome_of(tmp_path, "sst-2", "--data-dir", sst, "--hf", hf, USUAL, "--bf16")
    assert found.losses == pytest.approx(one_process.losses, rel=0.1) and found.losses != one_process.losses


def test_what_is_said_on_the_way(tmp_path: Path, hf: Path) -> None:
    data = write_task("sst-2", tmp_path / "data", train={4: "no label", 9: "\t1"}, dev={2: "good\tperhaps"})
    arguments = ("--task SST2", "--data-dir", data, "--hf", hf, USUAL)
    ended = tool(*arguments, "--skip-bad-rows --max-seq-length 8")
    assert ended.code == 0
    ended.says(
        f"{data}/train.tsv: 26 samples",
        "of them cut to 8 tokens",
        f"left out: {data}/train.tsv line 6: it has 1 columns and the header 2",
        f"left out: {data}/train.tsv line 11: the text in column 'sentence' is empty",
        f"left out: {data}/dev.tsv line 4: the label 'perhaps'",
        "epoch 1: 4 steps",
        "step 1/12 |",
        "tokens/s",
        "left",
        "dev after epoch 3: accuracy",
    )
