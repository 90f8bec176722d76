"""A DeepSpeed JSON file beside the flags: mapped where it says something, refused where it contradicts them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron3d.config.cli import read_command, settle
from megatron3d.config.foreign.deepspeed_file import read_deepspeed_file
from megatron3d.config.foreign.deepspeed_keys import DIRECT, REFUSED, SWITCHED_OFF, WITHOUT_EFFECT
from megatron3d.config.run import DraftRun
from megatron3d.config.serialize import to_dict
from megatron3d.errors import ConfigError

BASE = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --train-iters 5 --vocab-size 100 "
    "--mock-data"
)


def run_of(file: Path, content: Any, flags: str = "", *, world: int = 2, said: list[str] | None = None) -> DraftRun:
    """The resolved run of the base command with a file of this content."""
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    lines: list[str] = [] if said is None else said
    words = f"{BASE} --deepspeed --deepspeed_config {file} {flags}".split()
    return settle(read_command(words, program="pretrain_gpt.py", description="t", log=lines.append), world)


def _warmup(**params: Any) -> dict[str, Any]:
    return {"scheduler": {"type": "WarmupLR", "params": params}}


def _adam(**params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": "Adam", "params": params}}


def problems_of(
    file: Path, content: Any, flags: str = "--lr 1e-3 --micro-batch-size 2", *, world: int = 2
) -> list[str]:
    """What the command is refused with."""
    with pytest.raises(ConfigError) as raised:
        run_of(file, content, flags, world=world)
    return str(raised.value).split("\n")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "ds.json"


def test_batch_precision_zero_optimizer_and_schedule_arrive(file: Path) -> None:
    content = {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False, "loss_scale_window": 7},
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "nvme", "nvme_path": "/local", "pin_memory": True},
            "offload_param": {"device": "cpu", "nvme_path": "/elsewhere"},
            "overlap_comm": True,
        },
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 2e-4, "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.1},
        },
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"warmup_num_steps": 2, "total_num_steps": 5, "warmup_max_lr": 2e-4, "warmup_type": "linear"},
        },
    }
    run = run_of(file, content)
    assert (run.train.global_batch_size, run.train.micro_batch_size, run.train.gradient_accumulation_steps) == (
        16,
        4,
        2,
    )
    assert (run.optim.precision, run.optim.clip_grad, run.optim.loss_scale_window) == ("bf16", 0.5, 1000)
    parallel = run.parallel
    assert (parallel.zero_stage, parallel.offload_optimizer, parallel.offload_params) == (3, "nvme", "cpu")
    assert parallel.offload_dir == "/local"
    optim = run.optim
    assert (optim.optimizer, optim.lr, optim.adam_beta1, optim.adam_beta2) == ("adam", 2e-4, 0.8, 0.95)
    assert (optim.adam_eps, optim.weight_decay, optim.decoupled_weight_decay) == (1e-6, 0.1, True)
    assert (optim.lr_decay_style, optim.lr_warmup_iters, optim.lr_decay_iters) == ("linear", 2, 5)


def test_the_template_of_megatron_deepspeed_gives_dynamic_loss_scaling(file: Path) -> None:
    content = {
        "train_batch_size": 8,
        "steps_per_print": 10,
        "zero_optimization": {"stage": 1},
        "prescale_gradients": False,
        "fp16": {"enabled": True, "loss_scale": 0, "loss_scale_window": 500, "initial_scale_power": 11},
        "wall_clock_breakdown": False,
    }
    said: list[str] = []
    run = run_of(file, content, "--fp16 --zero-stage 1 --lr 1e-3 --micro-batch-size 2", said=said)
    assert (run.optim.loss_scale, run.optim.initial_loss_scale, run.optim.loss_scale_window) == (None, 2048.0, 500)
    assert sum("steps_per_print is accepted without effect" in line for line in said) == 1


def test_accumulation_steps_alone_set_the_global_batch(file: Path) -> None:
    content = {"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 4}
    assert run_of(file, content, "--lr 1e-3", world=2).train.global_batch_size == 24


def test_auto_leaves_the_option_to_the_flags(file: Path) -> None:
    content = {"train_batch_size": "auto", "zero_optimization": {"stage": "auto"}, "bf16": {"enabled": "auto"}}
    run = run_of(file, content, "--lr 1e-3 --micro-batch-size 2 --zero-stage 2 --bf16")
    assert (run.train.global_batch_size, run.parallel.zero_stage, run.optim.precision) == (4, 2, "bf16")


@pytest.mark.parametrize(
    ("content", "flags", "named"),
    [
        ({"train_batch_size": 8}, "--global-batch-size 4", ("train_batch_size", "= 8", "--global-batch-size is 4")),
        (
            {"zero_optimization": {"stage": 2}},
            "--zero-stage 1",
            ("zero_optimization.stage", "= 2", "--zero-stage is 1"),
        ),
        ({"gradient_clipping": 0}, "--clip-grad 1.0", ("gradient_clipping", "= 0", "--clip-grad is 1")),
        ({"fp16": {"enabled": False}}, "--fp16", ("fp16.enabled", "= false", "--fp16 is true")),
        ({"fp16": {"enabled": True}}, "--bf16", ("fp16.enabled", "= true", "--bf16 is given")),
        ({"zero_optimization": {"stage": 3}}, "--use-distributed-optimizer", ("= 3", "--use-distributed-optimizer")),
        ({"optimizer": {"type": "Lamb"}}, "--optimizer adam", ("optimizer.type", "= lamb", "--optimizer is adam")),
    ],
)
def test_a_contradiction_names_both_sides(file: Path, content: Any, flags: str, named: tuple[str, ...]) -> None:
    (problem,) = problems_of(file, content, f"--lr 1e-3 --micro-batch-size 2 {flags}")
    assert all(words in problem for words in (str(file), *named)), problem


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "holds a list"),
        ({"train_batchsize": 8}, "has the key train_batchsize, which is not known"),
        ({"zero_optimization": {"stages": 1}}, "has the key zero_optimization.stages, which is not known"),
        ({"zero_optimization": {"stage": 4}}, "--zero-stage 4 is not one of its choices"),
        ({"zero_optimization": 3}, 'zero_optimization is 3; write an object of keys, such as {"stage": ...}'),
        ({"fp16": None}, 'fp16 is null; write an object of keys, such as {"enabled": ...}'),
        ({"optimizer": {"type": "Adam", "params": [1]}}, "optimizer.params is [1]; write an object of keys"),
        ({"tensorboard": {"enabled": 2, "output_path": "t"}}, "tensorboard.enabled is 2; write true or false"),
        ({"train_batch_size": "many"}, "--global-batch-size many is not a number"),
        ({"optimizer": {"type": "OneBitAdam"}}, "optimizer.type = OneBitAdam, which is not supported"),
        ({"optimizer": {"type": "Adam", "params": {"betas": 0.9}}}, "optimizer.params.betas is 0.9; write two numbers"),
        ({"scheduler": {"type": "OneCycle"}}, "scheduler.type = OneCycle, which is not supported"),
        ({"scheduler": {"type": ["WarmupLR"]}}, "scheduler.type = ['WarmupLR'], which is not supported"),
        (_warmup(warmup_num_steps=3, warmup_max_lr=1e-3), "warmup_type out, which means log"),
        (_warmup(warmup_type="linear", warmup_max_lr=1e-3), "warmup_num_steps out, which means 1000"),
        (_warmup(warmup_type="linear", warmup_num_steps=3), "warmup_max_lr out, which means 0.001 or the optimizer's"),
        (_adam(bias_correction=False), "optimizer.params.bias_correction = false, which is not supported"),
        ({"optimizer": {"type": "AdamW", "params": {"adam_w_mode": False}}}, "which DeepSpeed ignores where"),
        ({"amp": {"enabled": True}}, "has amp = enabled, which is not supported"),
        ({"compile": {"enabled": True}}, "leave it out, and give --compile"),
        ({"curriculum_learning": {"enabled": True}}, "curriculum_learning.schedule_type is None, which is none of"),
        ({"communication_data_type": "bf16"}, "communication_data_type = bf16, which is not supported"),
        ({"fp16": {"enabled": True, "initial_scale_power": "x"}}, "write an exponent of 2"),
    ],
)
def test_what_cannot_be_read_or_done_is_refused_by_key(file: Path, content: Any, sentence: str) -> None:
    (problem,) = problems_of(file, content)
    assert sentence in problem and str(file) in problem, problem


def test_no_kind_of_value_of_any_key_ends_in_a_traceback(file: Path) -> None:
    keys = [
        *DIRECT,
        *REFUSED,
        *SWITCHED_OFF.split(),
        *(key for names in WITHOUT_EFFECT.values() for key in names.split()),
    ]
    keys += ["optimizer.type", "optimizer.params.betas", "scheduler.type", "scheduler.params.warmup_type"]
    keys += ["fp16.loss_scale", "fp16.initial_scale_power", "zero_optimization.cpu_offload", "wandb.enabled"]
    keys += sorted({".".join(key.split(".")[:-1]) for key in keys if "." in key})
    for value in (None, True, 3, -1, 1e300, float("nan"), "auto", "x", "", [], ["x"], {"x": {}}, [{}]):
        for key in keys:
            content: Any = {"enabled": True, "device": "nvme", "type": "Adam"} if "." in key else {}
            *path, last = key.split(".")
            content[last] = value
            for name in reversed(path):
                content = {name: content}
            file.write_text(json.dumps(content))
            found = read_deepspeed_file(str(file))
            assert found.contradictions("f", {}) == [] and found.settings({}) is not None
            assert all(isinstance(line, str) for line in [*found.problems, *found.lines_of_defaults("f", {})])


def test_a_number_is_the_same_however_it_is_written(file: Path) -> None:
    content = {"gradient_clipping": 1, "train_batch_size": 8.0, "train_micro_batch_size_per_gpu": 2} | _adam(lr=0.001)
    run = run_of(file, content, "--clip-grad 1.0 --lr 1e-3 --micro-batch-size 2 --global-batch-size 8 --adam-eps 1e-08")
    assert (run.train.global_batch_size, run.optim.clip_grad) == (8, 1.0)


def test_defaults_of_a_stored_run_do_not_contradict_the_file_and_its_choices_do(file: Path) -> None:
    stored = run_of(file, {}, "--lr 1e-3 --micro-batch-size 2 --seed 9")
    (run := file.with_name("run.json")).write_text(json.dumps(to_dict(stored)))
    content = {"zero_optimization": {"stage": 2}, "gradient_clipping": 0.5, "optimizer": {"type": "AdamW"}}
    said: list[str] = []
    changed = run_of(file, content, f"--config {run}", said=said)
    assert (changed.parallel.zero_stage, changed.optim.clip_grad, changed.data.seed) == (2, 0.5, 9)
    assert changed.optim.weight_decay == stored.optim.weight_decay == 0.01
    (problem,) = problems_of(file, {"train_micro_batch_size_per_gpu": 4}, f"--config {run}")
    assert problem.endswith("but --micro-batch-size is 2; make them equal, or leave one of them out.")
    (problem,) = problems_of(file, content, f"--config {run} --zero-stage 0")
    assert problem.endswith("but --zero-stage is 0; make them equal, or leave one of them out.")


def test_what_the_file_leaves_out_has_deepspeeds_default_and_is_reported(file: Path) -> None:
    said: list[str] = []
    flags = "--lr 1e-3 --micro-batch-size 2"
    content = {"optimizer": {"type": "Adam", "params": {"lr": 1e-3}}, "fp16": {"enabled": True}}
    optim = run_of(file, content, flags, said=said).optim
    assert (optim.weight_decay, optim.initial_loss_scale, optim.clip_grad) == (0.0, 2.0**16, 1.0)
    assert any("leaves optimizer.params.weight_decay out, so that --weight-decay is 0" in line for line in said)
    assert any("leaves fp16.initial_scale_power out" in line for line in said)
    assert any(
        "leaves gradient_clipping out, which means none to DeepSpeed; --clip-grad 1 holds" in line for line in said
    )
    said.clear()
    optim = run_of(file, content, f"{flags} --weight-decay 0.1 --initial-loss-scale 64 --clip-grad 2", said=said).optim
    assert (optim.weight_decay, optim.initial_loss_scale, optim.clip_grad) == (0.1, 64, 2.0)
    assert not [line for line in said if "leaves" in line]
    assert run_of(file, _adam(weight_decay="auto"), flags).optim.weight_decay == 0.01
    assert run_of(file, _adam(torch_adam=True), flags).optim.weight_decay == 0.01
    assert run_of(file, {"optimizer": {"type": "Lion", "params": {}}}, flags).optim.adam_beta2 == 0.99
    assert run_of(file, _adam(adamw_mode=False), flags).optim.decoupled_weight_decay is False
    assert run_of(file, {"zero_optimization": {"stage": 1}}, flags).optim.weight_decay == 0.01


def test_trackers_of_the_file_are_used_or_reported(file: Path) -> None:
    said: list[str] = []
    content: dict[str, Any] = {"tensorboard": {"enabled": True, "output_path": "t"}, "wandb": {"enabled": True}}
    run = run_of(file, content, "--lr 1e-3 --micro-batch-size 2", said=said)
    assert run.train.tensorboard_dir == "t"
    assert not any("tensorboard.enabled" in line for line in said)
    assert any(
        "wandb.enabled is without effect: there is no project; give it, or --wandb-project" in line for line in said
    )


def test_a_missing_file_is_an_error_beside_the_others(tmp_path: Path) -> None:
    words = f"{BASE} --deepspeed_config {tmp_path}/none.json --bf16 --fp16".split()
    with pytest.raises(ConfigError) as raised:
        settle(read_command(words, program="pretrain_gpt.py", description="t", log=lambda line: None), 1)
    missing, precision = str(raised.value).split("\n")  # --lr and the batch may be in the file
    assert "none.json cannot be read (No such file or directory)" in missing
    assert precision.startswith("--bf16 and --fp16")


def test_hugging_faces_spelling_with_the_file_behind_the_switch_works(file: Path) -> None:
    file.write_text(json.dumps({"train_micro_batch_size_per_gpu": 3}))
    words = f"{BASE} --lr 1e-3 --deepspeed {file}".split()
    command = read_command(words, program="pretrain_gpt.py", description="t", log=lambda line: None)
    assert settle(command, 1).train.micro_batch_size == 3
