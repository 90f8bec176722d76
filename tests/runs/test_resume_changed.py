"""A resume with other options than the checkpoint's: refused, refused unless overridden, reported, or free."""

from __future__ import annotations

import json
import re
import shutil
import zlib
from pathlib import Path
from unittest import mock

import pytest

from megatron3d.checkpoint.load import read_document
from tests.dist.pool import Pool
from tests.runs.harness import (
    MOCK,
    ROOT,
    TINY,
    Ended,
    on_rank,
    random_documents,
    run,
    run_ok,
    steps,
    words,
    write_tokens,
)

OVERRIDE = "--override-sample-order"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 3 and 6 on mock data."""
    folder = tmp_path_factory.mktemp("saved") / "save"
    run_ok(MOCK, "--save-interval 3 --save", folder)
    return folder


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token files a and b, a copy of a, and checkpoints of step 6 on a, on a blend, and on a with a tokenizer."""
    folder = tmp_path_factory.mktemp("corpora")
    for name, seed in (("a", 1), ("b", 2), ("moved", 1)):
        write_tokens(folder / name, random_documents(seed))
    run_ok(TINY, "--data-path", folder / "a", "--save", folder / "on_a")
    blend = words(TINY, "--data-path 0.7", folder / "a", "0.3", folder / "b", "--save", folder / "on_blend")
    assert run(blend).code == 0
    return folder


def resumed(load: Path, *options: str | Path, base: str = MOCK) -> Ended:
    return run(words(base, "--train-iters 7 --load", load, *options))


def refused(ended: Ended, *fragments: str) -> None:
    assert ended.code == 4, ended.out + ended.err
    ended.says(*fragments)


# --- What the weights compute -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["", "--finetune", "--finetune " + OVERRIDE, OVERRIDE])
def test_another_function_of_the_weights_is_refused_with_all_differences_at_once(saved: Path, mode: str) -> None:
    ended = resumed(saved, "--num-layers 1 --num-attention-heads 2 --norm-epsilon 1e-6", mode)
    refused(
        ended,
        "--num-layers: checkpoint 2, this run 1",
        "--num-attention-heads: checkpoint 4, this run 2",
        "--norm-epsilon: checkpoint 1e-05, this run 1e-06",
        "--use-checkpoint-args",
    )
    assert ended.err.count("iter_0000006 does not fit this run") == 1
    assert "--fall-back" not in ended.err, "an earlier checkpoint has the same model"


def test_a_context_is_extended_by_a_fine_tuning_and_not_by_a_resume(tmp_path: Path) -> None:
    rope = f"{MOCK} --position-embedding-type rope"
    run_ok(rope, "--train-iters 1 --save", tmp_path)
    longer = "--position-embedding-type yarn --original-max-position-embeddings 16 --max-position-embeddings 64"
    lines = ("--rotary-scaling: checkpoint none, this run yarn", "--rotary-scaling-factor: checkpoint none, this run 4")
    refused(resumed(tmp_path, longer, "--rotary-base 5e5"), "--rotary-base: checkpoint", *lines, "start from them with")
    for more in ("", "--use-checkpoint-args --norm-epsilon 1e-6"):
        ended = resumed(
            tmp_path, f"{longer} --finetune {more}", base=rope.replace("--seq-length 16", "--seq-length 64")
        )
        assert ended.code == 0, ended.err
        assert all(f"changed: {line}" in ended.out for line in lines) and "--rotary-base:" not in ended.out


def test_a_resume_that_changes_nothing_says_nothing_of_changes(saved: Path) -> None:
    assert "changed" not in resumed(saved).out


# --- What the consumed samples mean -----------------------------------------------------------------------------------


def test_another_seed_is_refused_unless_overridden_and_free_for_a_finetuning(saved: Path) -> None:
    refused(resumed(saved, "--seed 7"), "--seed: checkpoint 1234, this run 7", OVERRIDE)
    ended = resumed(saved, "--seed 7", OVERRIDE)
    assert ended.code == 0
    assert "changed: --seed: checkpoint 1234, this run 7" in ended.out
    assert resumed(saved, "--seed 7 --finetune").code == 0


def test_both_kinds_of_refusal_stand_in_one_answer(saved: Path) -> None:
    refused(resumed(saved, "--seed 7 --num-layers 1"), "--seed: checkpoint", "--num-layers: checkpoint")


