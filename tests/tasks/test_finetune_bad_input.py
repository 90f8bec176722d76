"""What fine-tuning refuses: one sentence that names the file and row, or the option, its value and the fix."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tokenizers

from megatron3d.tasks.glue.tasks import GLUE_TASKS
from tests.runs.harness import exit_status
from tests.tasks.small import USUAL, VOCABULARY, bert, bert_classifier, tool, write_hf, write_task

BAD_OPTION = 2


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory of a small BERT."""
    return write_hf(tmp_path_factory.mktemp("hf"), bert())


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of a small BERT with a classifier of three classes."""
    return write_hf(tmp_path_factory.mktemp("classifier"), bert_classifier(3))


@pytest.fixture(scope="module")
def sst(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of SST-2, small."""
    return write_task("sst-2", tmp_path_factory.mktemp("glue") / "SST-2")


OPTIONS = [
    ("--task sst3", ["--task sst3 is not known; did you mean sst-2?", "cola"]),
    ("--task sst-2 --epochs -1", ["--epochs -1 is below 0"]),
    ("--task sst-2 --max-seq-length 33", ["--max-seq-length 33", "the 32 positions", "use --max-seq-length 32"]),
    (
        "--task sst-2 --max-seq-length 31 --pad-to-multiple-of 12",
        ["the 32 positions", "multiple of 12 long", "use --max-seq-length 24"],
    ),
    ("--task sst-2 --max-seq-length 4", ["--max-seq-length 4 leaves no room"]),
    ("--task sst-2 --pad-to-multiple-of 0", ["--pad-to-multiple-of 0 is below 1"]),
    ("--task sst-2 --token-dropout 1", ["--token-dropout 1 is no probability below 1"]),
    ("--task sst-2 --token-dropout -0.1", ["--token-dropout -0.1 is no probability"]),
    ("--task sst-2 --ema-decay 1", ["--ema-decay 1 is not between 0 and 1", "0.99", "leave it out"]),
    ("--task sst-2 --eval-interval 0", ["--eval-interval 0 is below 1"]),
    ("--task sst-2 --length-group-size 3", ["--length-group-size 3 does not divide --global-batch-size 8"]),
    ("--task sst-2 --length-group-size -4", ["--length-group-size -4 does not divide"]),
    (
        "--task sst-2 --length-group-size 2 --micro-batch-size 4",
        ["--length-group-size 2 does not split into micro-batches of --micro-batch-size 4", "use a multiple of 4"],
    ),
    (
        "--task sst-2 --epochs 0 --length-group-size 2 --token-dropout 0.1 --ema-decay 0.9 --eval-interval 3",
        [
            "--length-group-size 2 is for training, and --epochs 0 has none; leave it out",
            "--token-dropout 0.1 is for training",
            "--ema-decay 0.9 is for training",
            "--eval-interval 3 is for training",
        ],
    ),
    ("--task sst-2 --hidden-size 64", ["--hidden-size 64: the model comes with --load or --hf"]),
    ("--task sst-2 --seq-length 64", ["--seq-length 64 is not for fine-tuning; use --max-seq-length"]),
    ("--task sst-2 --train-iters 100 --mask-prob 0.3", ["--train-iters 100", "use --epochs", "--mask-prob 0.3 has no"]),
    ("--task sst-2 --labels a b", ["--labels belongs to --task tsv"]),
    ("--task sst-2 --seeds 1 2 1", ["--seeds 1 2 1 names a seed twice"]),
    ("--task sst-2 --keep-classifier", ["--keep-classifier", "has no classifier"]),
    ("--task sst-2 --epochs 0", ["--epochs 0 measures what is loaded", "has no classifier", "--epochs 1"]),
    ("--task sst-2 --epochs 0 --save out", ["--save out", "--epochs 0 learns nothing"]),
    ("--task sst-2 --tokenizer-type ByteTokenizer", ["the vocabulary ByteTokenizer has 257 tokens"]),
    ("--task tsv", ["--task tsv needs --dev-file"]),
    ("--task sst-2 --load somewhere", ["both are given"]),
    ("--task sst-2 --global-batch-size 9 --micro-batch-size 2", ["--global-batch-size 9"]),
]


@pytest.mark.parametrize(("options", "fragments"), OPTIONS, ids=[options for options, _ in OPTIONS])
def test_an_option_that_cannot_be_is_refused(hf: Path, sst: Path, options: str, fragments: list[str]) -> None:
    ended = tool(USUAL, "--hf", hf, "--data-dir", sst, options)
    assert ended.code == BAD_OPTION and not ended.out
    ended.says("error: ", *fragments)


