"""DeepSpeed's data-efficiency JSON: the example of its documentation as it stands, and what cannot be taken over."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from megatron3d.config.cli import read_command, settle
from megatron3d.config.curriculum import plan_of
from megatron3d.config.run import DraftRun
from megatron3d.errors import ConfigError

BASE = (
    "--num-layers 24 --hidden-size 64 --num-attention-heads 4 --seq-length 2048 --train-iters 200000 --vocab-size 100 "
    "--data-path d --lr 1e-3 --micro-batch-size 2"
)
METRIC = {
    "index_to_sample_path": "/path/to/index_to_sample",
    "index_to_metric_path": "/path/to/index_to_metric",
    "difficulty_type": "percentile",
    "clustering_type": "schedule_based",
    "min_difficulty": 1,
    "max_difficulty": 100,
    "schedule_type": "fixed_root",
    "schedule_config": {"total_curriculum_step": 110000, "difficulty_step": 1, "root_degree": 2},
}
# The example of https://www.deepspeed.ai/docs/config-json/#data-efficiency.
DOCUMENTED: dict[str, Any] = {
    "enabled": True,
    "seed": 1234,
    "data_routing": {
        "enabled": True,
        "random_ltd": {
            "enabled": True,
            "total_layer_num": 24,
            "random_ltd_layer_num": 22,
            "random_ltd_layer_id": list(range(1, 23)),
            "model_mask_name": "attention_mask",
            "model_type": "decoder",
            "hidden_state_order": "seq_batch_dim",
            "random_ltd_schedule": {
                "min_value": 128,
                "max_value": 2048,
                "schedule_type": "fixed_linear",
                "schedule_config": {"require_steps": 200000, "seq_per_step": 16},
            },
        },
    },
    "data_sampling": {
        "enabled": True,
        "num_epochs": 1,
        "num_workers": 0,
        "curriculum_learning": {
            "enabled": True,
            "data_cluster_path": "/path/to/data_clusters",
            "curriculum_metrics": {"vocabularyrarity": METRIC},
        },
    },
}


def with_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """The example with other metrics, and without the other half."""
    changed = copy.deepcopy(DOCUMENTED)
    changed["data_sampling"]["curriculum_learning"]["curriculum_metrics"] = metrics
    del changed["data_routing"]
    return {"data_efficiency": changed}


def run_of(tmp_path: Path, content: dict[str, Any], flags: str = "") -> DraftRun:
    (file := tmp_path / "ds.json").write_text(json.dumps(content))
    words = f"{BASE} --deepspeed_config {file} {flags}".split()
    return settle(read_command(words, program="p", description="d", log=lambda line: None), 1)


def test_the_documented_example_is_taken_over_as_it_is(tmp_path: Path) -> None:
    run = run_of(tmp_path, {"data_efficiency": DOCUMENTED}, "--data-efficiency-curriculum-learning --random-ltd")
    curriculum, train = run.curriculum, run.train
    assert curriculum.curriculum_metric == ("vocabularyrarity",) and curriculum.curriculum_seed == 1234
    assert curriculum.curriculum_deepspeed_index == ("/path/to/index_to_sample", "/path/to/index_to_metric")
    (bound,) = plan_of(curriculum).bounds
    pacing = bound.pacing
    assert bound.difficulty_type == "percentile"
    assert (pacing.kind, pacing.minimum, pacing.maximum, pacing.total_steps) == ("fixed_root", 1, 100, 110000)
    assert (pacing.difficulty_step, pacing.root_degree) == (1, 2)
    assert train.random_ltd and (train.random_ltd_min, train.random_ltd_max) == (128, 2048)
    assert (train.random_ltd_steps, train.random_ltd_step_size) == (200000, 16)
    assert train.random_ltd_layers == tuple(map(str, range(1, 23)))


def test_metrics_with_different_schedules_keep_their_own(tmp_path: Path) -> None:
    discrete = {
        **METRIC,
        "difficulty_type": "value",
        "schedule_type": "fixed_discrete",
        "schedule_config": {"difficulty": [3, 5, 9], "max_step": [10, 20]},
    }
    run = run_of(tmp_path, with_metrics({"a": METRIC, "b": discrete}))
    first, second = plan_of(run.curriculum).bounds
    assert (first.metric, first.pacing.kind, first.pacing.total_steps) == ("a", "fixed_root", 110000)
    assert (second.metric, second.difficulty_type, second.pacing.kind) == ("b", "value", "fixed_discrete")
    assert (second.pacing.difficulties, second.pacing.last_steps) == ((3, 5, 9), (10, 20))


def test_metrics_of_one_cluster_and_the_older_form_shorten_the_sequences(tmp_path: Path) -> None:
    schedule = {"total_curriculum_step": 500, "difficulty_step": 8}
    seqlen = {
        "min_difficulty": 64,
        "max_difficulty": 2048,
        "schedule_type": "fixed_linear",
        "schedule_config": schedule,
    }
    for content, how in (
        ({"curriculum_learning": {"enabled": True, "curriculum_type": "seqlen", **seqlen}}, "truncate"),
        (with_metrics({"seqlen_truncate": {"clustering_type": "single_cluster", **seqlen}}), "truncate"),
        (with_metrics({"seqlen_reshape": {"clustering_type": "single_cluster", **seqlen}}), "reshape"),
    ):
        run = run_of(tmp_path, content)
        pacing = run.lengths.pacing_options(2048)
        assert run.lengths.seq_length_curriculum == how and not run.curriculum.curriculum_metric
        assert (pacing.kind, pacing.minimum, pacing.maximum) == ("fixed_linear", 64, 2048)
        assert (pacing.total_steps, pacing.difficulty_step) == (500, 8)


def test_what_is_switched_off_sets_nothing(tmp_path: Path) -> None:
    run = run_of(tmp_path, {"data_efficiency": {**DOCUMENTED, "enabled": False}, "curriculum_learning": {"a": 1}})
    assert not run.curriculum.curriculum_metric and not run.train.random_ltd


BAD: dict[str, dict[str, Any]] = {
    "vocab lacks root_degree, which fixed_root needs": with_metrics(
        {"vocab": {**METRIC, "schedule_config": {"total_curriculum_step": 5, "difficulty_step": 1}}}
    ),
    "schedule_type is 'custom', which is none of fixed_linear": with_metrics(
        {"v": {**METRIC, "schedule_type": "custom"}}
    ),
    "max_difficulty is 50, and the percentile of all samples is 100": with_metrics(
        {"v": {**METRIC, "max_difficulty": 50}}
    ),
    "has the key difficulty_tpye, which is not known": with_metrics({"v": {**METRIC, "difficulty_tpye": "value"}}),
    "curriculum_metrics has no metric; name at least one": with_metrics({}),
    "dynamic_batching.enabled is true, but every batch has": {
        "data_efficiency": {"enabled": True, "data_sampling": {"enabled": True, "dynamic_batching": {"enabled": True}}}
    },
    "data_efficiency is 3; write an object with enabled": {"data_efficiency": 3},
    "data_efficiency.enabled is 'true'; write true or false": {"data_efficiency": {**DOCUMENTED, "enabled": "true"}},
    "data_efficiency.data_routing.enabled is 1; write true or false": {
        "data_efficiency": {**DOCUMENTED, "data_routing": {**DOCUMENTED["data_routing"], "enabled": 1}}
    },
    "curriculum_learning.enabled is 1; write true or false": {"curriculum_learning": {"enabled": 1}},
    "curriculum_learning.curriculum_type is 'voc'; it can be seqlen alone": {
        "curriculum_learning": {"enabled": True, "curriculum_type": "voc"}
    },
}


@pytest.mark.parametrize("sentence", BAD)
def test_what_cannot_be_taken_over_is_named(tmp_path: Path, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run_of(tmp_path, BAD[sentence])
    assert sentence in str(caught.value)
