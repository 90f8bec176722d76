"""Models of transformers come in, compute the same at any layout, and go out bit for bit.

The weights are random and small; logits differ from each other by far more than any tolerance. transformers itself
writes what is imported and reads what is exported.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from megatron3d.checkpoint.directory import verify
from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.config.check import resolve
from megatron3d.config.cli import parse_args
from megatron3d.convert.export import export_model
from megatron3d.convert.hf import read_model, save_model
from megatron3d.data.loader import GlobalBatches
from megatron3d.errors import ConfigError, MisfitError
from megatron3d.models.zoo import architecture_of
from megatron3d.optim.schedule import settings_from_config
from megatron3d.train import state
from megatron3d.train.setup import TrainingSetup, build_parts
from megatron3d.train.step import train_step
from tests.convert.ours import Batch, Said, said, said_and_generated
from tests.convert.theirs import CLASSES, MODELS, VOCAB, build, saved
from tests.dist.pool import Pool
from tests.parity.runs import BERTS as TRAINED_BERTS
from tests.parity.runs import MODELS as TRAINED_GPTS
from tests.parity.runs import RATES, SHAPE, data_of

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.heavy

# fp32 sums in another order differ by about 1e-7 of the largest value; the issue promises 1e-5.
TOLERANCE = 1e-5
LENGTHS = (20, 13, 9)


def batch_for(kind: str, vocab: int = VOCAB, length: int = 20) -> Batch:
    """Random tokens; for a BERT two segments, and padding in all rows but the first."""
    tokens = torch.randint(0, vocab, (3, length), generator=torch.Generator().manual_seed(3))
    if "bert" not in kind:
        return Batch(tokens)
    real = torch.arange(length) < torch.tensor(LENGTHS)[:, None]
    types = ((torch.arange(length) > 6) & real).long()
    return Batch(tokens, types, real)


def expected_of(theirs: nn.Module, batch: Batch) -> Said:
    """What transformers says of the batch."""
    more = {}
    if batch.real_BS is not None:
        more = {"attention_mask": batch.real_BS.long(), "token_type_ids": batch.types_BS}
    with torch.no_grad():
        outputs = theirs(batch.tokens_BS, **more)
    if "SequenceClassification" in type(theirs).__name__:
        return Said(classes=outputs.logits)
    if "PreTraining" in type(theirs).__name__:
        return Said(tokens=outputs.prediction_logits, pairs=outputs.seq_relationship_logits)
    return Said(tokens=outputs.logits)


def compare(ours: Said, theirs: Said, batch: Batch) -> None:
    """Fail unless all logits of real tokens agree."""
    for name in ("tokens", "pairs", "classes"):
        expected = vars(theirs)[name]
        if expected is None:
            continue
        found = vars(ours)[name]
        if name == "tokens" and batch.real_BS is not None:
            found, expected = found[batch.real_BS], expected[batch.real_BS]
        assert float(expected.std()) > 0.01, f"{name}: logits that hardly differ would not show a mistake"
        difference = float((found - expected).abs().max() / expected.abs().max())
        assert difference < TOLERANCE, f"{name}: logits differ by {difference}"


def imported(name: str, tmp_path: Path) -> tuple[nn.Module, Path, Path]:
    """transformers' model, its directory, and our checkpoint of it."""
    theirs = build(name)
    directory = saved(theirs, tmp_path / "theirs")
    return theirs, directory, save_model(read_model(directory), tmp_path / "ours")


DENSE = ("llama-3.1", "mistral", "qwen2", "qwen3")


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("bert-bare", *DENSE)])
def test_logits_of_an_imported_model_equal_those_of_transformers_in_one_process_and_at_tp2_pp2(
    pool: Pool, tmp_path: Path, name: str
) -> None:
    theirs, _, checkpoint = imported(name, tmp_path)
    batch = batch_for(name)
    expected = expected_of(theirs, batch)
    compare(said(0, 1, checkpoint, Layout(), batch), expected, batch)
    at_four = pool.run(4, said, checkpoint, Layout(tp=2, pp=2), batch)
    last = [one for one in at_four if one is not None]
    assert len(last) == 2
    for one in last:
        compare(one, expected, batch)


@pytest.mark.parametrize("name", DENSE)
def test_families_like_llama_with_scaled_positions_give_the_same_logits_and_greedy_tokens(
    pool: Pool, tmp_path: Path, name: str
) -> None:
    theirs, _, checkpoint = imported(name, tmp_path)
    batch = batch_for(name)
    expected, tokens_BS = expected_of(theirs, batch), greedy(theirs, batch, 4)
    alone = said_and_generated(0, 1, checkpoint, Layout(), batch, 4)
    of_last = [one for one in pool.run(4, said_and_generated, checkpoint, Layout(tp=2, pp=2), batch, 4) if one[0]]
    assert len(of_last) == 2
    for one, generated in (alone, *of_last):
        compare(one, expected, batch)
        assert torch.equal(generated, tokens_BS)


