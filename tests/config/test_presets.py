"""Presets are runs that work, with the parameter counts that their authors print."""

from __future__ import annotations

import re

import pytest

from megatron3d.config.check import check
from megatron3d.config.cli import parse_args
from megatron3d.config.derive import resolve_model
from megatron3d.config.presets import PRESETS
from megatron3d.errors import ConfigError
from megatron3d.models.counts import num_active_parameters, num_parameters

# A printed count is right to half a unit of its last digit; beyond that, counts agree to 1 %.
RELATIVE_TOLERANCE = 0.01


def printed(text: str) -> tuple[float, float]:
    """A count such as "13.0B" or "350M", and half a unit of its last significant digit."""
    number, scale = float(text[:-1]), {"M": 1e6, "B": 1e9}[text[-1]]
    decimals = len(text[:-1].partition(".")[2])
    trailing_zeros = 0 if decimals else len(re.search(r"0*$", text[:-1])[0])
    return number * scale, 0.5 * 10 ** (trailing_zeros - decimals) * scale


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count_is_the_published_one(name: str) -> None:
    count, rounding = printed(PRESETS[name].published_parameters)
    assert abs(num_parameters(PRESETS[name].model_config()) - count) <= rounding + RELATIVE_TOLERANCE * count


def test_released_weights_have_exactly_these_counts() -> None:
    released = {
        "gpt2-124m": 124_439_808,
        "gpt2-355m": 354_823_168,
        "gpt2-774m": 774_030_080,
        "gpt2-1.5b": 1_557_611_200,
        "llama2-7b": 6_738_415_616,
        "llama2-13b": 13_015_864_320,
        "llama2-70b": 68_976_648_192,
        "llama3-8b": 8_030_261_248,
        "llama3-70b": 70_553_706_496,
        "llama3-405b": 405_853_388_800,
        "llama3.1-8b": 8_030_261_248,
        "mistral-7b": 7_248_023_552,
        "qwen2.5-7b": 7_615_616_512,
        "qwen3-8b": 8_190_735_360,
        "mixtral-8x7b": 46_702_792_704,
        "qwen3-30b-a3b": 30_532_122_624,
        "olmoe-1b-7b": 6_919_161_856,
        "bert-base": 110_106_428,  # with both heads of pretraining
        "bert-large": 336_226_108,
    }
    assert {name: num_parameters(PRESETS[name].model_config()) for name in released} == released


@pytest.mark.parametrize(
    ("name", "published"), [("mixtral-8x7b", "12.9B"), ("qwen3-30b-a3b", "3.3B"), ("olmoe-1b-7b", "1.3B")]
)
def test_a_token_passes_as_many_parameters_as_their_authors_print(name: str, published: str) -> None:
    count, rounding = printed(published)
    found = num_active_parameters(PRESETS[name].model_config())
    assert abs(found - count) <= rounding + RELATIVE_TOLERANCE * count


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_needs_only_batch_rate_length_and_data(name: str) -> None:
    line = f"--preset {name} --micro-batch-size 1 --lr 1e-4 --train-iters 10 --mock-data"
    architecture = PRESETS[name].model.get("architecture", "gpt")
    config = parse_args(line.split(), program="t", description="t", log=print, architecture=architecture)
    assert check(config, 1) == []
    assert resolve_model(config.model) == PRESETS[name].model_config()


def test_all_sizes_of_gpt3_and_of_the_sc21_table_are_there() -> None:
    assert sum(name.startswith("gpt3-") for name in PRESETS) == 8
    assert sum(name.startswith("megatron-") and "bert" not in name for name in PRESETS) == 10


def test_both_sizes_of_bert_and_the_three_of_megatron_are_there() -> None:
    assert {name for name in PRESETS if "bert" in name} == {
        "bert-base",
        "bert-large",
        "megatron-bert-336m",
        "megatron-bert-1.3b",
        "megatron-bert-3.9b",
    }


@pytest.mark.parametrize(("name", "architecture"), [("bert-base", "gpt"), ("gpt2-124m", "bert")])
def test_a_preset_of_another_architecture_names_the_script_to_use(name: str, architecture: str) -> None:
    with pytest.raises(ConfigError, match=f"use pretrain_{PRESETS[name].model.get('architecture', 'gpt')}.py"):
        parse_args(["--preset", name], program="t", description="t", log=print, architecture=architecture)
