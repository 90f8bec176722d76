"""Which options of the optimizer go together, and that Megatron-LM's flags mean here what they mean there."""

from __future__ import annotations

import shlex

import pytest
import torch
from torch import nn

from megatron3d.config.check import check
from megatron3d.config.cli import parse_args
from megatron3d.config.run import GivenRun
from megatron3d.config.sections.optim import OptimConfig
from megatron3d.errors import ConfigError
from megatron3d.optim.build import build_optimizer, kind

RUN = """--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --micro-batch-size 2 --train-iters 10
--lr 1e-3 --mock-data --vocab-size 64 """


def run_of(options: str, said: list[str] | None = None) -> GivenRun:
    lines: list[str] = [] if said is None else said
    return parse_args(shlex.split(RUN + options), program="pretrain_gpt.py", description="", log=lines.append)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--optimizer adamw --no-decoupled-weight-decay", "and --optimizer adamw does not; use --optimizer adam"),
        ("--optimizer lion --no-decoupled-weight-decay", "and --optimizer lion does not"),
        ("--optimizer sgd --exp-avg-dtype bf16", "--exp-avg-dtype bf16 concerns a moment that --optimizer sgd"),
        ("--optimizer adafactor --exp-avg-sq-dtype bf16", "moment that --optimizer adafactor does not keep"),
        ("--optimizer lion --exp-avg-sq-dtype bf16", "use one of adam, adamw, lamb"),
        ("--optimizer muon --muon-scalar-optimizer lion --exp-avg-sq-dtype bf16", "--optimizer muon does not keep"),
        ("--optimizer-implementation apex --exp-avg-dtype bf16", "is not for apex, whose moments are fp32"),
        ("--optimizer-implementation apex --optimizer lamb", "is an Adam, and --optimizer is lamb"),
        ("--optimizer-implementation transformer-engine --device cpu", "runs on GPUs only, and --device is cpu"),
        ("--lion-beta1 1.0", "--lion-beta1 1.0 is outside its range"),
        ("--muon-momentum -0.1", "--muon-momentum -0.1 is outside its range"),
        ("--muon-num-ns-steps 0", "--muon-num-ns-steps 0 is outside its range"),
        ("--muon-extra-scale-factor 0", "--muon-extra-scale-factor 0.0 is outside its range"),
    ],
)
def test_a_problem_is_named_with_its_fix(options: str, expected: str) -> None:
    problems = check(run_of(options), 1)
    assert any(expected in problem for problem in problems), problems


@pytest.mark.parametrize(
    "options",
    [
        "--optimizer adam --no-decoupled-weight-decay --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16",
        "--optimizer lamb --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16",
        "--optimizer muon --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16 --fp16",
        "--optimizer muon --muon-scalar-optimizer lion --exp-avg-dtype bf16",
        "--optimizer adafactor --use-distributed-optimizer",
        "--optimizer-implementation transformer-engine --exp-avg-dtype bf16",
    ],
)
def test_what_goes_together_is_taken(options: str) -> None:
    assert check(run_of(options), 1) == []


def test_flags_of_megatron_arrive() -> None:
    said: list[str] = []
    optim = run_of(
        """--optimizer muon --muon-momentum 0.95 --muon-use-nesterov --muon-no-split-qkv --muon-scale-mode shape_scaling
        --muon-coefficient-type simple --muon-num-ns-steps 6 --muon-fp32-matmul-prec medium --muon-tp-mode duplicated
        --muon-extra-scale-factor 0.2 --muon-scalar-optimizer lion --lion-beta1 0.9 --lion-beta2 0.99
        --use-precision-aware-optimizer --exp-avg-dtype bf16""",
        said,
    ).optim
    assert (optim.optimizer, optim.muon_momentum, optim.muon_nesterov, optim.muon_split_qkv) == (
        "muon",
        0.95,
        True,
        False,
    )
    assert (optim.muon_scale_mode, optim.muon_coefficient_type, optim.muon_num_ns_steps) == (
        "shape_scaling",
        "simple",
        6,
    )
    assert (optim.muon_fp32_matmul_prec, optim.muon_extra_scale_factor) == ("medium", 0.2)
    assert (optim.muon_scalar_optimizer, optim.lion_beta1, optim.lion_beta2) == ("lion", 0.9, 0.99)
    assert optim.exp_avg_dtype == "bf16"
    assert [line.split()[0] for line in said] == ["--muon-tp-mode", "--use-precision-aware-optimizer"]


def test_a_muon_that_depends_on_the_layout_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--muon-tp-mode blockwise is not supported: Muon orthogonalises whole"):
        run_of("--optimizer muon --muon-tp-mode blockwise")


def test_checkpoints_of_adam_and_adamw_are_one_kind_and_muons_differ_by_what_is_beside_them() -> None:
    configs = [OptimConfig(lr=1e-3, optimizer=name) for name in ("adam", "adamw", "muon", "lion", "lamb")]
    assert [kind(config) for config in configs] == ["adam", "adam", "muon", "lion", "lamb"]
    assert kind(OptimConfig(lr=1e-3, optimizer="muon", muon_scalar_optimizer="lion")) == "muon with lion"


@pytest.mark.parametrize("optimizer", ["lamb", "adafactor", "muon"])
def test_an_optimizer_of_whole_parameters_is_not_built_without_them(optimizer: str) -> None:
    with pytest.raises(ConfigError, match=rf"--optimizer {optimizer} needs to know whole parameters"):
        build_optimizer(OptimConfig(lr=1e-3, optimizer=optimizer), [(nn.Parameter(torch.ones(3)), True)])
