"""The options of fp8: what is refused and in which words, and which layers they are for."""

from __future__ import annotations

import pytest

from megatron3d.config.check import check
from megatron3d.config.cli import parse_args
from megatron3d.config.sections.fp8 import GivenFp8

BASE = (
    "--num-layers 4 --hidden-size 256 --num-attention-heads 4 --ffn-hidden-size 512 --seq-length 16 --vocab-size 100 "
    "--micro-batch-size 1 --train-iters 2 --lr 1e-3 --mock-data --device cpu"
)
FP8 = "--bf16 --fp8-format hybrid"


def problems_of(options: str, world_size: int = 1) -> list[str]:
    argv = f"{BASE} {options}".split()
    return check(parse_args(argv, program="p", description="d", log=lambda line: None), world_size)


@pytest.mark.parametrize(
    "options",
    [
        FP8,
        "--bf16 --fp8-format e4m3 --fp8-recipe blockwise --tensor-model-parallel-size 2",
        f"{FP8} --no-fp8-wgrad --first-last-layers-bf16 --num-layers-at-end-in-bf16 2",
    ],
)
def test_recipes_are_accepted(options: str) -> None:
    assert problems_of(options, 2 if "parallel" in options else 1) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--fp8-format hybrid", ("--fp8-format hybrid", "fp32", "give --bf16")),
        ("--fp16 --fp8-format e4m3", ("--fp8-format e4m3", "fp16", "give --bf16")),
        (f"{FP8} --fp8-recipe delayed", ("--fp8-recipe delayed", "state of the run", "tensorwise or blockwise")),
        (f"{FP8} --fp8-recipe mxfp8", ("--fp8-recipe mxfp8", "Blackwell", "tensorwise or blockwise")),
        (f"{FP8} --fp8-recipe blocks", ("--fp8-recipe blocks", "not known", "tensorwise or blockwise")),
        ("--fp8-recipe blockwise", ("--fp8-recipe blockwise", "give --fp8-format")),
        ("--no-fp8-wgrad", ("--no-fp8-wgrad is", "give --fp8-format")),
        (f"{FP8} --num-layers-at-start-in-bf16 2", ("--num-layers-at-start-in-bf16 2", "--first-last-layers-bf16")),
        (
            f"{FP8} --first-last-layers-bf16 --num-layers-at-start-in-bf16 3",
            ("keeps 3 + 1 layers", "--num-layers is 4", "keep fewer"),
        ),
        (
            f"{FP8} --first-last-layers-bf16 --num-layers-at-start-in-bf16 0 --num-layers-at-end-in-bf16 0",
            ("--first-last-layers-bf16 keeps no layer", "leave it out"),
        ),
        (
            f"{FP8} --first-last-layers-bf16 --num-layers-at-start-in-bf16 -1",
            ("--num-layers-at-start-in-bf16 -1", "at least 0"),
        ),
        (
            f"{FP8} --first-last-layers-bf16 --num-layers-at-end-in-bf16 -9",
            ("--num-layers-at-end-in-bf16 -9", "at least 0"),
        ),
        (f"{FP8} --ffn-hidden-size 520", ("--ffn-hidden-size 520", "multiple of 16", "use another size")),
        (
            f"{FP8} --fp8-recipe blockwise --tensor-model-parallel-size 4",
            ("x --kv-channels 256 over --tensor-model-parallel-size 4", "multiple of 512"),
        ),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(options: str, words: tuple[str, ...]) -> None:
    problems = problems_of(options, 4 if "parallel" in options else 1)
    assert any(all(word in problem for word in words) for problem in problems), problems


def test_the_first_and_last_layers_stay_in_bf16_where_that_is_asked_for() -> None:
    def layers(**options: object) -> list[int]:
        fp8 = GivenFp8(**options)  # type: ignore[arg-type]
        return [layer for layer in range(6) if fp8.has_fp8(layer, 6)]

    assert layers() == []
    assert layers(fp8_format="e4m3") == [0, 1, 2, 3, 4, 5]
    assert layers(fp8_format="e4m3", first_last_layers_bf16=True) == [1, 2, 3, 4]
    assert layers(fp8_format="hybrid", first_last_layers_bf16=True, num_layers_at_end_in_bf16=3) == [1, 2]