def test_the_same_data_at_another_path_is_only_reported(corpora: Path) -> None:
    ended = resumed(corpora / "on_a", "--data-path", corpora / "moved", base=TINY)
    assert ended.code == 0, ended.err
    assert f"{corpora}/a has moved to {corpora}/moved, with the same content" in ended.out


def test_other_data_is_refused_although_its_path_is_the_same(corpora: Path, tmp_path: Path) -> None:
    """The file under the checkpoint's own name has changed by one token."""
    write_tokens(tmp_path / "a", random_documents(1))
    command = words(TINY, "--data-path", tmp_path / "a", "--save", tmp_path / "save")
    assert run(command).code == 0
    bytes_before = (tmp_path / "a.bin").read_bytes()
    changed = bytearray(bytes_before)
    changed[100:102] = (changed[100] ^ 1, changed[101])
    (tmp_path / "a.bin").write_bytes(changed)
    longer = [*command, *words("--train-iters 7")]
    refused(run(longer), "the data of --data-path: checkpoint", OVERRIDE)
    (tmp_path / "a.bin").write_bytes(bytes_before)
    assert run(longer).code == 0


@pytest.mark.parametrize("path", ["b", "a b", "0.5 a 0.5 b"])
def test_other_corpora_are_refused(corpora: Path, path: str) -> None:
    data = [str(corpora / word) if word in "ab" else word for word in path.split()]
    ended = run([*words(TINY, "--train-iters 7 --load", corpora / "on_a", "--data-path"), *data])
    refused(ended, "the data of --data-path: checkpoint", OVERRIDE)


def test_blend_weights_are_compared_as_shares_and_may_change(corpora: Path, tmp_path: Path) -> None:
    blend = ["--data-path", "3", str(corpora / "b"), "7", str(corpora / "a")]
    ended = run([*words(TINY, "--train-iters 7 --load", corpora / "on_blend"), *blend])
    assert ended.code == 0 and "the blend of the training data changes" not in ended.out
    blend[1::2] = "0.6", "0.4"
    ended = run([*words(TINY, "--train-iters 7 --load", corpora / "on_blend", "--save", tmp_path), *blend])
    assert ended.code == 0, ended.err
    assert f"  {corpora}/a: 70.0000% before, 40.0000% now, 34 samples served" in ended.log
    stored = read_document(tmp_path / "iter_0000007", "blend")
    assert stored["segments"] == [{"first_sample": 0, "weights": [7, 3]}, {"first_sample": 48, "weights": [2, 3]}]


def test_a_corpus_more_is_taken_up_by_the_override(corpora: Path, tmp_path: Path) -> None:
    data = ["--data-path", "1", str(corpora / "b"), "2", str(corpora / "moved"), OVERRIDE]
    ended = run([*words(TINY, "--train-iters 7 --load", corpora / "on_a", "--save", tmp_path), *data])
    assert ended.code == 0, ended.err
    assert f"  {corpora}/moved: 100.0000% before, 66.6667% now, 48 samples served" in ended.log
    assert f"  {corpora}/b: 0.0000% before, 33.3333% now, 0 samples served" in ended.log
    stored = read_document(tmp_path / "iter_0000007", "blend")
    assert stored["segments"] == [{"first_sample": 0, "weights": [1, 0]}, {"first_sample": 48, "weights": [2, 1]}]


def test_a_changed_blend_continues_alike_at_another_layout_and_after_another_resume(
    corpora: Path, pool: Pool, tmp_path: Path
) -> None:
    """The checkpoint is copied without `blend.json`, as an earlier version would have written it."""
    blend = ["--data-path", "1", corpora / "b", "1", corpora / "a"]
    straight, again, parallel = (tmp_path / name for name in ("straight", "again", "parallel"))
    options = words(TINY, *blend, "--load", _without_blend(corpora / "on_blend", tmp_path / "old"), "--train-iters 9")
    assert run([*options, *words("--metrics-file", straight)]).code == 0
    for length in ("--exit-interval 8", ""):
        run([*options, *words("--save", tmp_path / "save", "--metrics-file", again, length)])
    for ended in pool.run(2, on_rank, [*options, "--metrics-file", str(parallel)]):
        assert ended.code == 0, ended.err
    expected = [record["loss"] for record in steps(straight)]
    assert len(expected) == 3 and [record["loss"] for record in steps(again)] == expected
    assert [record["loss"] for record in steps(parallel)] == pytest.approx(expected, rel=1e-5)


