"""Hugging Face directories that are damaged, hostile or quantized: a sentence that names the file, never an import."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron3d.convert.hf import read_model
from megatron3d.errors import CheckpointError, Megatron3dError
from tests.convert.theirs import LAYERS, build, saved
from tests.files.mutations import DEEP, mutated_bytes

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("bert-classifier", "gpt2", "llama")
_OUTPUT = "bert.encoder.layer.0.output.dense.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directories by the name of their model, to look at; copy one before changing it."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = saved(build(name), tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture
def own(whole: Callable[[str], Path], tmp_path: Path) -> Path:
    """A BERT with a classifier, to change."""
    return Path(shutil.copytree(whole("bert-classifier"), tmp_path / "bert"))


def change(directory: Path, **values: object) -> Path:
    """Change fields of the config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return directory


def change_tensors(directory: Path, changed: Callable[[dict[str, Tensor]], object]) -> Path:
    """Rewrite the weights with a change."""
    path = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    changed(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": 1000}, "a model of 1000 layers, but only"),
        ({"num_hidden_layers": 10**30}, "must be a whole number from 1 to 2147483647"),
        ({"num_hidden_layers": LAYERS + 1}, f"has no tensor bert.encoder.layer.{LAYERS}."),
        ({"num_hidden_layers": "4"}, "num_hidden_layers is '4' and must be a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_attention_heads": 5}, "config.json makes it (30, 32)"),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings is 1000000000000"),
        ({"hidden_dropout_prob": 1.5}, "--hidden-dropout 1.5 is outside its range"),
        ({"hidden_dropout_prob": "0.1"}, "hidden_dropout_prob is '0.1' and must be a number"),
        ({"layer_norm_eps": 10**400}, "layer_norm_eps is 1000000000"),
        ({"layer_norm_eps": 0}, "--norm-epsilon 0.0 is outside its range"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps is nan"),
        ({"initializer_range": float("inf")}, "initializer_range is inf"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false' and must be true or false"),
        ({"model_type": ["bert"]}, "says model_type ['bert'], which cannot be converted"),
        ({"model_type": {"bert": 1}}, "says model_type {'bert': 1}"),
        ({"hidden_act": ["gelu"]}, "hidden_act ['gelu'] cannot be converted"),
        ({"id2label": ["bad", "good"]}, "id2label is ['bad', 'good'] and must be an object"),
        ({"id2label": {"a": "bad"}}, "id2label has 'a' for 'bad'"),
        ({"id2label": {"0": None}}, "id2label has '0' for None"),
        ({"is_decoder": [1]}, "is_decoder [1] cannot be converted"),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_field_and_value(
    own: Path, values: dict[str, object], message: str
) -> None:
    with pytest.raises(CheckpointError) as refusal:
        read_model(change(own, **values))
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": ' + DEEP.encode() + b"}", "it is nested too deep"),
        (b"[1]", "it holds a list and must hold an object"),
        (b"\xff", "it is not UTF-8"),
        (b"", "Expecting value"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_description_that_is_no_document_is_named(own: Path, name: str, text: bytes, message: str) -> None:
    if name != "config.json":
        (own / "model.safetensors").unlink()
    (own / name).write_bytes(text)
    with pytest.raises(CheckpointError) as refusal:
        read_model(own)
    assert f"{own / name} cannot be read as JSON" in str(refusal.value) and message in str(refusal.value)


def test_a_number_of_layers_takes_no_memory(own: Path) -> None:
    """In a process that may not have more than 4 GB, although a list of so many layers would."""
    change(own, num_hidden_layers=2**31 - 1)
    program = f"from pathlib import Path; from megatron3d.convert.hf import read_model; read_model(Path({str(own)!r}))"
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, 4 << 30)),
    )
    assert "CheckpointError" in ran.stderr and "MemoryError" not in ran.stderr


# --- quantized ---


def quantize(name: str, dtype: torch.dtype) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: tensors[name].mul(10).to(dtype)})


