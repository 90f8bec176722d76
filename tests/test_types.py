"""The types of the package, as its users see them: pyright finds no error, and a resolved run keeps its promises."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from megatron3d.comm.layout import Layout
from megatron3d.config.check import checked, resolve
from megatron3d.config.cli import parse_args
from megatron3d.config.field_types import wanted_type
from megatron3d.config.options import SECTIONS
from megatron3d.config.presets import PRESETS
from megatron3d.config.run import RunConfig
from megatron3d.errors import ConfigError
from tests.parity.runs import BERTS, MODELS, Case, config_of

ROOT = Path(__file__).resolve().parents[1]
SHAPE = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 2 --lr 1e-3"
LENGTH = "--train-iters 10 --vocab-size 100 --mock-data"


@pytest.mark.heavy
def test_pyright_finds_no_error_in_the_package_and_its_programs() -> None:
    pytest.importorskip("pyright", reason="pyright is not installed: pip install -e '.[test]'")
    if not version("torch").startswith("2.13"):
        pytest.skip(f"types are those of torch 2.13, and this is {version('torch')}")
    ran = subprocess.run(
        [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    report = json.loads(ran.stdout)
    assert report["summary"]["filesAnalyzed"] > 340
    found = [
        f"{one['file']}:{one['range']['start']['line'] + 1}: {one['message']}" for one in report["generalDiagnostics"]
    ]
    assert found == []


# What None means in each field of a resolved run that may be None; the others never are.
MEANING_OF_NONE = {
    "parallel": {
        "expert_tensor_parallel_size": "as many ranks as share each layer",
        "pipeline_schedule": "a written layout stands instead, whose stages say which order it needs",
        "num_layers_per_virtual_pipeline_stage": "the stages of a rank are not counted by their layers",
        "num_virtual_stages_per_pipeline_rank": "the stages of a rank are not given as a number",
        "microbatch_group_size_per_virtual_pipeline_stage": "as many micro-batches as pipeline ranks",
        "pipeline_model_parallel_layout": "layers are not assigned to stages one by one",
        "pipeline_split_costs": "layers are split evenly, not by cost",
        "pipeline_memory_limit_gb": "the automatic schedule knows no limit",
        "decoder_first_pipeline_num_layers": "the first stage is not fixed",
        "decoder_last_pipeline_num_layers": "the last stage is not fixed",
        "cp_cut": "the model and its documents choose `context_cut`",
        "zero_shard_size": "state is sharded over all data-parallel ranks",
        "offload_dir": "no files",
        "device": "cuda where there is one, else cpu, on each machine for itself",
        "virtual_stages": "no number gives it: one, or what the layout or schedule needs",
    },
    "train": {
        "gradient_accumulation_steps": "the global batch size is given otherwise",
        "step_batch_size_schedule": "the batch does not grow by tokens",
        "train_iters": "the length is in samples",
        "train_samples": "the length is in iterations",
        "train_tokens": "the length is not in tokens",
        "loss_chunk_size": "the logits of all positions are there at once",
        "exit_interval": "no stop at a step",
        "exit_duration_in_mins": "no stop after a time",
        "tensorboard_dir": "no events",
        "metrics_file": "no file",
        "check_weight_hash_across_dp_replicas_interval": "only before a save",
        "recompute_granularity": "nothing is recomputed",
        "recompute_method": "whole layers are not recomputed",
        "recompute_num_layers": "whole layers are not recomputed",
        "peak_tflops": "that of the device, if it is known",
        "profile_pipeline": "no picture",
        "fp8_format": "linear layers compute in the precision of the run",
        "random_ltd_min": "no layer drops tokens",
        "random_ltd_max": "no layer drops tokens, or --seq-length",
        "random_ltd_steps": "no layer drops tokens",
        "random_ltd_router": "positions are drawn at random",
    },
    "lengths": {
        "seq_length_curriculum": "all samples have --seq-length",
        "seq_length_curriculum_min_difficulty": "lengths are not rising from a first one",
        "seq_length_curriculum_max_difficulty": "--seq-length",
        "seq_length_curriculum_steps": "lengths do not rise by a number of steps",
    },
    "model": {
        "rotary_scaling_factor": "frequencies are not scaled",
        "rotary_seq_len_interpolation_factor": "positions are not interpolated, or by --rotary-scaling",
        "rotary_original_max_position_embeddings": "no such length is needed",
        "rotary_attention_factor": "by --mscale and --mscale-all-dim",
        "num_experts": "a dense model",
        "moe_ffn_hidden_size": "that of dense layers",
        "moe_router_num_groups": "experts are chosen of all",
        "moe_router_group_topk": "experts are chosen of all",
        "moe_router_topk_scaling_factor": "weights as they are",
        "moe_expert_capacity_factor": "no token is dropped",
        "moe_shared_expert_intermediate_size": "no expert that all tokens pass",
    },
    "optim": {
        "lr_decay_iters": "the length is in samples",
        "lr_decay_samples": "the length is in iterations",
        "lr_decay_tokens": "not given in tokens",
        "lr_warmup_tokens": "not given in tokens",
        "lr_warmup_fraction": "the warm-up is a number of iterations or samples",
        "lr_wsd_decay_iters": "no such phase, or in samples",
        "lr_wsd_decay_samples": "no such phase, or in iterations",
        "start_weight_decay": "the decay is constant",
        "end_weight_decay": "the decay is constant",
        "loss_scale": "dynamic",
    },
    "data": {
        "data_args_path": "no such file",
        "tokenizer_type": "no tokenizer: the data is mock or the size of the vocabulary is given",
        "tokenizer_model": "not a file of the tokenizer",
        "vocab_file": "not a file of the tokenizer",
        "merge_file": "not a file of the tokenizer",
        "eod_token": "documents have no end",
        "fim_eod_token": "the end-of-document token",
        "fim_fragment_rate": "that of whole documents",
        "fim_no_prefix": "no text is left as it is by how it begins",
        "fim_split_sample": "documents have no fragments",
        "sample_order_samples": "those of the run",
    },
    "curriculum": {
        "curriculum_seed": "--seed",
        "curriculum_warmup_fraction": "given in steps, or no warm-up",
        "curriculum_warmup_steps": "no warm-up",
    },
    "checkpoint": {
        "save": "nothing is saved",
        "load": "only --save is looked into",
        "pretrained_checkpoint": "no weights to start from",
        "save_interval": "only at the end",
        "keep_last": "all, or 1 with --save-retain-interval",
        "save_retain_interval": "none is kept for ever",
        "ckpt_step": "the latest",
    },
}


def test_every_field_of_a_resolved_run_that_may_be_none_says_what_that_means() -> None:
    may_be_none = {
        section: {field.name for field in dataclasses.fields(kind) if "None" in str(field.type)}
        for section, kind in SECTIONS.items()
    }
    assert may_be_none == {section: set(MEANING_OF_NONE.get(section, ())) for section in SECTIONS}


def untrue_types(run: RunConfig) -> list[str]:
    """The fields of a run whose values are not of the declared type."""
    sections = {field.name: getattr(run, field.name) for field in dataclasses.fields(run) if field.name in SECTIONS}
    assert {name: type(section) for name, section in sections.items()} == dict(SECTIONS)
    wanted = {
        f"{name}.{field.name}": wanted_type(field, getattr(section, field.name))
        for name, section in sections.items()
        for field in dataclasses.fields(section)
    }
    return [f"{name} is not {kind}" for name, kind in wanted.items() if kind is not None]


@pytest.mark.parametrize(
    ("options", "architecture", "world_size"),
    [
        ("", "gpt", 1),
        ("", "bert", 2),
        ("--swiglu --group-query-attention --num-query-groups 2 --tensor-model-parallel-size 2", "gpt", 4),
        ("--pipeline-model-parallel-layout Ett|ttL --pipeline-model-parallel-size 2", "gpt", 2),
        ("--step-batch-size-schedule 0:4,1K:8", "gpt", 1),
    ],
)
def test_values_of_a_resolved_run_are_of_their_types(options: str, architecture: str, world_size: int) -> None:
    words = f"{SHAPE} {LENGTH} {options}".split()
    assert (
        untrue_types(resolve(parse_args(words, program="t", description="t", architecture=architecture), world_size))
        == []
    )


def test_values_of_every_resolved_preset_are_of_their_types() -> None:
    for name, preset in PRESETS.items():
        words = f"--preset {name} --micro-batch-size 1 --lr 1e-4 --train-samples 10 --mock-data".split()
        architecture = preset.model_config().architecture
        given = parse_args(words, program="t", description="t", log=print, architecture=architecture)
        assert untrue_types(resolve(given, 1)) == [], name


@pytest.mark.parametrize("options", ["--sequence-parallel", "--pipeline-schedule zb-v", "--zero-stage 3 --bf16"])
def test_values_of_the_runs_of_the_parity_table_are_of_their_types(options: str) -> None:
    for model in (*MODELS, *BERTS):
        assert untrue_types(config_of(Case(model, Layout(tp=2, pp=2), options))) == [], model


def test_a_run_without_a_size_is_not_resolved() -> None:
    words = f"{SHAPE} --train-iters 10 --mock-data --tokenizer-type ByteTokenizer".split()
    given = parse_args(words, program="t", description="t")
    assert checked(given, 1).model.vocab_size is None
    with pytest.raises(ConfigError, match="--vocab-size"):
        resolve(given, 1)


def test_both_packages_ship_the_mark_that_their_types_are_to_be_read() -> None:
    for package in ("megatron3d", "kernels/megatron3d_kernels"):
        assert (ROOT / package / "py.typed").is_file()
    assert '["py.typed"]' in (ROOT / "setup.py").read_text()
