"""Flags of Megatron-LM and its forks that are accepted are those that nobody counts on, and their lines are true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron3d.config.check import check
from megatron3d.config.cli import parse_args
from megatron3d.config.foreign.flag_table import Accepted, FlagTable, read_flag_table
from megatron3d.config.foreign.flags import OWN_FLAGS
from megatron3d.config.foreign.megatron import MEGATRON, MEGATRON_DEEPSPEED, TABLES, ZERO_BUBBLE
from megatron3d.config.foreign.names import OPTION_BY_FOREIGN_NAME, plain_name
from megatron3d.config.foreign.zero_bubble import ZERO_BUBBLE_SWITCHES, ZERO_BUBBLE_VALUED
from megatron3d.config.options import BY_SPELLING
from megatron3d.errors import ConfigError

SHAPE = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --vocab-size 64 --micro-batch-size 2 "
    "--global-batch-size 8 --lr 1e-3 --mock-data --train-iters 5 --device cpu"
)

# Words of names by which a flag protects, limits, repeats, checks or keeps something. One that is accepted all the same
# stands below with why nobody loses anything.
COUNTED_ON = re.compile(
    r"check-|verif|valid|retain|skip|rerun|timeout|resume|exit|signal|determinis|invariant|straggler|spiky|large-grads|"
    r"hash|ft-|snapshot|history|missing|strict|integrity|entity|seed|random|skip|loss-scale|decay|-lr|clip|fp32"
)
LOSES_NOTHING = {
    "--attention-softmax-in-fp32": "done",
    "--fp32-layernorm": "done",
    "--accumulate-allreduce-grads-in-fp32": "done",
    "--fp32-allreduce": "done",
    "--verify-integrity": "done",
    "--enable-optimizer-post-validation": "how",  # gradients are clipped before the update, by the norm of all ranks
    "--dist-ckpt-strictness": "done",
    "--no-ckpt-load-validate-sharding-integrity": "done",  # asks for less than is done
    "--disable-ckpt-load-validate-sharding-integrity": "done",
    "--resume-dataloader": "done",
    "--exit-signal-handler-for-dataloader": "done",
    "--override-checkpoint-version": "how",  # of a format that is not read here
    "--auto-detect-ckpt-format": "how",
    "--skip-mmap-warmup": "how",  # asks for less
    "--log-validation-ppl-to-tensorboard": "report",  # exp of the loss that is there
    "--no-log-loss-scale-to-tensorboard": "report",
    "--disable-log-loss-scale-to-tensorboard": "report",
    "--one-logger-entity": "report",  # of a service to which nothing is sent
}
ACCEPTED = [row for table in TABLES for row in table.accepted]
ROWS = {flag: row for row in ACCEPTED for flag in (*row.switches, *row.valued, *row.lists)}

THEIRS = Path(__file__).with_name("megatron_lm_flags.txt").read_text().splitlines()

# A table in which nothing is wrong, for one thing at a time to be broken.
TABLE = """
[source]
repository = "https://somewhere"
file = "arguments.py"
version = "1"
commit = "abc"
date = 2026-01-01
[[synonym]]
flag = "--same"
sets = { "model.num_layers" = 2 }
fitting = { "model.num_layers" = [3] }
[harmless_values]
"--other" = "0"
[[accepted]]
kind = "how"
reason = "it is done in another way"
switches = ["--one"]
lists = ["--some"]
[[refused]]
instead = "leave it out"
flags = ["--other"]
"""


def parse(words: str) -> list[str]:
    """The lines that a command line gets."""
    said: list[str] = []
    parse_args(f"{SHAPE} {words}".split(), program="pretrain_gpt.py", description="", log=said.append)
    return said


@pytest.mark.parametrize("flag", sorted(flag for flag in ROWS if COUNTED_ON.search(flag)))
def test_a_flag_that_sounds_like_something_to_count_on_is_accepted_for_a_stated_reason(flag: str) -> None:
    assert ROWS[flag].kind == LOSES_NOTHING.get(flag), f"who gives {flag} counts on it: build it, or refuse it"


@pytest.mark.parametrize("flag", ["--linear-bias", "--hash-x", "--logits-x", "--moe-x", "--loraxy", "--inference-x"])
def test_a_flag_that_begins_like_refused_ones_is_unknown_and_not_one_of_them(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"^{flag} is unknown"):
        parse(flag)


@pytest.mark.parametrize("flag", ["--retro-add-retriever", "--ict-head-size", "--mamba-d-state", "--fp8-e4m3"])
def test_families_of_earlier_versions_are_refused_by_name(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"^{flag} is not supported"):
        parse(flag)


@pytest.mark.parametrize("flag", ["--transformer-impl", "--logging-level", "--mlp-type", "--DDP-impl"])
def test_a_flag_that_takes_a_value_is_not_accepted_without_one(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"^{flag} (has no value after it|is not supported)"):
        parse(flag)


@pytest.mark.parametrize("words", ["--head-lr-mult 1", "--head-lr-mult 1.00", "--vocab-extra-ids 00"])
def test_a_harmless_number_may_be_written_in_any_way(words: str) -> None:
    (line,) = parse(words)
    assert line.startswith(f"{words} is accepted without effect")


def test_every_flag_of_the_version_that_the_table_follows_is_an_option_or_has_a_row() -> None:
    source = MEGATRON.source
    title, *flags = THEIRS
    assert title == f"# Flags of Megatron-LM {source.version}, commit {source.commit} ({source.date})."
    assert len(flags) > 800 and "--num-layers" in flags
    known = {*BY_SPELLING, *MEGATRON.synonyms, "--help"}
    without_row = [flag for flag in flags if flag not in known and not MEGATRON.reason_and_arity(flag)]
    assert [flag for flag in without_row if not MEGATRON.instead_of(flag)] == []


@pytest.mark.parametrize(
    ("table", "file", "title"),
    [
        (MEGATRON_DEEPSPEED, "megatron_deepspeed_flags.txt", "Megatron-DeepSpeed"),
        (ZERO_BUBBLE, "zero_bubble_flags.txt", "the zero-bubble fork"),
    ],
)
def test_every_flag_that_a_fork_added_is_an_option_or_has_a_row(table: FlagTable, file: str, title: str) -> None:
    source = table.source
    first, *flags = Path(__file__).with_name(file).read_text().splitlines()
    assert first == f"# Flags of {title} that Megatron-LM's list lacks, commit {source.commit} ({source.date})."
    assert len(flags) > 20
    known = {*BY_SPELLING, *(flag for one in TABLES for flag in one.synonyms)}
    # These are read with their values.
    known |= {"--remote-device", "--expert-interval", *ZERO_BUBBLE_SWITCHES, *ZERO_BUBBLE_VALUED}
    without_row = [
        flag
        for flag in flags
        if flag not in known and not any(one.reason_and_arity(flag) or one.instead_of(flag) for one in TABLES)
    ]
    assert [flag for flag in without_row if plain_name(flag) not in OPTION_BY_FOREIGN_NAME] == []


def test_a_table_is_read_with_the_number_of_values_of_each_flag(tmp_path: Path) -> None:
    (file := tmp_path / "flags.toml").write_text(TABLE)
    table = read_flag_table(file)
    assert dict(table.synonyms["--same"]) == {("model", "num_layers"): 2}
    assert table.reason_and_arity("--some") == ("it is done in another way", "*")
    assert (table.instead_of("--other"), table.instead_of("--one")) == ("leave it out", None)
    assert dict(table.fitting) == {("--same", ("model", "num_layers")): (3,)}


@pytest.mark.parametrize(
    ("right", "wrong", "problem"),
    [
        ('version = "1"\n', "", "a row of source has no version"),
        ("2026-01-01", '"today"', "date = 'today' does not belong into a row of source"),
        ("model.num_layers", "model.depth", "--same sets model.depth, which is no option"),
        (
            'num_layers" = 2',
            'num_layers" = 2.5',
            "--same sets model.num_layers: --num-layers 2.5 is not a whole number",
        ),
        ('"how"', '"so"', "kind 'so' of 'it is done in another way' is not one of how, done, report"),
        ('["--one"]', '["--other"]', "--other is listed 2 times"),
        ('["--one"]', '["--one --two"]', "'--one --two' is not a flag"),
        (
            "instead =",
            "only_with_experts = 1\ninstead =",
            "only_with_experts = 1 does not belong into a row of refused",
        ),
        ("switches =", "switch =", "switch = ['--one'] does not belong into a row of accepted"),
        (
            'fitting = { "model.num_layers"',
            'fitting = { "model.seq_length"',
            "fitting of --same names model.seq_length, which",
        ),
        ("[3]", '["three"]', "--same sets model.num_layers: --num-layers three is not a number"),
        ('flags = ["--other"]', "", "a row of refused has no flags"),
        (
            "[harmless_values]",
            "[harmless]",
            "its parts are accepted, harmless, refused, source",
        ),
    ],
)
def test_a_broken_table_is_refused_with_what_is_wrong(tmp_path: Path, right: str, wrong: str, problem: str) -> None:
    assert right in TABLE
    (file := tmp_path / "flags.toml").write_text(TABLE.replace(right, wrong))
    with pytest.raises(ValueError, match=r"flags\.toml cannot be used") as refused:
        read_flag_table(file)
    assert problem in str(refused.value)


def test_no_reason_is_stated_for_a_flag_that_is_gone() -> None:
    assert LOSES_NOTHING.keys() <= ROWS.keys()


@pytest.mark.parametrize("row", ACCEPTED, ids=lambda row: row.reason[:40])
def test_options_that_a_sentence_names_exist(row: Accepted) -> None:
    named = [word.rstrip(".,;)") for word in row.reason.split() if word.startswith("--")]
    assert [word for word in named if word not in (*BY_SPELLING, *OWN_FLAGS)] == []


def test_the_special_tokens_of_preprocessing_are_accepted_in_training() -> None:
    """A launch script of Megatron-LM gives both programs the same options of the tokenizer."""
    lines = parse("--tokenizer-hf-include-special-tokens --tokenizer-hf-use-fast")
    assert any(
        "--tokenizer-hf-include-special-tokens is accepted" in line and "preprocess_data" in line for line in lines
    )
    with pytest.raises(ConfigError, match="--tokenizer-hf-no-use-fast is not supported"):
        parse("--tokenizer-hf-no-use-fast")


@pytest.mark.parametrize(
    "row", [row for row in MEGATRON.accepted if row.kind == "report"], ids=lambda row: row.reason[:40]
)
def test_a_flag_that_asks_for_a_report_says_what_is_reported(row: Accepted) -> None:
    """No sentence stands for a whole list of unlike flags: it names where to look, or what there is."""
    sources = ("--metrics-file", "--profile", "TensorBoard", "run.json", "line", "norm", "rates", "energy")
    assert any(source in row.reason for source in sources)


@pytest.mark.parametrize(
    ("flag", "what_there_is"),
    [
        ("--use-persistent-ckpt-worker", "with --async-save each rank keeps one writer process"),
        ("--use-pytorch-profiler", "--profile always runs torch's profiler"),
        ("--log-params-norm", "norms of weights, zeros in gradients and logits of attention are not measured"),
        ("--log-progress", "no progress.txt is written"),
        ("--verify-integrity", "compares the checksums"),
        ("--tensorboard-log-interval 5", "get every step"),
        ("--rerun-mode disabled", "what is done anyway"),
    ],
)
def test_an_accepted_flag_says_what_there_is(flag: str, what_there_is: str) -> None:
    (line,) = parse(flag)
    assert line.startswith(f"{flag} is accepted without effect: ") and what_there_is in line


@pytest.mark.parametrize(
    ("flag", "instead"),
    [
        ("--rerun-mode validate_results", "--check-weight-hash-across-dp-replicas-interval"),
        ("--rerun-mode report_stats", "--check-weight-hash-across-dp-replicas-interval"),
        ("--gpu-sniff-test-interval 10", "--check-weight-hash-across-dp-replicas-interval"),
        ("--check-for-spiky-loss", "--iterations-to-skip"),
        ("--check-for-large-grads", "--clip-grad"),
        ("--log-straggler", "--profile-pipeline"),
        ("--enable-ft-package", "--distributed-timeout-minutes"),
        ("--adlr-autoresume", "--max-restarts"),
        ("--distributed-timeout-seconds-after-init 60", "--distributed-timeout-minutes"),
        ("--deterministic-mode", "on a CPU equal runs are equal"),
        ("--record-memory-history", "tools/estimate.py"),
        ("--exit-signal SIGINT", "SIGTERM"),
        ("--fp32-embedding", "--bf16"),
    ],
)
def test_a_flag_that_somebody_counts_on_is_refused_by_name(flag: str, instead: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(flag)
    assert str(refused.value).startswith(f"{flag} is not supported: ") and instead in str(refused.value)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("--save c --save-retain-interval 10", "--save-retain-interval 10 keeps checkpoints of its multiples"),
        ("--save c --save-interval 4 --save-retain-interval 10", "with --save-interval 4 not all of these"),
        ("--save-interval 5 --save-retain-interval 10", "--save-retain-interval 10 needs --save"),
        ("--save c --save-interval 1 --save-retain-interval 0", "--save-retain-interval 0 is outside its range"),
        ("--iterations-to-skip -1", "--iterations-to-skip -1 has -1, which is no iteration"),
    ],
)
def test_values_that_cannot_work_are_refused(words: str, problem: str) -> None:
    try:
        config = parse_args(
            f"{SHAPE} {words}".split(), program="pretrain_gpt.py", description="", log=lambda line: None
        )
        problems = check(config, 1)
    except ConfigError as error:
        problems = [str(error)]
    assert any(problem in found for found in problems), problems