def test_all_that_is_wrong_with_the_words_is_reported_at_once() -> None:
    ended = tool(
        "--epoch 3 --seeds 1 x --max-seq-len 9 --num_train_epochs 3 --token-dropout 2 --num-layer 3 --hidden-size 65",
        "--bf16 --fp16 --tensor-model-parallel-size 3 --train-iters 5 --device cpu --hf a --load b",
    )
    assert ended.code == BAD_OPTION and not ended.out
    assert ended.err.removeprefix("error: ").splitlines() == [
        "--seeds: invalid int value: 'x'; --help lists the options of the task.",
        "--epoch 3 is unknown; did you mean --epochs?",
        "--max-seq-len 9 is unknown; did you mean --max-seq-length?",
        "--num_train_epochs 3 is unknown; did you mean --epochs?",
        "--num-layer 3 is unknown; did you mean --num-layers?",
        "--token-dropout 2 is no probability below 1; use 0 to hide nothing.",
        "--load CHECKPOINT or --hf DIRECTORY says which model is fine-tuned, and both are given; give one of them.",
        f"--task is missing; give one of {', '.join(GLUE_TASKS)}, or tsv for files of your own.",
        "--hidden-size 65: the model comes with --load or --hf; leave the option out.",
        "--train-iters 5 is not for fine-tuning; use --epochs.",
        "--lr is missing (Peak learning rate); give it.",
        "A world of 1 ranks is not a multiple of tensor 3 x pipeline 1 = 3; start 3 ranks, or change "
        "--tensor-model-parallel-size or --pipeline-model-parallel-size so that their product divides 1.",
        "--bf16 and --fp16 are both given, but the layers compute in one precision; give only one of them.",
    ]


@pytest.mark.parametrize(
    ("options", "code"),
    [("--epochs many", 2), ("--hidden-size 64", 2), ("--no-such-flag", 2), ("--data-dir absent", 3)],
)
def test_a_mistake_replaces_the_exit_status_of_an_earlier_run(
    hf: Path, sst: Path, tmp_path: Path, options: str, code: int
) -> None:
    (tmp_path / "exit_status.json").write_text('{"code": 0}')
    assert tool("--task sst-2", USUAL, "--hf", hf, "--data-dir", sst, "--save", tmp_path, options).code == code
    assert exit_status(tmp_path)["code"] == code


def test_the_options_of_a_checkpoint_are_refused_and_not_those_it_would_have_set(hf: Path, sst: Path) -> None:
    ended = tool("--task sst-2", USUAL, "--hf", hf, "--data-dir", sst, "--use-checkpoint-args --hidden-size 64")
    assert ended.code == BAD_OPTION
    ended.says("--use-checkpoint-args is not for fine-tuning", "--hidden-size 64: the model comes with")
    assert len(ended.err.splitlines()) == 2


def test_tokens_are_hidden_only_where_there_is_a_mask(hf: Path, sst: Path, tmp_path: Path) -> None:
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, "[UNK]"))
    library.save(str(tmp_path / "tokenizer.json"))
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}  # and no mask_token
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    own = ("--tokenizer-type HuggingFaceTokenizer --tokenizer-model", tmp_path)
    ended = tool("--task sst-2 --token-dropout 0.1", USUAL, "--hf", hf, "--data-dir", sst, *own)
    assert ended.code == BAD_OPTION
    ended.says("--token-dropout 0.1 hides tokens behind [MASK], which the tokenizer does not have")


def test_a_learning_rate_a_folder_and_a_start_must_be_named(hf: Path, sst: Path, tmp_path: Path) -> None:
    ended = tool("--task sst-2 --epochs 1 --max-seq-length 24 --device cpu", "--hf", hf, "--data-dir", sst)
    assert ended.code == BAD_OPTION
    ended.says("--lr")
    tool("--task sst-2", USUAL, "--hf", hf).says("--task sst-2 needs --data-dir")
    tool("--task sst-2", USUAL, "--data-dir", sst).says("--load CHECKPOINT or --hf DIRECTORY", "neither is given")
    ended = tool("--task cola", USUAL, "--hf", hf, "--data-dir", tmp_path)
    ended.says(f"--data-dir {tmp_path} has none of train.tsv, dev.tsv", "a folder CoLA")