def _without_blend(load: Path, copy: Path) -> Path:
    """A copy of checkpoints whose index names no `blend.json`."""
    shutil.copytree(load, copy)
    for path in copy.glob("iter_*/index.json"):
        body = json.loads(path.read_text())
        del body["documents"]["blend.json"], body["crc32"]
        canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
        path.write_text(json.dumps(body | {"crc32": f"{zlib.crc32(canonical.encode()):08x}"}))
        (path.parent / "blend.json").unlink()
    return copy


def test_another_split_is_refused_and_only_the_validation_data_is_reported(corpora: Path, tmp_path: Path) -> None:
    data = ("--data-path", corpora / "a")
    refused(resumed(corpora / "on_a", *data, "--split 8,2,0", base=TINY), "--split: checkpoint 969,30,1")
    own = ("--train-data-path", corpora / "a", "--valid-data-path")
    run_ok(TINY, *own, corpora / "a", "--save", tmp_path)
    ended = resumed(tmp_path, *own, corpora / "b", base=TINY)
    assert ended.code == 0
    assert "changed: the data of --valid-data-path: checkpoint" in ended.out


def test_a_tokenizer_is_compared_by_content_and_may_move(corpora: Path, tmp_path: Path) -> None:
    vocabulary = "{" + ", ".join(f'"t{number}": {number}' for number in range(101)) + "}"
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vocab.json").write_text(vocabulary)
        (tmp_path / name / "merges.txt").write_text("#version: 0.2\n")

    def files(name: str) -> list[str | Path]:
        return ["--vocab-file", tmp_path / name / "vocab.json", "--merge-file", tmp_path / name / "merges.txt"]

    data = ("--data-path", corpora / "a")
    run_ok(TINY, *data, *files("one"), "--save", tmp_path / "save")
    moved = resumed(tmp_path / "save", *data, *files("two"), base=TINY)
    assert f"{tmp_path}/one/vocab.json has moved to {tmp_path}/two/vocab.json" in moved.out
    (tmp_path / "two" / "vocab.json").write_text(vocabulary.replace("t7", "u7"))
    refused(resumed(tmp_path / "save", *data, *files("two"), base=TINY), "the tokenizer: checkpoint GPT2BPE", OVERRIDE)
    line = f"changed: the tokenizer: checkpoint GPT2BPETokenizer {tmp_path}/one/vocab.json"
    for start in ("--finetune --load", "--pretrained-checkpoint", "--load"):
        command = words(TINY, "--train-iters 7", *data, *files("two"), start, tmp_path / "save")
        if start != "--load":
            another = (*command, "--num-layers", "1")
            refused(run(command), "the tokenizer: checkpoint GPT2BPE", "--override-tokenizer")
            refused(run(another), "--num-layers: checkpoint 2", "the tokenizer: checkpoint GPT2BPE")
        ended = run([*command, "--override-tokenizer"])
        assert ended.code == 0, ended.err
        assert line in ended.out
    of_another_kind = words(
        TINY, *data, "--tokenizer-type NullTokenizer --vocab-size 100 --finetune --load", tmp_path / "save"
    )
    ended = run(of_another_kind)
    assert ended.code == 0 and line in ended.out, "a kind is named on purpose"


# --- What is reported, and what is left over --------------------------------------------------------------------------


def test_changes_of_the_training_are_reported_in_a_line_each_and_only_there(saved: Path) -> None:
    options = "--adam-beta2 0.95 --clip-grad 0.5 --hidden-dropout 0.1 --global-batch-size 16 --bf16"
    ended = resumed(saved, options)
    assert ended.code == 0, ended.err
    lines = [line for line in ended.log if line.startswith("changed: ")]
    assert lines == [
        "changed: --hidden-dropout: checkpoint 0, this run 0.1",
        "changed: --global-batch-size: checkpoint 8, this run 16",
        "changed: --clip-grad: checkpoint 1, this run 0.5",
        "changed: --adam-beta2: checkpoint 0.999, this run 0.95",
        "changed: precision (--bf16, --fp16): checkpoint fp32, this run bf16",
    ]
    assert "changed" not in resumed(saved, options, "--finetune").out, "a fine-tuning is a run of its own"