@pytest.mark.parametrize(
    ("name", "copy", "table"),
    [
        ("llama", "lm_head.weight", "model.embed_tokens.weight"),
        ("gpt2", "lm_head.weight", "transformer.wte.weight"),
        ("bert-classifier", "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    ],
)
def test_a_second_table_of_a_tied_model_is_read_where_it_is_equal_and_else_refused(
    whole: Callable[[str], Path], tmp_path: Path, name: str, copy: str, table: str
) -> None:
    """Of two that differ transformers keeps both, whatever `tie_word_embeddings` says."""
    directory = change(Path(shutil.copytree(whole(name), tmp_path / name)), tie_word_embeddings=True)
    change_tensors(directory, lambda tensors: tensors.update({copy: tensors[table].clone()}))
    assert copy not in read_model(directory).left_out
    change_tensors(directory, lambda tensors: tensors[copy].add_(1.0))
    with pytest.raises(CheckpointError, match=f"{re.escape(copy)} than in {re.escape(table)}, and config.json ties"):
        read_model(directory)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_other_types_are_refused_by_name(own: Path, dtype: torch.dtype) -> None:
    change_tensors(own, quantize(_OUTPUT, dtype))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: the tensor {_OUTPUT} is .*, as in quantized"):
        read_model(own)


@pytest.mark.parametrize(
    "added",
    [
        "bert.encoder.layer.0.output.dense.weight_scale_inv",
        "bert.encoder.layer.0.output.dense.SCB",
        "bert.encoder.layer.0.output.dense.weight.absmax",
        "classifier.scales",
    ],
)
def test_what_quantizers_add_is_refused_by_name(own: Path, added: str) -> None:
    change_tensors(own, lambda tensors: tensors.update({added: torch.ones(3)}))
    with pytest.raises(CheckpointError, match=f"the tensor {added} is float32, as in quantized weights"):
        read_model(own)


@pytest.mark.parametrize(
    ("name", "described", "shown"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "'gptq'"),
        ("quantization_config", {"load_in_8bit": True}, "load_in_8bit"),
        ("compression_config", {"format": "int-quantized"}, "int-quantized"),
        ("quantization_config", "fp8", "'fp8'"),
    ],
)
def test_a_description_of_a_quantization_is_refused_with_its_method(
    own: Path, name: str, described: object, shown: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json has {name} \(.*{shown}.*its weights are quantized"):
        read_model(change(own, **{name: described}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_16_bits_and_more_are_imported(own: Path, dtype: torch.dtype) -> None:
    change_tensors(own, lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items()}))
    assert {tensor.dtype for tensor in read_model(change(own, quantization_config=None)).tensors.values()} == {dtype}


def test_integers_that_follow_from_the_shape_are_no_weights(own: Path) -> None:
    change_tensors(own, lambda tensors: tensors.update({"bert.embeddings.position_ids": torch.arange(24)[None]}))
    assert read_model(own).left_out == ()


# --- shards ---


def shard(directory: Path, file: object, *, twin: bool = False) -> Path:
    """Move the weights behind an index that names them as `file`; with `twin` half of them lie in two files."""
    path = directory / "model.safetensors"
    names = list(load_file(path))
    weight_map: dict[str, object] = dict.fromkeys(names, file)
    if twin:
        shutil.copy(path, directory / "b.safetensors")
        weight_map[names[0]] = "b.safetensors"
    path.rename(directory / "a.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


@pytest.mark.parametrize(
    "file", ["../bert/a.safetensors", "/etc/passwd", "x/../../y", "..", "a\0b", "..\\a.safetensors", "", 7, None, ["a"]]
)
def test_an_index_of_shards_that_leads_out_is_refused(own: Path, file: object) -> None:
    with pytest.raises(CheckpointError, match=r"index\.json names .*, which is not a file inside"):
        read_model(shard(own, file))


def test_shards_beside_the_index_in_a_folder_and_behind_links_are_read(own: Path, tmp_path: Path) -> None:
    shard(own, "parts/a.safetensors")
    (own / "parts").mkdir()
    (own / "a.safetensors").rename(tmp_path / "blob")  # as a cache of a model hub keeps them
    (own / "parts/a.safetensors").symlink_to(tmp_path / "blob")
    assert read_model(own).components >= {"trunk", "classes"}


def test_a_tensor_in_two_shards_is_refused(own: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a\.safetensors and .*b\.safetensors both hold the tensor"):
        read_model(shard(own, "a.safetensors", twin=True))


# --- anything ---


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_config_is_read_or_refused(whole: Callable[[str], Path], name: str, data: st.DataObject) -> None:
    directory = whole(name)
    path = directory / "config.json"
    before = path.read_bytes()
    path.write_bytes(data.draw(mutated_bytes(json.loads(before))))
    try:
        found = read_model(directory)
        assert found.class_names is not None
    except Megatron3dError:
        pass
    finally:
        path.write_bytes(before)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_index_of_shards_is_read_or_refused(own: Path, data: st.DataObject) -> None:
    if (own / "model.safetensors").exists():
        shard(own, "a.safetensors")
    path = own / "model.safetensors.index.json"
    document: dict[str, Any] = {"metadata": {"total_size": 7}, "weight_map": dict.fromkeys("abc", "a.safetensors")}
    path.write_bytes(data.draw(mutated_bytes(document)))
    try:
        read_model(own)
    except Megatron3dError:
        return
