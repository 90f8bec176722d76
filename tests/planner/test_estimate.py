"""tools/estimate.py: its numbers are the ledger's and the papers', its errors name option, value and fix."""

from __future__ import annotations

import runpy
import sys
import time
from pathlib import Path

import pytest

from megatron3d.config.cli import parse_args
from megatron3d.config.presets import PRESETS
from megatron3d.errors import ConfigError
from megatron3d.models.counts import num_parameters
from megatron3d.planner.memory import least_state_bytes, parts_of_rank, shard_size, state_bytes
from megatron3d.train.estimate import SETTINGS, Limits, Setting, estimate_of, family_of, largest, settled
from megatron3d.train.plan import GIB, plan_of
from megatron3d.train.progress import format_count

TOOL = Path(__file__).resolve().parents[2] / "tools" / "estimate.py"
SMALL = "--micro-batch-size 1 --seq-length 256 --max-position-embeddings 256 --bf16 --device cuda"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
GPT3 = (
    "--preset gpt3-175b --world-size 1024 --tensor-model-parallel-size 8 --pipeline-model-parallel-size 16 "
    f"--micro-batch-size 1 --global-batch-size 1536 --bf16 --sequence-parallel --zero-stage 1 --device cuda {FULL}"
)


@pytest.fixture
def estimate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the tool as a script; gives (exit code, stdout, stderr)."""

    def run(flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *flags.split()])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOL), run_name="__main__")
        return ended.value.code, *capsys.readouterr()

    return run


def _cells(line: str) -> list[str]:
    return [word.strip() for word in line.strip("|").split("|")]


def test_gpt3_is_told_rank_by_rank_within_seconds(estimate) -> None:
    """175B parameters in bf16 with fp32 gradients over 8 x 16 ranks: 2 and 4 bytes of 175e9 / 128 for each, and 12/8
    bytes of optimizer state at ZeRO-1 over 8 data-parallel ranks."""
    start = time.process_time()
    code, out, _ = estimate(GPT3)
    assert time.process_time() - start < 10
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("GPT: 174,") and "tp 8, pp 16, dp 8, ZeRO stage 1, bf16" in lines[0]
    head, *ranks = [_cells(line) for line in lines if line.startswith("| ")]
    assert head == ["pp rank", "weights", "gradients", "optimizer", "activations", "buffers", "peak", "host", "files"]
    assert [row[0] for row in ranks] == [str(rank) for rank in range(16)]
    inner = dict(zip(head, ranks[7], strict=True))
    block = 12 * 12288**2 * 6 / 8 / GIB  # parameters of a rank's six layers, in units of 2**30, without vectors
    for name, each in {"weights": 2, "gradients": 4, "optimizer": 1.5}.items():
        assert float(inner[name].removesuffix(" GiB")) == pytest.approx(each * block, rel=0.01)
    assert "pipeline rank 0 needs most" in lines[-1]


def test_a_bert_needs_no_other_tool(estimate) -> None:
    cut = "--context-parallel-size 2 --attention-dropout 0"
    code, out, _ = estimate(f"--preset bert-base --world-size 4 --micro-batch-size 4 {cut}")
    assert code == 0
    assert out.startswith("BERT: 110,") and "dp 2, cp 2, ZeRO" in out


def test_help_tells_both_kinds_of_flags(estimate) -> None:
    code, out, _ = estimate("--help")
    assert code == 0
    assert "--memory-gb" in out and "--tensor-model-parallel-size" in out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--preset gpt3-175b --world-size 8 --micro-batch-size 1 --tensor-model-parallel-size 3", "3"),
        ("--preset gpt3-175b --world-size many --micro-batch-size 1", "--world-size many is not a whole number"),
        ("--preset gpt3-175b --world-size 0 --micro-batch-size 1", "--world-size 0 is not a whole number"),
        ("--preset gpt3-175b --world-size 1,8 --micro-batch-size 1", "--world-size 1,8 names several sizes"),
        ("--preset gpt3-175b --memory-gb 80 --micro-batch-size 1", "--memory-gb 80 is for --largest"),
        ("--preset gpt3-175b --micro-batch-size 1 --num-layer 3", "--num-layer"),
        ("--largest --micro-batch-size 1 --memory-gb lots", "--memory-gb lots is not a number of GiB above 0"),
        ("--largest --micro-batch-size 1 --memory-gb 8 --host-memory-gb -1", "--host-memory-gb -1 is not a number"),
        ("--world-size 1 --micro-batch-size 1", "--num-layers is missing"),
        ("--largest --micro-batch-size 1", "--memory-gb 80"),
        ("--largest --memory-gb 80 --preset gpt3-175b --micro-batch-size 1", "use --family"),
        (
            "--largest --memory-gb 80 --family nobody --micro-batch-size 1",
            "'nobody' begins the name of no GPT among the presets",
        ),
        ("--largest --memory-gb 80 --family gpt3 --micro-batch-size 1 --world-size 3 --zero-shard-size 2", "2"),
    ],
)
def test_what_cannot_be_estimated_is_refused_with_the_code_of_wrong_usage(estimate, flags: str, sentence: str) -> None:
    code, out, err = estimate(flags)
    assert code == 2
    assert sentence in err and out == ""


def test_a_stored_run_of_any_architecture_is_estimated(estimate) -> None:
    for name in ("gpt", "bert"):
        file = TOOL.parents[1] / "tests" / "checkpoint" / "written_before" / name / "iter_0000003" / "run.json"
        code, out, err = estimate(f"--config {file}")
        assert (code, out.split(":")[0]) == (0, name.upper()), err


@pytest.mark.parametrize(
    ("flags", "beginnings"),
    [
        (
            "--architecture t5 --world-size many --memory-gb 80 --num-layer 2 --micro-batch-size 0 --preset bert-base",
            ["--world-size many", "--memory-gb 80 is for", "--num-layer 2 is", "--architecture t5", "--micro-batch"],
        ),
        (
            "--largest --architecture t5 --world-size many --preset bert-base",
            ["--world-size many", "--largest needs", "--preset names", "--architecture t5"],
        ),
        ("--largest --num-layer 2 --memory-gb 0", ["--memory-gb 0 is not", "--num-layer 2 is"]),
    ],
)
def test_all_problems_of_a_command_are_reported_together(estimate, flags: str, beginnings: list[str]) -> None:
    code, _, err = estimate(flags)
    lines = err.splitlines()
    assert code == 2 and len(lines) == len(beginnings), err
    assert all(any(line.startswith(one) for line in lines) for one in beginnings), err


def _words(preset: str, flags: str = SMALL):
    return parse_args(f"--preset {preset} {flags}".split(), program="test", description="test")


def test_the_bound_by_parameters_is_below_the_state_and_near_it() -> None:
    for setting in SETTINGS:
        for world_size in (1, 8):
            config = settled(setting.of(_words("gpt3-125m")), world_size)
            units = parts_of_rank(config, plan_of(config), 0).units.values()
            state = state_bytes(
                config.parallel, config.optim, units, shard_rank=shard_size(config.parallel) - 1
            ).on_device
            bound = least_state_bytes(config.parallel, config.optim, num_parameters(config.model))
            assert 0.99 * state <= bound <= state, setting


def test_the_largest_model_fits_and_the_next_one_does_not() -> None:
    family = family_of("gpt3", "gpt")
    assert [preset.name for preset in family][:3] == ["gpt3-125m", "gpt3-350m", "gpt3-760m"]
    words, limits = [_words(preset.name) for preset in family], Limits(device=24 * GIB, host=64 * GIB)
    position, problems = largest(words, Setting(1), 8, limits)
    assert position is not None and not problems
    peaks = [estimate_of(settled(Setting(1).of(one), 8)).worst.peak for one in (words[position], words[position + 1])]
    assert peaks[0] <= limits.device < peaks[1]


def test_more_stages_and_more_offload_take_larger_models_until_the_host_is_full() -> None:
    words, family = [_words(preset.name) for preset in family_of("gpt3", "gpt")], family_of("gpt3", "gpt")
    names = [preset.name for preset in family]

    def found(setting: Setting, *, host: int | None = None) -> str:
        position, _ = largest(words, setting, 8, Limits(12 * GIB, host))
        return "none" if position is None else names[position]

    sizes = [names.index(found(Setting(stage))) for stage in range(4)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    assert names.index(found(Setting(3, "cpu", "cpu"))) > sizes[-1]
    assert found(Setting(3, "cpu", "cpu"), host=0) == "none"
    assert found(Setting(3, "nvme", "nvme"), host=64 * GIB) == found(Setting(3, "cpu", "cpu"))


def test_the_table_of_largest_models_has_a_row_for_each_setting(estimate) -> None:
    code, out, _ = estimate(f"--largest --memory-gb 1 --architecture bert --world-size 1,4 --micro-batch-size 1 {FULL}")
    assert code == 0
    head, *rows = [_cells(line) for line in out.splitlines() if line.startswith("| ")]
    assert head == ["ZeRO stage", "offloaded", "1 rank", "4 ranks"]
    assert len(rows) == len(SETTINGS) == 14
    assert {row[2] for row in rows} <= {"none", *(f"{name} ({size})" for name, size in _sizes("bert", "megatron-bert"))}


def _sizes(*prefixes: str) -> list[tuple[str, str]]:
    models = {name: preset.model_config() for name, preset in PRESETS.items() if name.startswith(prefixes)}
    return [(name, format_count(num_parameters(model))) for name, model in models.items()]


def test_a_family_is_of_one_architecture() -> None:
    assert {preset.model_config().architecture for preset in family_of("megatron", "gpt")} == {"gpt"}
    assert [preset.name for preset in family_of("bert,megatron-bert-3", "bert")] == [
        "bert-base",
        "bert-large",
        "megatron-bert-336m",
        "megatron-bert-3.9b",
    ]
    with pytest.raises(ConfigError, match="another --architecture"):
        family_of("bert", "gpt")