def test_an_overridden_schedule_is_reported_once(saved: Path) -> None:
    ended = resumed(saved, "--lr 1e-3 --override-opt-param-scheduler")
    assert [line for line in ended.log if "changed" in line] == [
        "changed: --lr: checkpoint 0.003, flags 0.001 (--override-opt-param-scheduler)"
    ]


def test_another_weight_decay_is_reported_and_used(saved: Path, tmp_path: Path) -> None:
    given, chosen, kept = (tmp_path / name for name in ("given", "chosen", "kept"))
    ended = resumed(saved, "--weight-decay 0.3 --metrics-file", given, "--train-iters 9")
    assert ended.code == 0, ended.err
    assert [line for line in ended.log if "changed" in line] == ["changed: --weight-decay: checkpoint 0.01, flags 0.3"]
    override = "--weight-decay 0.3 --override-opt-param-scheduler --metrics-file"
    assert resumed(saved, override, chosen, "--train-iters 9").code == 0
    assert resumed(saved, "--metrics-file", kept, "--train-iters 9").code == 0
    of = {path: [record["loss"] for record in steps(path)] for path in (given, chosen, kept)}
    assert of[given] == of[chosen] != of[kept]


@pytest.mark.parametrize("mode", ["", "--finetune", "--no-load-optim"])
def test_a_weight_that_the_model_lacks_is_refused_on_all_ranks(saved: Path, pool: Pool, mode: str) -> None:
    """The options agree, as if the comparison of options had a gap; the tensors do not."""
    argv = words(MOCK, "--train-iters 7 --num-layers 1 --load", saved, mode)
    for world_size in (1, 2):
        for ended in pool.run(world_size, _on_rank_without_comparing, argv):
            refused(ended, "tensors that the model of this run lacks", "layers.1.")


def _on_rank_without_comparing(rank: int, world_size: int, argv: list[str]) -> Ended:
    nothing = mock.Mock(return_value=[])
    with (
        mock.patch("megatron3d.train.state.compare_resumed", nothing),
        mock.patch("megatron3d.train.state.compare_weights", nothing),
    ):
        return on_rank(rank, world_size, argv)


# --- The options out of the checkpoint --------------------------------------------------------------------------------

REST = (
    "--mock-data --micro-batch-size 2 --global-batch-size 8 --lr 3e-3 --lr-decay-style constant --log-interval 1 "
    "--eval-iters 0 --device cpu --num-workers 0 --train-iters 8"
)


def test_use_checkpoint_args_describes_the_model_and_resumes_bit_for_bit(saved: Path, tmp_path: Path) -> None:
    plain, taken = tmp_path / "plain.jsonl", tmp_path / "taken.jsonl"
    run_ok(MOCK, "--train-iters 8 --load", saved, "--metrics-file", plain)
    ended = run_ok(REST, "--use-checkpoint-args --num-layers 1 --swiglu --load", saved, "--metrics-file", taken)
    assert [record["loss"] for record in steps(taken)] == [record["loss"] for record in steps(plain)]
    assert "--num-layers 1 is overridden by the checkpoint's 2 (--use-checkpoint-args)" in ended.out
    assert f"the model's options are those of {saved}/iter_0000006" in ended.out


def test_use_checkpoint_args_works_for_a_bert(tmp_path: Path) -> None:
    script = ROOT / "pretrain_bert.py"
    bert = words(MOCK, "--seq-length 24 --save", tmp_path)
    assert run(bert, script=script).code == 0
    argv = words(REST, "--use-checkpoint-args --load", tmp_path)
    ended = run(argv, script=script)
    assert ended.code == 0, ended.err
    wrong = run(argv)
    refused(wrong, "--use-checkpoint-args", "holds a BERT, not a GPT", "pretrain_bert.py")


def test_use_checkpoint_args_without_a_checkpoint(tmp_path: Path) -> None:
    refused(run(words(REST, "--use-checkpoint-args --load", tmp_path)), f"{tmp_path} holds no checkpoint")
    started = run(words(MOCK, "--use-checkpoint-args --save", tmp_path))
    assert started.code == 0
    assert "there is no checkpoint yet" in started.out