def test_a_bad_row_is_named_before_anything_is_trained(hf: Path, tmp_path: Path) -> None:
    data = write_task("qnli", tmp_path, train={3: "3\tthe film\tgood\tmaybe"}, dev={0: "0\tthe film\tgood"})
    ended = tool("--task qnli", USUAL, "--hf", hf, "--data-dir", data)
    assert ended.code != 0 and not ended.out
    ended.says(f"{data}/train.tsv line 5: the label 'maybe'", "entailment, not_entailment", "--skip-bad-rows")
    ended = tool("--task qnli", USUAL, "--hf", hf, "--data-dir", write_task("qnli", tmp_path, dev={0: "0\tgood"}))
    ended.says(f"{data}/dev.tsv line 2: it has 2 columns and the header 4")
    (data / "test.tsv").unlink()
    write_task("qnli", data)
    (data / "test.tsv").unlink()
    ended = tool("--task qnli", USUAL, "--hf", hf, "--data-dir", data, "--predict", tmp_path / "p")
    ended.says(f"{data}/test.tsv cannot be read")


def test_own_files_whose_labels_are_cut_off_are_refused_by_the_row(hf: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.tsv"
    own.write_text("label\tsentence\ngood\thello\nbad\n")
    ended = tool("--task tsv", USUAL, "--hf", hf, "--train-file", own, "--dev-file", own)
    ended.says(f"{own} line 3: it has 1 columns and the header 2 (label, sentence)")
    own.write_text("label\tsentence\ngood\thello\n")
    ended = tool("--task tsv", USUAL, "--hf", hf, "--train-file", own, "--dev-file", own)
    ended.says("column 'label' has 1 different labels, and a classifier needs two")


def test_another_vocabulary_is_refused_whether_or_not_it_is_as_large(hf: Path, sst: Path, tmp_path: Path) -> None:
    larger, other = tmp_path / "larger.txt", tmp_path / "other.txt"
    larger.write_text("\n".join([*VOCABULARY, "more"]) + "\n")
    kind = "--tokenizer-type BertWordPieceLowerCase --vocab-file"
    arguments = ("--task sst-2", USUAL, "--hf", hf, "--data-dir", sst, kind)
    ended = tool(*arguments, larger)
    assert ended.code == BAD_OPTION
    ended.says(f"{larger} has {len(VOCABULARY) + 1} tokens", f"was trained with {len(VOCABULARY)}")
    other.write_text("\n".join([*VOCABULARY[:-2], VOCABULARY[-1], VOCABULARY[-2]]) + "\n")
    ended = tool(*arguments, other)
    assert ended.code == BAD_OPTION
    number = len(VOCABULARY) - 1
    ended.says(f"{other} is another vocabulary than", f"id {number - 1} is '?' instead of '.'")
    shutil.copy(hf / "vocab.txt", other)
    assert tool(*arguments, other, "--epochs 1").code == 0


def test_a_kept_classifier_must_have_the_outputs_of_the_task(classifier: Path, sst: Path) -> None:
    arguments = ("--task sst-2", USUAL, "--hf", classifier, "--data-dir", sst)
    ended = tool(*arguments, "--keep-classifier")
    assert ended.code == BAD_OPTION
    ended.says("has 3 outputs, and --task sst-2 needs 2", "leave the option out")
    tool(*arguments, "--epochs 0").says("has a classifier of another task", "--keep-classifier")


def test_ones_own_labels_that_are_no_classes_are_refused(hf: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.tsv"
    own.write_text("sentence\tlabel\n" + "".join(f"good film\t{number / 7}\n" for number in range(40)))
    arguments = ("--task tsv", USUAL, "--hf", hf, "--train-file", own, "--dev-file", own)
    tool(*arguments).says(f"{own}: column 'label' has 40 different labels in 40 rows", "--regression")
    tool(*arguments, "--label-column mood").says(f"{own} has no column 'mood'", "'sentence', 'label'")
    tool(*arguments, "--regression --predict", tmp_path / "p").says("--predict", "needs --test-file")


def test_predictions_that_could_not_be_written_are_refused_before_training(hf: Path, sst: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ended = tool("--task sst-2", USUAL, "--hf", hf, "--data-dir", sst, "--predict", tmp_path / "file" / "p")
    assert ended.code == BAD_OPTION and "epoch 1" not in ended.err
    ended.says("--predict", "cannot be made")
