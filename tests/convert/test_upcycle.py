"""A dense model becomes a mixture of experts that computes the same, at any layout, and trains on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron3d.checkpoint.directory import find_checkpoint
from megatron3d.checkpoint.load import assemble, read_document
from megatron3d.comm.launch import Launch
from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.config.check import resolve
from megatron3d.config.cli import parse_args
from megatron3d.config.serialize import from_dict
from megatron3d.convert.export import export_model
from megatron3d.convert.hf import read_model, save_model
from megatron3d.convert.upcycle import upcycle, upcycled_model
from megatron3d.data.loader import GlobalBatches
from megatron3d.errors import ConfigError
from megatron3d.models.gpt import build_gpt_stage
from megatron3d.train import state
from megatron3d.train.launch import RunContext
from megatron3d.train.setup import TrainingSetup, build_parts
from megatron3d.train.step import train_step
from tests.convert.ours import Batch, said
from tests.convert.theirs import POSITIONS, VOCAB, build, saved
from tests.dist.pool import Pool
from tests.parity.runs import RATES, data_of
from tools import convert_checkpoint

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5
BATCH = Batch(torch.randint(0, VOCAB, (3, 20), generator=torch.Generator().manual_seed(3)))
SIGMOID = {
    **{"moe_router_score_function": "sigmoid", "moe_router_topk_scaling_factor": 2.5},
    **{"moe_router_num_groups": 2, "moe_router_group_topk": 1, "moe_router_enable_expert_bias": True},
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of an imported model: "gpt2" has biases and GELU, "llama" SwiGLU, "llama-biased" biases too; no
    bias is 0."""
    made: dict[str, Path] = {}

    def checkpoint(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            biases = {"mlp_bias": True, "attention_bias": True} if name == "llama-biased" else {}
            theirs = build(name.removesuffix("-biased"), **biases)
            made[name] = save_model(read_model(saved(theirs, folder / "theirs")), folder / "ours")
        return made[name]

    return checkpoint


def mixed(checkpoint: Path, save: Path, *, granularity: int, **experts: Any) -> Path:
    """The upcycled checkpoint: of 8 experts a token passes 4."""
    given = {"num_experts": 8, "moe_router_topk": 4, **experts}
    return upcycle(checkpoint, save, experts=given, granularity=granularity, seed=1).directory


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest, relative to the largest logit."""
    assert float(expected.std()) > 0.01, "logits that hardly differ would not show a mistake"
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("experts", [{}, SIGMOID, {"moe_layer_freq": "[1,0]*2"}], ids=["softmax", "sigmoid", "some"])
@pytest.mark.parametrize("granularity", [1, 2, 4])
@pytest.mark.parametrize("name", ["gpt2", "llama-biased"])
def test_logits_are_those_of_the_dense_model(
    dense: Callable[[str], Path], tmp_path: Path, name: str, granularity: int, experts: dict[str, Any]
) -> None:
    expected = said(0, 1, dense(name), Layout(), BATCH)
    found = said(0, 1, mixed(dense(name), tmp_path, granularity=granularity, **experts), Layout(), BATCH)
    assert expected is not None and found is not None
    assert difference(found.tokens, expected.tokens) < TOLERANCE


def test_they_are_so_where_ranks_hold_some_experts_and_parts_of_them(
    dense: Callable[[str], Path], pool: Pool, tmp_path: Path
) -> None:
    expected = said(0, 1, dense("gpt2"), Layout(), BATCH)
    checkpoint = mixed(dense("gpt2"), tmp_path, granularity=2)
    assert expected is not None
    for layout in (Layout(dp=2, ep=2), Layout(tp=2)):
        for found in pool.run(2, said, checkpoint, layout, BATCH):
            assert found is not None and difference(found.tokens, expected.tokens) < TOLERANCE


def test_transformers_computes_the_same_of_the_experts_after_an_export(
    dense: Callable[[str], Path], tmp_path: Path
) -> None:
    expected = said(0, 1, dense("llama"), Layout(), BATCH)
    checkpoint = mixed(dense("llama"), tmp_path / "save", granularity=2)
    assert export_model(checkpoint, tmp_path / "there").class_name == "MixtralForCausalLM"
    theirs = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "there")
    with torch.no_grad():
        found = theirs(BATCH.tokens_BS).logits
    assert expected is not None and difference(found, expected.tokens) < TOLERANCE


def test_a_virtual_group_has_one_row_of_the_router_and_groups_have_different_ones(
    dense: Callable[[str], Path], tmp_path: Path
) -> None:
    weight_EH = assemble(mixed(dense("gpt2"), tmp_path, granularity=2), "model/layers.1.mlp.router.weight")
    assert torch.equal(weight_EH[::2], weight_EH[1::2]) and len(weight_EH.unique(dim=0)) == 4


def losses_of(parts: TrainingSetup, *, num_steps: int) -> list[float]:
    """The losses of training steps on mock data."""
    data = data_of(parts.config)
    with GlobalBatches(data.reader(data.train), num_workers=0) as batches:
        read = [batches.read(4 * step, 4, 0, 1) for step in range(num_steps)]
    return [train_step(parts, batch, RATES, step=step).losses["lm"] for step, batch in enumerate(read)]


def test_training_begins_with_the_loss_of_the_dense_model_and_goes_on(
    dense: Callable[[str], Path], tmp_path: Path
) -> None:
    def losses(checkpoint: Path, *, num_steps: int) -> list[float]:
        words = f"--config {checkpoint / 'run.json'} --load {checkpoint.parent} --finetune --train-iters 4 --lr 1e-3 "
        words += f"--mock-data --micro-batch-size 2 --global-batch-size 4 --seq-length {POSITIONS}"
        config = resolve(parse_args(words.split(), program="t", description="t", log=lambda line: None), 1)
        parts = build_parts(config, make_mesh(Layout()), torch.device("cpu"), build_gpt_stage)
        assert state.restore(parts).progress == state.Progress()
        return losses_of(parts, num_steps=num_steps)

    (expected,) = losses(dense("llama"), num_steps=1)
    first, *_, last = losses(mixed(dense("llama"), tmp_path, granularity=2), num_steps=3)
    assert abs(first - expected) < TOLERANCE * expected and last != first


def test_the_command_reports_what_it_wrote_and_that_training_starts_anew(
    dense: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"upcycle --load {dense('llama').parent} --save {tmp_path} --num-experts 8 --moe-router-topk 4"
    monkeypatch.setattr(sys, "argv", ["tool.py", *words.split(), "--moe-upcycling-granularity", "4"])
    convert_checkpoint.main(RunContext(Launch()))
    out = capsys.readouterr().out
    assert "8 experts of width 14 in 4 of 4 layers, 4 for each token" in out and "--finetune" in out
    checkpoint = find_checkpoint(tmp_path)
    model = from_dict(read_document(checkpoint, "run")).model
    assert (model.num_experts, model.moe_router_topk, model.moe_ffn_hidden_size) == (8, 4, 14)
    assert read_document(checkpoint, "state") == {"weights_only": True}


@pytest.mark.parametrize(
    ("experts", "granularity", "sentences"),
    [
        ({"moe_router_topk": 3}, 2, ["2 does not divide --moe-router-topk 3"]),
        ({"num_experts": 9, "moe_router_topk": 3}, 2, ["divide --num-experts 9", "divide --moe-router-topk 3"]),
        ({"num_experts": 10, "moe_router_topk": 5}, 5, ["5 does not divide --ffn-hidden-size 56"]),
        ({}, 0, ["--moe-upcycling-granularity 0 counts pieces"]),
        ({"moe_router_pre_softmax": True}, 1, ["weights that do not add up to 1"]),
        ({"moe_router_topk": 1}, 1, ["--moe-router-topk 1 has a weight that is always 1"]),
        ({"moe_router_topk": 1, "moe_router_score_function": "sigmoid"}, 1, ["does not add up to 1"]),
        ({"moe_router_num_groups": 4, "moe_router_group_topk": 1}, 4, ["pieces of one MLP would lie in two"]),
        ({"moe_router_topk": 10}, 2, ["--moe-router-topk 10 chooses among 8 experts"]),
        ({"num_experts": 1}, 1, ["--num-experts 1 makes no mixture of experts"]),
    ],
)
def test_what_would_not_be_the_dense_function_is_refused_in_a_sentence(
    dense: Callable[[str], Path], experts: dict[str, Any], granularity: int, sentences: list[str]
) -> None:
    model = from_dict(read_document(dense("llama"), "run")).model
    with pytest.raises(ConfigError) as refused:
        upcycled_model(model, {"num_experts": 8, "moe_router_topk": 4, **experts}, granularity)
    problems = str(refused.value).splitlines()
    assert len(problems) == len(sentences), problems
    assert all(sentence in problem for sentence, problem in zip(sentences, problems, strict=True)), problems


def test_only_a_dense_model_is_upcycled_and_no_checkpoint_is_written_over(
    dense: Callable[[str], Path], tmp_path: Path
) -> None:
    mixed_one = mixed(dense("llama"), tmp_path / "a", granularity=1)
    with pytest.raises(ConfigError, match="has a model of 8 experts already"):
        mixed(mixed_one, tmp_path / "b", granularity=1)
    with pytest.raises(ConfigError, match="holds checkpoints already"):
        mixed(dense("llama"), tmp_path / "a", granularity=1)