def greedy(theirs: nn.Module, batch: Batch, num_tokens: int) -> torch.Tensor:
    """The tokens [B, num_tokens] that transformers finds most probable after each row, without its cache."""
    tokens_BS = batch.tokens_BS
    with torch.no_grad():
        for _ in range(num_tokens):
            tokens_BS = torch.cat([tokens_BS, theirs(tokens_BS).logits[:, -1:].argmax(-1)], 1)
    return tokens_BS[:, -num_tokens:]


@pytest.mark.parametrize(
    "layouts",
    [
        (Layout(dp=2, ep=2), Layout(tp=2, ep=2, etp=1)),
        pytest.param((Layout(tp=2, dp=2, ep=2),), marks=pytest.mark.slow),
    ],
    ids=["world2", "world4"],
)
@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "qwen3-moe", "olmoe"])
def test_imported_experts_give_the_same_logits_and_greedy_tokens_where_ranks_hold_some_of_them(
    pool: Pool, tmp_path: Path, name: str, layouts: tuple[Layout, ...]
) -> None:
    theirs, _, checkpoint = imported(name, tmp_path)
    batch = batch_for(name)
    tokens_BS = greedy(theirs, batch, 4)
    for layout in layouts:
        for one, generated in pool.run(layout.world_size, said_and_generated, checkpoint, layout, batch, 4):
            assert one is not None, "every rank has the last stage"
            compare(one, expected_of(theirs, batch), batch)
            assert torch.equal(generated, tokens_BS)


def test_what_only_training_reads_of_experts_does_not_leave(tmp_path: Path) -> None:
    found = read_model(imported("mixtral", tmp_path)[1])
    state = {f"layers.{layer}.mlp.router.previous": torch.ones(4, dtype=torch.int64) for layer in range(2)}
    whole = replace(found, tensors={**found.tensors, **state})
    export_model(save_model(whole, tmp_path / "trained"), tmp_path / "there")
    again = read_model(tmp_path / "there").tensors
    assert again.keys() == found.tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in found.tensors.items())


def tuned(checkpoint: Path, options: str) -> TrainingSetup:
    """The parts of a run that starts from a checkpoint's weights, with other options."""
    words = f"--config {checkpoint / 'run.json'} --load {checkpoint.parent} --finetune --train-iters 4 --lr 1e-3 "
    words += f"--mock-data --micro-batch-size 2 --global-batch-size 4 {options}"
    config = resolve(parse_args(words.split(), program="t", description="t", log=lambda line: None), 1)
    return build_parts(config, make_mesh(Layout()), torch.device("cpu"), architecture_of(config.model).build_stage)


def test_imported_experts_train_with_the_loss_that_reads_the_counts_of_the_step_before(tmp_path: Path) -> None:
    parts = tuned(imported("mixtral", tmp_path)[2], "--moe-router-load-balancing-type global_aux_loss")
    state.restore(parts)
    counts, model = parts.states.values()["layers.3.mlp.router.previous"], parts.config.model
    assert counts.tolist() == [0, 0, 0, 0]
    data = data_of(parts.config)
    with GlobalBatches(data.reader(data.train), num_workers=0) as batches:
        first = train_step(parts, batches.read(0, 4, 0, 1), RATES, step=0)
    assert first.losses["global_balance"] == pytest.approx(1.0), "the counts before the first step are even"
    assert int(counts.sum()) == 4 * model.seq_length * model.moe_router_topk


def test_a_checkpoint_with_other_experts_is_refused_by_the_option(tmp_path: Path) -> None:
    checkpoint = imported("mixtral", tmp_path)[2]
    for options, named in (
        ("--num-experts 8", "--num-experts"),
        ("--num-experts 2 4 4 4", "--num-experts-by-layer"),
        ("--moe-layer-freq 2", "--moe-layer-freq"),
        ("--moe-ffn-hidden-size 28", "--moe-ffn-hidden-size"),
        ("--mlp-type residual", "--mlp-type"),
    ):
        with pytest.raises(MisfitError, match=named):
            state.restore(tuned(checkpoint, options))


