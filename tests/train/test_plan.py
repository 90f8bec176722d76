"""From options to a pipeline plan: stages per rank, orders by default and by choice, splits written and by cost."""

from __future__ import annotations

import pytest

from megatron3d.config.check import resolve
from megatron3d.config.cli import parse_args
from megatron3d.config.run import RunConfig
from megatron3d.config.sections.parallel import PIPELINE_SCHEDULES
from megatron3d.errors import ConfigError, ScheduleError
from megatron3d.pipeline.orders.named import ORDERS
from megatron3d.pipeline.simulate import simulate
from megatron3d.planner.ledger import ledger_of, worst
from megatron3d.planner.stage_records import StageRecords
from megatron3d.train.plan import GIB, plan_of

MODEL = (
    "--num-layers 16 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --vocab-size 512 --micro-batch-size 1 "
    "--global-batch-size 8 --train-iters 10 --lr 1e-3 --mock-data --device cpu --pipeline-model-parallel-size 4"
)


def config_of(options: str, *, model: str = MODEL) -> RunConfig:
    """A resolved run on four ranks."""
    return resolve(parse_args(f"{model} {options}".split(), program="test", description="test"), 4)


def test_every_order_that_trains_is_an_option_and_the_other_way_round() -> None:
    assert set(PIPELINE_SCHEDULES) == {*ORDERS, "auto"} - {"forward-only"}


@pytest.mark.parametrize(
    ("options", "order", "virtual"),
    [
        ("", "1f1b", 1),
        ("--num-layers-per-virtual-pipeline-stage 2", "interleaved", 2),
        ("--num-layers-per-virtual-pipeline-stage 4", "1f1b", 1),
        ("--num-virtual-stages-per-pipeline-rank 4", "interleaved", 4),
        ("--virtual-pipeline-model-parallel-size 2", "interleaved", 2),
        ("--pipeline-schedule zb-v", "zb-v", 2),
        ("--pipeline-schedule dualpipe-v --num-layers-per-virtual-pipeline-stage 2", "dualpipe-v", 2),
        ("--pipeline-model-parallel-layout Et|t*4|(tt|)*5tL", "interleaved", 2),
        ("--pipeline-model-parallel-layout Et|t*7|t*4|t*4L", "1f1b", 1),
    ],
)
def test_options_say_the_order_and_the_stages_of_a_rank(options: str, order: str, virtual: int) -> None:
    plan = plan_of(config_of(options))
    assert (plan.order, plan.virtual, plan.num_stages) == (order, virtual, 4 * virtual)
    assert [layer for layers in plan.layers for layer in layers] == list(range(16))
    assert plan.training(8).stage_to_rank == plan.forward_only(3).stage_to_rank == plan.stage_to_rank
    held = [plan.stages_of(rank) for rank in range(4)]
    assert sorted(stage for stages in held for stage in stages) == list(range(4 * virtual))


def test_a_head_with_a_large_vocabulary_takes_layers_off_the_last_stage() -> None:
    even = plan_of(config_of("--vocab-size 8192"))
    by_cost = plan_of(config_of("--vocab-size 8192 --pipeline-split-costs formula"))
    assert len(by_cost.layers[-1]) < len(even.layers[-1]) == 4
    costs = "0," + "1," * 15 + "9,0"
    assert [len(layers) for layers in plan_of(config_of(f"--pipeline-split-costs {costs}")).layers] == [5, 5, 5, 1]


def test_auto_takes_the_shortest_order_of_all_that_fit() -> None:
    config = config_of("--pipeline-schedule auto")
    plan = plan_of(config)
    assert plan.virtual == 4 or plan.order in ("zb-v", "dualpipe-v")
    assert "the shortest of" in plan.why
    span = simulate(plan.training(8)).span / plan.virtual
    others = [config_of(f"--pipeline-schedule {name}") for name in ("gpipe", "1f1b", "zb-h1", "zb-v")]
    for other in map(plan_of, others):
        assert span <= simulate(other.training(8)).span / other.virtual


@pytest.mark.heavy
def test_auto_under_a_memory_limit_takes_what_fits() -> None:
    large = MODEL.replace("--seq-length 64", "--seq-length 512").replace("--micro-batch-size 1", "--micro-batch-size 2")
    large = large.replace("--global-batch-size 8", "--global-batch-size 64")
    peaks = {}
    for order in ("gpipe", "1f1b"):
        config = config_of(f"--pipeline-schedule {order}", model=large)
        peaks[order] = worst(ledger_of(StageRecords(config, "cpu"), plan_of(config))).peak / GIB
    assert peaks["1f1b"] < 0.6 * peaks["gpipe"]
    limit = 1.05 * peaks["1f1b"]
    config = config_of(f"--pipeline-schedule auto --pipeline-memory-limit-gb {limit}", model=large)
    tight = plan_of(config)
    assert "over the memory limit" in tight.why
    assert worst(ledger_of(StageRecords(config, "cpu"), tight)).peak / GIB <= limit
    with pytest.raises(ScheduleError, match="fits the memory limit"):
        plan_of(config_of("--pipeline-schedule auto --pipeline-memory-limit-gb 0.001", model=large))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--pipeline-schedule zb-h1 --num-virtual-stages-per-pipeline-rank 2", "one stage per rank"),
        ("--pipeline-schedule zb-v --num-virtual-stages-per-pipeline-rank 4", "2 stages per rank"),
        ("--pipeline-model-parallel-layout Et|t|t|tL", "4"),
        ("--pipeline-split-costs 1,2,3", "18 numbers"),
        ("--pipeline-schedule nowhere:order", "nowhere"),
    ],
)
def test_what_cannot_be_planned_is_a_sentence(options: str, words: str) -> None:
    with pytest.raises((ConfigError, ScheduleError), match=words):
        plan_of(config_of(options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--pipeline-schedule zb-h7", "is not known"),
        ("--num-layers-per-virtual-pipeline-stage 3", "multiple of 4 x 3"),
        ("--num-layers-per-virtual-pipeline-stage 2 --num-virtual-stages-per-pipeline-rank 2", "give only one"),
        ("--pipeline-memory-limit-gb 4", "--pipeline-schedule auto"),
        ("--pipeline-schedule gpipe --microbatch-group-size-per-virtual-pipeline-stage 4", "interleaved"),
        ("--pipeline-split-costs formula --decoder-first-pipeline-num-layers 2", "both say"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config_of(options)