@pytest.mark.parametrize("place", ["--save", "--load"])
@pytest.mark.parametrize(
    "damage", ["latest is empty", "latest is gone", "the checkpoint is gone", "its options changed"]
)
def test_use_checkpoint_args_follows_falling_back(saved: Path, tmp_path: Path, damage: str, place: str) -> None:
    copy = Path(shutil.copytree(saved, tmp_path / "copy"))
    if damage == "latest is empty":
        (copy / "latest").write_text("")
    elif damage == "latest is gone":
        (copy / "latest").unlink()
    elif damage == "the checkpoint is gone":
        shutil.rmtree(copy / "iter_0000006")
    else:
        (copy / "iter_0000006" / "run.json").write_text("{}")
    taken = copy / ("iter_0000006" if damage.startswith("latest") else "iter_0000003")
    command = words(REST, "--use-checkpoint-args --num-layers 1", place, copy)
    ended = run(command)
    refused(ended, "--use-checkpoint-args: " + str(copy))
    assert "there is no checkpoint yet" not in ended.out
    if damage != "its options changed":
        ended.says(f"which is gone from {copy}; {taken} is there: start from it with --fall-back")
    ended = run([*command, "--fall-back-to-previous-checkpoint", "--exit-interval", "1"])
    assert ended.code == 75, ended.err
    assert f"the model's options are those of {taken}" in ended.out
    assert f"starting from {taken}" in ended.out


def test_use_checkpoint_args_names_a_step_that_is_not_there(saved: Path) -> None:
    command = words(REST, "--use-checkpoint-args --ckpt-step 5 --load", saved)
    refused(run(command), "--ckpt-step 5 asks for iter_0000005, which is gone", "iter_0000003 is there")
    taken = run([*command, "--fall-back-to-previous-checkpoint"])
    assert f"starting from {saved}/iter_0000003 (" in taken.out


def test_a_changed_run_json_is_not_taken_for_options(saved: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(saved, tmp_path / "copy"))
    path = copy / "iter_0000006" / "run.json"
    path.write_text(re.sub('"num_layers": 2', '"num_layers": 1', path.read_text()))
    refused(run(words(REST, "--use-checkpoint-args --load", copy)), str(path), "checksum")


# --- Earlier versions -------------------------------------------------------------------------------------------------

BEFORE = ROOT / "tests" / "checkpoint" / "written_before"
OLD = (
    "--num-layers 1 --hidden-size 8 --num-attention-heads 2 --vocab-size 32 --make-vocab-size-divisible-by 4 "
    "--micro-batch-size 2 --global-batch-size 4 --lr 1e-2 --lr-decay-style constant --eval-iters 0 --log-interval 1 "
    "--device cpu --num-workers 0 --train-iters 5"
)
NO_DROPOUT = "--hidden-dropout 0 --attention-dropout 0"  # which that version drew otherwise
OLD_GPT = f"{OLD} {NO_DROPOUT} --seq-length 8 --split 80,20,0"


def test_a_gpt_checkpoint_of_an_earlier_version_resumes_with_a_line(tmp_path: Path) -> None:
    """The losses are those that the version that wrote it made of it."""
    metrics = tmp_path / "m.jsonl"
    ended = run_ok(OLD_GPT, "--data-path", BEFORE / "tokens", "--load", BEFORE / "gpt", "--metrics-file", metrics)
    assert [record["loss"] for record in steps(metrics)] == pytest.approx([3.4621825218200684, 3.488140821456909])
    assert (
        "stored no digests of data and tokenizer, so their content was not compared; its data was tokens" in ended.out
    )
    refused(run(words(OLD_GPT, "--seed 1 --data-path", BEFORE / "tokens", "--load", BEFORE / "gpt")), "--seed")


def test_a_bert_checkpoint_of_an_earlier_version_resumes(tmp_path: Path) -> None:
    metrics = tmp_path / "m.jsonl"
    options = f"{NO_DROPOUT} --seq-length 16 --mock-data --no-load-optim"
    argv = words(OLD, options, "--load", BEFORE / "bert", "--metrics-file", metrics)
    ended = run(argv, script=ROOT / "pretrain_bert.py")
    assert ended.code == 0, ended.err
    assert [record["loss"] for record in steps(metrics)] == pytest.approx([4.251264423131943, 4.189894318580627])


def test_a_checkpoint_holds_the_content_of_what_was_read(corpora: Path) -> None:
    content = read_document(corpora / "on_blend" / "iter_0000006", "content")
    assert [one["share"] for one in content["corpora"]["all"]] == ["7/10", "3/10"]
    assert all(len(one["digest"]) == 64 for one in content["corpora"]["all"])