def test_experts_with_a_capacity_have_no_place_there(tmp_path: Path) -> None:
    found = read_model(imported("mixtral", tmp_path)[1])
    limited = replace(found, model=replace(found.model, moe_expert_capacity_factor=1.25))
    with pytest.raises(ConfigError, match=r"moe_expert_capacity_factor 1\.25"):
        export_model(save_model(limited, tmp_path / "trained"), tmp_path / "there")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_goes_through_a_checkpoint_bit_for_bit_and_transformers_loads_it_whole(
    tmp_path: Path, name: str
) -> None:
    theirs, directory, checkpoint = imported(name, tmp_path)
    assert verify(checkpoint, "full") == []
    exported = export_model(checkpoint, tmp_path / "again")
    assert exported.class_name == MODELS[name][0]
    before, after = load_file(directory / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key
    again, info = type(theirs).from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ignored = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
    configs = [{k: v for k, v in model.config.to_dict().items() if k not in ignored} for model in (theirs, again)]
    assert configs[1].items() >= configs[0].items()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_as_it_is(tmp_path: Path, dtype: torch.dtype) -> None:
    directory = saved(build("bert-pretraining").to(dtype), tmp_path / "theirs")
    checkpoint = save_model(read_model(directory), tmp_path / "ours")
    export_model(checkpoint, tmp_path / "again")
    before, after = load_file(directory / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert all(after[key].dtype == dtype and torch.equal(tensor, after[key]) for key, tensor in before.items())
    assert transformers.BertModel.from_pretrained(tmp_path / "again").dtype == dtype


def test_shards_and_pickled_weights_are_read_like_one_file(tmp_path: Path) -> None:
    theirs = build("bert-pretraining")
    whole = read_model(saved(theirs, tmp_path / "whole"))
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    for directory in (tmp_path / "shards", tmp_path):
        found = read_model(directory)
        assert found.model == whole.model and found.tensors.keys() == whole.tensors.keys()
        assert all(torch.equal(tensor, whole.tensors[name]) for name, tensor in found.tensors.items())


def test_names_of_classes_come_along_and_can_be_given(tmp_path: Path) -> None:
    _, directory, checkpoint = imported("bert-classifier", tmp_path)
    assert read_model(directory).class_names == ("bad", "fair", "good")
    export_model(checkpoint, tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "fair", "2": "good"} and len(config["label2id"]) == CLASSES


# --- Trained here -----------------------------------------------------------------------------------------------------

_VOCAB_TRAINED = 101  # of tests/parity/runs.py; padded to 104 by the option in SHAPE at tensor size 2


def train_and_save(rank: int, world_size: int, model: str, save: str) -> None:
    """Three steps at TP2 x PP2 and a checkpoint; dropout stands in the options and so in config.json."""
    is_bert = model in TRAINED_BERTS
    words = f"{SHAPE} {TRAINED_BERTS[model] if is_bert else TRAINED_GPTS[model] + ' --eod-mask-loss'} --save {save}"
    words += " --micro-batch-size 2 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"
    args = parse_args(words.split(), program="test", description="test", architecture="bert" if is_bert else "gpt")
    config = resolve(args, world_size)
    builder = architecture_of(config.model).build_stage
    parts = build_parts(config, make_mesh(Layout(tp=2, pp=2)), torch.device("cpu"), builder)
    data, progress = data_of(config), state.Progress()
    with GlobalBatches(data.reader(data.train), num_workers=0) as batches:
        for step in range(3):
            train_step(parts, batches.read(step * 8, 8, 0, 1), RATES, step=step)
            progress = progress.after(8, tokens=8 * config.model.seq_length, skipped=False)
    state.save(parts, progress, settings_from_config(config.optim, config.train))


@pytest.mark.parametrize(
    ("model", "class_name"),
    [
        ("bert", "MegatronBertForPreTraining"),
        ("bert-post", "BertForPreTraining"),
        ("bert-masked", "MegatronBertForMaskedLM"),
        ("bert-untied", "MegatronBertForPreTraining"),
        ("gpt2", "GPT2LMHeadModel"),
        ("gpt2-untied", "GPT2LMHeadModel"),
        ("gpt2-1p", "GPT2LMHeadModel"),
        ("llama", "LlamaForCausalLM"),
    ],
)
def test_a_model_trained_at_tp2_pp2_gives_the_same_logits_in_transformers(
    pool: Pool, tmp_path: Path, model: str, class_name: str
) -> None:
    pool.run(4, train_and_save, model, str(tmp_path / "save"))
    checkpoint = tmp_path / "save" / "iter_0000003"
    assert export_model(checkpoint, tmp_path / "hf").class_name == class_name
    theirs, info = getattr(transformers, class_name).from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    batch = batch_for(model, _VOCAB_TRAINED, length=16)
    if model == "bert-masked":  # trained without segments: those of transformers add nothing
        batch = Batch(batch.tokens_BS, None, batch.real_BS)
    expected = expected_of(theirs.eval(), batch)
    assert expected.tokens.shape[-1] == _VOCAB_TRAINED, "rows that pad the vocabulary have left"
    compare(said(0, 1, checkpoint, Layout(), batch), expected, batch)
