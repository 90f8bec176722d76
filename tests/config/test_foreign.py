"""Flags of other frameworks and forks: what they set, what is said of them, and what is suggested instead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron3d.config.check import check
from megatron3d.config.cli import read_command, settle
from megatron3d.config.command_line import GivenFlag, split_command_line
from megatron3d.config.foreign.flags import contradictions, flags_meant, judge
from megatron3d.config.foreign.megatron import MEGATRON, TABLES
from megatron3d.config.foreign.names import ADVICE_BY_FOREIGN_NAME, OPTION_BY_FOREIGN_NAME, plain_name
from megatron3d.config.options import BY_SPELLING
from megatron3d.config.run import DraftRun, GivenRun
from megatron3d.errors import ConfigError
from megatron3d.pipeline.orders.named import ORDERS

BASE = (
    "--num-layers 8 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 2 "
    "--global-batch-size 16 --lr 1e-3 --train-iters 5 --vocab-size 100 --mock-data"
)


def run_of(flags: str, *, world: int = 1, said: list[str] | None = None) -> DraftRun:
    lines: list[str] = [] if said is None else said
    command = read_command(f"{BASE} {flags}".split(), program="pretrain_gpt.py", description="t", log=lines.append)
    return settle(command, world)


def problems_of(flags: str, *, world: int = 1) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        run_of(flags, world=world)
    return str(raised.value).split("\n")


# --- Hints ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--num-key-value-heads", "--num-query-groups"),
        ("--num-hidden-layers", "--num-layers"),
        ("--n_embd", "--hidden-size"),
        ("--block-size", "--seq-length"),
        ("--per-device-train-batch-size", "--micro-batch-size"),
        ("--max_grad_norm", "--clip-grad"),
        ("--warmup-steps", "--lr-warmup-iters"),
        ("--learning_rate", "--lr"),
        ("--num_layers", "--num-layers"),
        ("--num-layer", "--num-layers"),
        ("--tensor-parallel-size", "--tensor-model-parallel-size"),
        ("--micro-batchsize", "--micro-batch-size"),
        ("--use-flash-atn", "--use-flash-attn"),
        ("--confg", "--config"),
        ("--dry-run", None),
        ("--expert-choice", None),
        ("--no-mock-data", None),
        ("--foo", None),
    ],
)
def test_a_flag_that_is_not_known_is_taken_for_what_it_means(flag: str, meant: str | None) -> None:
    assert flags_meant(flag) == (() if meant is None else (meant,))


@pytest.mark.parametrize(
    ("flag", "hint"),
    [
        ("--hidden", "did you mean --hidden-dropout or --hidden-size?"),
        (
            "--num-lay",
            "did you mean --num-layers, --num-layers-at-end-in-bf16, --num-layers-at-start-in-bf16 or "
            "--num-layers-per-virtual-pipeline-stage?",
        ),
        ("--swi", "did you mean --swiglu?"),
        ("--conf", "did you mean --config?"),
        ("--encoder-num", "did you mean --num-layers?"),
        ("--no", "--help lists all flags."),
    ],
)
def test_an_abbreviated_flag_is_refused_with_the_flags_that_it_may_stand_for(flag: str, hint: str) -> None:
    words = BASE.replace("--hidden-size 64", "") if flag == "--hidden" else BASE
    command = read_command(f"{words} {flag} 64".split(), program="pretrain_gpt.py", description="t", log=print)
    with pytest.raises(ConfigError) as raised:
        settle(command, 1)
    assert str(raised.value) == f"{flag} 64 is unknown; {hint}"


def test_a_name_from_elsewhere_wins_over_a_family_of_refused_flags() -> None:
    (problem,) = problems_of("--block-size 64")
    assert problem == "--block-size 64 is unknown; did you mean --seq-length?"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("--dry-run", "tools/estimate.py predicts the memory"),
        ("--dtype bf16", "write --bf16 or --fp16"),
        ("--adam", "--optimizer adam"),
        ("--data-parallel-size 8", "follows from the ranks"),
        ("--num-train-epochs 3", "--train-samples"),
        ("--fsdp", "--zero-stage 3"),
    ],
)
def test_a_name_whose_value_has_another_form_here_gets_advice(words: str, hint: str) -> None:
    (problem,) = problems_of(words)
    assert problem.startswith(f"{words} is unknown; ") and hint in problem


def test_epochs_of_megatron_are_refused_with_what_gives_the_length_here() -> None:
    (problem,) = problems_of("--epochs 3")
    assert problem.startswith("--epochs 3 is not supported: ") and "--train-iters, --train-samples or" in problem


def test_the_tables_of_names_lead_to_flags_that_exist_and_hide_none() -> None:
    known = {*BY_SPELLING, *MEGATRON.synonyms}
    assert {flag for flag in OPTION_BY_FOREIGN_NAME.values() if flag not in known} == set()
    names = [*OPTION_BY_FOREIGN_NAME, *ADVICE_BY_FOREIGN_NAME]
    assert len(names) == len(set(names))
    assert not set(names) & {plain_name(flag) for flag in known}
    refused_by_name = {flag for table in TABLES for row in table.refused for flag in row.flags}
    for flag in (f"--{name}" for name in names):
        assert all(table.reason_and_arity(flag) is None for table in TABLES), flag
        assert flag not in refused_by_name


def test_each_flag_of_the_forks_has_one_fate() -> None:
    forks = TABLES[1:]
    listed = [flag for fork in forks for row in fork.accepted for flag in (*row.switches, *row.valued, *row.lists)]
    listed += [flag for fork in forks for row in fork.refused for flag in row.flags]
    listed += [flag for fork in forks for flag in fork.synonyms]
    assert len(listed) == len(set(listed)) > 90
    for flag in listed:
        assert flag not in BY_SPELLING and flag not in MEGATRON.synonyms, flag
        assert MEGATRON.reason_and_arity(flag) is None and MEGATRON.instead_of(flag) is None, flag


# --- Megatron-DeepSpeed -----------------------------------------------------------------------------------------------


def test_no_pipeline_parallel_is_what_is_done_and_contradicts_pipeline_ranks() -> None:
    assert run_of("--no-pipeline-parallel --pipeline-model-parallel-size 1").parallel.pipeline_model_parallel_size == 1
    (problem,) = problems_of("--no-pipeline-parallel --pipeline-model-parallel-size 2", world=2)
    assert problem.startswith("--no-pipeline-parallel and --pipeline-model-parallel-size 2 contradict")


def test_one_expert_is_a_dense_model_and_silences_what_belongs_to_experts() -> None:
    said: list[str] = []
    run_of("--num-experts 1 --moe-loss-coeff 0.01 --mlp-type standard --topk 1 --create-moe-param-group", said=said)
    assert len(said) == 4
    assert run_of("--num-experts 4 --moe-loss-coeff 0.1 --create-moe-param-group").model.moe_aux_loss_coeff == ("0.1",)
    assert len(problems_of("--num-experts 4 --moe-eval-capacity-factor 2 --num-experts-switch 2")) == 2
    assert len(problems_of("--num-experts 1 4")) == 1


def test_names_of_a_hugging_face_tokenizer() -> None:
    run = run_of("--tokenizer-type PretrainedFromHF --tokenizer-name-or-path D")
    assert (run.data.tokenizer_type, run.data.tokenizer_model) == ("HuggingFaceTokenizer", "D")
    assert run_of("--tokenizer-type HFTokenizer --tokenizer-model D").data == run.data


@pytest.mark.parametrize("batch", ["--global-batch-size 8", "--global-batch-size 8 --rampup-batch-size 2 2 20"])
@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 1000, 1600, 1601])
def test_a_length_in_tokens_ends_with_the_step_that_megatron_deepspeed_ends_with(tokens: int, batch: str) -> None:
    flags = f"--train-tokens {tokens} {batch}"
    command = read_command(
        f"{BASE.replace('--train-iters 5', '')} {flags}".split(), program="t", description="t", log=lambda line: None
    )
    train = settle(command, 1).train
    consumed = 0
    while consumed * 32 < tokens:  # its loop: a batch more while the tokens are not reached
        consumed += 8 if "rampup" not in batch or consumed >= 20 else 2 + 2 * (consumed * 3 // 20)
    assert train.train_samples == consumed


def test_tokens_and_samples_end_with_what_is_reached_first_and_schedules_follow() -> None:
    base = BASE.replace("--train-iters 5", "")
    words = f"{base} --train-tokens 6400 --train-samples 150 --lr-decay-tokens 3200 --lr-warmup-tokens 320".split()
    run = settle(read_command(words, program="t", description="t", log=print), 1)
    assert (run.train.train_samples, run.optim.lr_decay_samples, run.optim.lr_warmup_samples) == (150, 100, 10)
    assert settle(read_command(words, program="t", description="t", log=print), 1) == run
    shorter = [word if word != "6400" else "3200" for word in words]
    assert settle(read_command(shorter, program="t", description="t", log=print), 1).train.train_samples == 112


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--train-tokens 100", "--train-iters 5 and --train-tokens 100 both set the length"),
        ("--lr-decay-tokens 100", "--lr-decay-tokens 100 counts tokens, but the run is given by --train-iters"),
        ("--lr-warmup-tokens 100", "use --lr-warmup-iters, or --train-tokens"),
        ("--gradient-accumulation-steps 3", "--global-batch-size 16 is not micro-batch 2 x data-parallel 1 x"),
        (
            "--gradient-accumulation-steps 8 --rampup-batch-size 2 2 10",
            "is the same in every step, but the batch grows",
        ),
    ],
)
def test_tokens_and_accumulation_steps_must_agree_with_the_rest(flags: str, sentence: str) -> None:
    (problem,) = problems_of(flags)
    assert sentence in problem


# --- The zero-bubble fork ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "order"),
    [
        ("--enable-zero-bubble --zero-bubble-max-pending-backward 4", "zb-h1"),
        ("--enable-zero-bubble --zero-bubble-max-pending-backward 8", "zb-h2"),
        ("--enable-zero-bubble --zero-bubble-max-pending-backward auto", "zb-h1"),
        ("--enable-zero-bubble", "zb-h1"),
        ("--zero-bubble-v-schedule --allow-padding-num-layers --enable-optimizer-post-validation", "zb-v"),
        ("--zero-bubble-v-schedule --zero-bubble-v-schedule-mem-setup zb --zero-bubble-max-pending-backward 4", "zb-v"),
        ("--enable-zbh1-pipeline --enable-zbh1-exact-semantics", "zb-h1"),
        ("--enable-zero-bubble --pipeline-schedule zb-h1", "zb-h1"),
        ("--zero-bubble-max-pending-backward 8", "1f1b"),
    ],
)
def test_the_switches_of_the_zero_bubble_fork_name_a_schedule(flags: str, order: str) -> None:
    said: list[str] = []
    run = run_of(f"--pipeline-model-parallel-size 4 {flags}", world=4, said=said)
    assert run.parallel.pipeline_schedule == order and order in ORDERS
    assert said or "zbh1" in flags


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--zero-bubble-v-schedule --zero-bubble-v-schedule-mem-setup half", "mem-setup half is not supported"),
        ("--enable-zero-bubble --zero-bubble-max-pending-backward 3", "3 is below the 4 pipeline ranks"),
        ("--enable-zero-bubble --zero-bubble-max-pending-backward many", "many is neither a whole number nor auto"),
        ("--enable-zero-bubble --zero-bubble-max-pending-backward", "has no value after it"),
        ("--enable-1f1b-v", "--enable-1f1b-v is not supported"),
        ("--enable-zero-bubble yes", "'yes' stands alone"),
        ("--enable-zero-bubble --pipeline-schedule gpipe", "--enable-zero-bubble means --pipeline-schedule zb-h1, but"),
        (
            "--enable-zbh1-pipeline --pipeline-schedule gpipe",
            "means --pipeline-schedule zb-h1, but --pipeline-schedule",
        ),
        ("--enable-zbh1-pipeline --zero-bubble-v-schedule", "--pipeline-schedule zb-v"),
    ],
)
def test_what_the_zero_bubble_fork_has_and_we_have_not_is_refused(flags: str, sentence: str) -> None:
    (problem,) = problems_of(f"--pipeline-model-parallel-size 4 {flags}", world=4)
    assert sentence in problem


# --- Elsewhere --------------------------------------------------------------------------------------------------------


def test_an_interval_of_saves_without_a_directory_is_said_in_one_line() -> None:
    said: list[str] = []
    run_of("--save-interval 100", said=said)
    assert said == ["--save-interval 100 is accepted without effect: nothing is saved without --save."]


def test_a_synonym_in_a_config_file_sets_its_option_and_false_leaves_it(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"use_rotary_position_embeddings": True, "erf_gelu": False, "use-flash-attn": False}))
    said: list[str] = []
    run = run_of(f"--config {file}", said=said)
    assert (run.model.position_embedding_type, run.model.activation, said) == ("rope", "gelu_tanh", [])


def test_words_behind_a_flag_without_values_are_not_swallowed() -> None:
    verdict = judge([GivenFlag("--no-pipeline-parallel", ("3",)), GivenFlag("--tokenizer-name-or-path", ())])
    assert len(verdict.problems) == 2 and verdict.settings == {}


def test_two_tokenizers_under_two_names_are_refused() -> None:
    sentence = (
        "--tokenizer-name-or-path a means --tokenizer-model a, but --tokenizer-model is b; give only one of them."
    )
    assert sentence in problems_of("--tokenizer-name-or-path a --tokenizer-model b")
    (problem, *_) = problems_of("--tokenizer-name-or-path a --tokenizer-type ByteTokenizer")
    assert problem.startswith("--tokenizer-name-or-path a means --tokenizer-type HuggingFaceTokenizer, but --tokenizer")
    words = ["--tokenizer-name-or-path", "a", "--tokenizer-type", "PretrainedFromHF", "--tokenizer-model", "a"]
    assert list(contradictions(split_command_line(words)[0], {("data", "tokenizer_type"): "PretrainedFromHF"})) == []


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (
            "--use-rotary-position-embeddings --position-embedding-type learned_absolute",
            "--use-rotary-position-embeddings means --position-embedding-type rope, but --position-embedding-type is "
            "learned_absolute; give only one of them.",
        ),
        (
            "--no-position-embedding --position-embedding-type learned_absolute",
            "--no-position-embedding means --position-embedding-type none, but",
        ),
        ("--multi-query-attention --num-query-groups 4", "--multi-query-attention means --num-query-groups 1, but"),
        ("--erf-gelu --activation relu", "--erf-gelu means --activation gelu, but --activation is relu"),
        (
            "--checkpoint-activations --recompute-granularity selective",
            "--checkpoint-activations means --recompute-granularity full, but",
        ),
        (
            "--checkpoint-attention --recompute-granularity full",
            "--checkpoint-attention means --recompute-granularity selective, but",
        ),
        (
            "--checkpoint-attention --checkpoint-activations",
            "--checkpoint-attention means --recompute-granularity selective and --checkpoint-activations means",
        ),
        ("--cpu-optimizer --offload-optimizer none", "--cpu-optimizer means --offload-optimizer cpu, but"),
        ("--use-distributed-optimizer --zero-stage 0", "--use-distributed-optimizer means --zero-stage 1, but"),
    ],
)
def test_a_switch_and_an_option_that_contradict_each_other_are_refused_by_both_names(
    tmp_path: Path, words: str, problem: str
) -> None:
    assert problems_of(words)[0].startswith(problem)
    flags, _ = split_command_line(words.split())
    (file := tmp_path / "run.json").write_text(json.dumps({flag.name: (flag.values or (True,))[0] for flag in flags}))
    assert problems_of(f"--config {file}")[0].startswith(f"{file}: {problem}")


@pytest.mark.parametrize("words", ["--no-position-embedding --position-embedding-type rope", "--zero-stage 2"])
def test_a_switch_fits_an_option_that_says_the_same_or_more(words: str) -> None:
    run = run_of(f"--use-distributed-optimizer --use-rotary-position-embeddings {words}", world=2)
    assert run.model.position_embedding_type == "rope" and run.parallel.zero_stage >= 1


def test_a_flag_wins_over_a_switch_of_the_file_that_it_contradicts(tmp_path: Path) -> None:
    (file := tmp_path / "run.json").write_text(json.dumps({"use-rotary-position-embeddings": True}))
    assert run_of(f"--config {file} --position-embedding-type none").model.position_embedding_type == "none"
    file.write_text(json.dumps({"enable-zero-bubble": True}))
    stages = f"--config {file} --pipeline-model-parallel-size 2"
    assert run_of(stages, world=2).parallel.pipeline_schedule == "zb-h1"
    assert run_of(f"{stages} --pipeline-schedule gpipe", world=2).parallel.pipeline_schedule == "gpipe"


TWO_TOKENIZERS = {
    "--tokenizer-type GPT2BPETokenizer --vocab-file v --merge-file m --tokenizer-model x": (
        "--tokenizer-type GPT2BPETokenizer --vocab-file v --merge-file m and --tokenizer-model x name two tokenizers"
    ),
    "--vocab-file v --tokenizer-model x": (
        "--vocab-file v (a BertWordPieceLowerCase) and --tokenizer-model x name two tokenizers"
    ),
    "--tokenizer-type Llama2Tokenizer --tokenizer-model x --vocab-file v": (
        "--tokenizer-type Llama2Tokenizer --tokenizer-model x and --vocab-file v name two tokenizers"
    ),
    "--tokenizer-name-or-path d --vocab-file v": (
        "--tokenizer-type HuggingFaceTokenizer --tokenizer-model d and --vocab-file v name two tokenizers"
    ),
    "--tokenizer-type BertWordPieceCase --vocab-file v --merge-file m": (
        "--tokenizer-type BertWordPieceCase --vocab-file v and --merge-file m name two tokenizers"
    ),
    "--tokenizer-model x --vocab-size 100": "--tokenizer-model x is given without --tokenizer-type",
    "--tokenizer-model x": "--tokenizer-model x is given without --tokenizer-type",
}


@pytest.mark.parametrize("words", TWO_TOKENIZERS)
def test_files_of_a_second_tokenizer_are_refused_by_both_names(words: str) -> None:
    (problem,) = check(run_of_words(words), 1)
    assert problem.startswith(TWO_TOKENIZERS[words])


@pytest.mark.parametrize(
    "words",
    [
        "--tokenizer-type HFTokenizer --tokenizer-model d --vocab-file d/vocab.txt",
        "--tokenizer-type HFTokenizer --tokenizer-model d/tokenizer.json --vocab-file d/vocab.txt",
        "--tokenizer-type NullTokenizer --vocab-size 9 --vocab-file v --merge-file m",
        "--tokenizer-type ByteTokenizer --tokenizer-model x",
    ],
)
def test_one_tokenizer_may_be_named_by_all_its_files(words: str) -> None:
    assert check(run_of_words(words), 1) == []


def test_a_tokenizer_of_another_kind_on_the_command_line_takes_the_place_of_the_files(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    data = {"tokenizer_type": "HFTokenizer", "tokenizer_model": "d", "vocab_file": "d/vocab.txt"}
    file.write_text(json.dumps({"data": data}))
    other = run_of_words(f"--config {file} --tokenizer-type GPT2BPETokenizer --vocab-file v --merge-file m")
    assert (other.data.vocab_file, other.data.tokenizer_model) == ("v", None) and check(other, 1) == []
    moved = run_of_words(f"--config {file} --tokenizer-model e")
    assert (moved.data.tokenizer_model, moved.data.vocab_file) == ("e", None) and check(moved, 1) == []
    same = run_of_words(f"--config {file} --seed 3")
    assert (same.data.tokenizer_model, same.data.vocab_file) == ("d", "d/vocab.txt") and check(same, 1) == []


def run_of_words(words: str) -> GivenRun:
    """The run of a command that needs nothing but a tokenizer."""
    base = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --micro-batch-size 2 --lr 1e-3"
    argv = f"{base} --train-iters 5 --mock-data {words}".split()
    return read_command(argv, program="pretrain_gpt.py", description="t", log=lambda line: None).run
