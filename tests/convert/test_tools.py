"""The two command lines: what they write and print, and the sentence for every kind of bad input."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron3d.checkpoint.directory import find_checkpoint
from megatron3d.checkpoint.load import assemble, read_document, tensor_shapes
from megatron3d.comm.launch import Launch
from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.config.check import resolve
from megatron3d.config.cli import parse_args
from megatron3d.config.serialize import from_dict
from megatron3d.convert.hf import read_model
from megatron3d.errors import CheckpointError, ConfigError, DataError, Megatron3dError, MisfitError
from megatron3d.models.bert import build_bert_stage
from megatron3d.train import state
from megatron3d.train.launch import RunContext
from megatron3d.train.setup import TrainingSetup, build_parts
from tests.convert.theirs import CLASSES, POSITIONS, VOCAB, build, saved
from tools import convert_checkpoint, embed_text

Run = Callable[..., tuple[str, str]]
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "mat", "##s", "."]
TEXTS = ["The cat sat.", "the mats", "the cat sat on the mat on the cat."]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a tool in this process; returns what it wrote to stdout and stderr."""

    def call(tool: object, *words: object) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["tool.py", *map(str, words)])
        tool.main(RunContext(Launch()))
        return capsys.readouterr()

    return call


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """A directory of a bare BERT with a vocabulary."""
    return directory_of("bert-bare", tmp_path / "theirs")


def directory_of(name: str, directory: Path) -> Path:
    """The directory of a model with a vocabulary that is as large as its table."""
    saved(build(name), directory)
    pieces = PIECES + [f"w{number}" for number in range(VOCAB - len(PIECES))]
    (directory / "vocab.txt").write_text("\n".join(pieces) + "\n")
    (directory / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    return directory


def change(directory: Path, **values: object) -> Path:
    """Change fields of the config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return directory


def test_vectors_match_the_lines_of_the_file(run: Run, hf: Path, tmp_path: Path) -> None:
    """Lines are those that `wc` counts, and a byte order mark is no word of the first."""
    lines = ["the cat", "sat\u2028on", "the\x85mat", "the\x0ccat", "cat\rsat", "on"]
    (tmp_path / "lines.txt").write_bytes(b"\xef\xbb\xbf" + "".join(f"{line}\n" for line in lines).encode())
    command = ("--hf", hf, "--device", "cpu", "--output")
    run(embed_text, *command, tmp_path / "of_file.jsonl", "--input", tmp_path / "lines.txt")
    run(embed_text, *command, tmp_path / "of_texts.jsonl", "--text", *lines)
    assert (tmp_path / "of_file.jsonl").read_bytes() == (tmp_path / "of_texts.jsonl").read_bytes()
    records = (tmp_path / "of_file.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert [json.loads(record)["text"] for record in records] == lines


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("a\n".encode("utf-16"), "it is UTF-16 by its byte order mark"),
        (b"caf\xe9\n", "it is not UTF-8: byte 3 is 0xe9"),
    ],
)
def test_texts_in_another_encoding_are_refused_by_name(
    run: Run, hf: Path, tmp_path: Path, content: bytes, reason: str
) -> None:
    (tmp_path / "lines.txt").write_bytes(content)
    with pytest.raises(DataError, match=rf"--input .*lines\.txt cannot be read \({reason}"):
        run(embed_text, "--hf", hf, "--input", tmp_path / "lines.txt", "--output", tmp_path / "o.npy")


def test_import_and_export_say_what_they_wrote_and_carry_the_vocabulary(run: Run, hf: Path, tmp_path: Path) -> None:
    out, _ = run(convert_checkpoint, "hf-import", "--hf", hf, "--save", tmp_path / "save")
    assert "iter_0000000: BERT of" in out and "(pooler, trunk)" in out
    stored = from_dict(read_document(find_checkpoint(tmp_path / "save"), "run"))
    assert stored.data.tokenizer_type == "HuggingFaceTokenizer"
    assert (Path(stored.data.tokenizer_model) / "vocab.txt").read_text() == (hf / "vocab.txt").read_text()
    out, _ = run(convert_checkpoint, "hf-export", "--load", tmp_path / "save", "--hf", tmp_path / "again")
    assert "BertModel of" in out and "vocab.txt" in out
    assert (tmp_path / "again" / "vocab.txt").read_bytes() == (hf / "vocab.txt").read_bytes()
    assert not list(tmp_path.glob(".tmp-*"))


def test_new_heads_complete_a_model_for_training_and_depend_on_the_seed_alone(
    run: Run, hf: Path, tmp_path: Path
) -> None:
    words = ("hf-import", "--hf", hf, "--new-heads", "--save")
    out, _ = run(convert_checkpoint, *words, tmp_path / "a")
    assert "head.transform.weight" in out and "head.binary.weight" in out and "embedding" not in out.split("\n")[0]
    run(convert_checkpoint, *words, tmp_path / "b")
    run(convert_checkpoint, *words, tmp_path / "c", "--seed", 7)
    a, b, c = (find_checkpoint(tmp_path / name) for name in "abc")
    name = "model/head.transform.weight"
    assert torch.equal(assemble(a, name), assemble(b, name)) and not torch.equal(assemble(a, name), assemble(c, name))
    assert tensor_shapes(a)["model/head.output_bias"] == (VOCAB,)
    run_json = a / "run.json"
    config = parse_args(
        ["--config", str(run_json), "--load", str(a), "--finetune"], program="t", description="t", architecture="bert"
    )
    assert config.model.num_layers == 4 and config.data.tokenizer_model


def test_other_dtype_and_labels_are_written_as_asked(run: Run, tmp_path: Path) -> None:
    hf = directory_of("bert-classifier", tmp_path / "theirs")
    run(convert_checkpoint, "hf-import", "--hf", hf, "--save", tmp_path / "save")
    words = ["hf-export", "--load", tmp_path / "save", "--hf", tmp_path / "out", "--dtype", "bfloat16", "--labels"]
    run(convert_checkpoint, *words, "no", "maybe", "yes")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16" and config["label2id"] == {"no": 0, "maybe": 1, "yes": 2}
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    words[4] = tmp_path / "other"
    with pytest.raises(ConfigError, match=f"--labels no yes names 2 classes and the checkpoint has {CLASSES}"):
        run(convert_checkpoint, *words, "no", "yes")


def test_a_head_that_we_do_not_have_is_left_out_by_name(run: Run, hf: Path, tmp_path: Path) -> None:
    tensors = load_file(hf / "model.safetensors") | {"qa_outputs.weight": torch.zeros(2, 32)}
    save_file(tensors, hf / "model.safetensors")
    out, _ = run(convert_checkpoint, "hf-import", "--hf", hf, "--save", tmp_path / "save")
    assert "left out" in out and "qa_outputs.weight" in out


def test_old_names_of_norms_are_understood(run: Run, tmp_path: Path) -> None:
    hf = directory_of("bert-pretraining", tmp_path / "theirs")
    tensors = load_file(hf / "model.safetensors")
    renamed = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in tensors.items()
    }
    assert renamed.keys() != tensors.keys()
    renamed["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    save_file(renamed, hf / "model.safetensors")
    run(convert_checkpoint, "hf-import", "--hf", hf, "--save", tmp_path / "save")
    run(convert_checkpoint, "hf-export", "--load", tmp_path / "save", "--hf", tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], t) for name, t in tensors.items())


def _without(name: str) -> Callable[[Path], None]:
    def spoil(hf: Path) -> None:
        tensors = load_file(hf / "model.safetensors")
        del tensors[name]
        save_file(tensors, hf / "model.safetensors")

    return spoil


def _with(name: str) -> Callable[[Path], None]:
    def spoil(hf: Path) -> None:
        tensors = load_file(hf / "model.safetensors") | {name: torch.zeros(2)}
        save_file(tensors, hf / "model.safetensors")

    return spoil


def _cut(hf: Path) -> None:
    path = hf / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _pickle_that_runs_code(hf: Path) -> None:
    (hf / "model.safetensors").unlink()
    torch.save({"a": _MakesDirectory(str(hf / "code ran"))}, hf / "pytorch_model.bin")


class _MakesDirectory:
    """Its pickle is a call."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.path,)


BAD_DIRECTORIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda hf: (hf / "config.json").unlink(), "has no config.json"),
    "damaged config": (lambda hf: (hf / "config.json").write_text("{"), "config.json cannot be read as JSON"),
    "other kind": (
        lambda hf: change(hf, model_type="t5"),
        "model_type 't5'.*only bert, megatron-bert, gpt2",
    ),
    "other positions": (
        lambda hf: change(hf, position_embedding_type="relative_key"),
        "position_embedding_type 'relative_key' cannot be converted",
    ),
    "other activation": (lambda hf: change(hf, hidden_act="mish"), "hidden_act 'mish' cannot be converted"),
    "no number": (lambda hf: change(hf, hidden_size="wide"), "hidden_size is 'wide' and must be a whole number"),
    "too few positions": (
        lambda hf: change(hf, max_position_embeddings=512),
        r"position_embeddings.weight has shape \(24, 32\), and config.json makes it \(512, 32\)",
    ),
    "other vocabulary": (
        lambda hf: change(hf, vocab_size=VOCAB + 1),
        r"model.safetensors: bert.embeddings.word_embeddings.weight has shape \(67, 32\)",
    ),
    "larger vocabulary file": (
        lambda hf: (hf / "vocab.txt").write_text("".join(f"{n}\n" for n in (*PIECES, *range(VOCAB + 1 - len(PIECES))))),
        "tokenizer in .*theirs has 68 tokens, but the model beside it has vocab_size 67",
    ),
    "no weights": (lambda hf: (hf / "model.safetensors").unlink(), "holds no weights"),
    "cut weights": (_cut, "model.safetensors cannot be read as safetensors"),
    "missing tensor": (_without("encoder.layer.2.attention.self.key.bias"), "no tensor bert.encoder.layer.2.attention"),
    "half a pooler": (_without("pooler.dense.bias"), "has no tensor bert.pooler.dense.bias"),
    "more layers": (_with("encoder.layer.4.output.dense.bias"), "encoder.layer.4.output.dense.bias, which a bert of"),
    "code in a pickle": (_pickle_that_runs_code, "pytorch_model.bin cannot be read as plain tensors"),
}


@pytest.mark.parametrize("name", BAD_DIRECTORIES)
def test_a_bad_directory_is_refused_with_file_and_reason(run: Run, hf: Path, tmp_path: Path, name: str) -> None:
    spoil, words = BAD_DIRECTORIES[name]
    spoil(hf)
    with pytest.raises(CheckpointError, match=words):
        run(convert_checkpoint, "hf-import", "--hf", hf, "--save", tmp_path / "save")
    assert not (tmp_path / "save").exists() and not (hf / "code ran").exists()


def test_nothing_is_written_over(run: Run, hf: Path, tmp_path: Path) -> None:
    words = ("hf-import", "--hf", hf, "--save", tmp_path / "save")
    run(convert_checkpoint, *words)
    with pytest.raises(ConfigError, match=r"holds checkpoints already \(of steps 0\)"):
        run(convert_checkpoint, *words)
    with pytest.raises(ConfigError, match="theirs exists already"):
        run(convert_checkpoint, "hf-export", "--load", tmp_path / "save", "--hf", hf)


def test_a_checkpoint_whose_tensors_do_not_fit_its_run_is_not_exported(
    run: Run, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(convert_checkpoint, "hf-import", "--hf", hf, "--save", tmp_path / "save")
    moved = tmp_path / "save" / "tokenizer" / "vocab.txt"
    moved.unlink()
    words = ("hf-export", "--load", tmp_path / "save", "--hf", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"save/tokenizer, of the checkpoint's tokenizer, is not there or holds"):
        run(convert_checkpoint, *words)
    assert not (tmp_path / "out").exists()
    out, _ = run(convert_checkpoint, *words, "--tokenizer-model", hf)
    assert "vocab.txt" in out


def test_training_starts_from_imported_weights_with_finetune_alone(run: Run, tmp_path: Path) -> None:
    hf = directory_of("bert-pretraining", tmp_path / "theirs")
    run(convert_checkpoint, "hf-import", "--hf", hf, "--save", tmp_path / "save")
    checkpoint = find_checkpoint(tmp_path / "save")
    words = f"--config {checkpoint / 'run.json'} --load {tmp_path / 'save'} --train-iters 4 --lr 1e-3 --mock-data"

    def parts_of(*more: str) -> TrainingSetup:
        args = parse_args([*words.split(), *more], program="t", description="t", architecture="bert")
        return build_parts(resolve(args, 1), make_mesh(Layout()), torch.device("cpu"), build_bert_stage)

    with pytest.raises(MisfitError, match=r"holds weights alone, without steps or optimizer; .* --finetune"):
        state.restore(parts_of())
    parts = parts_of("--finetune")
    assert state.restore(parts).progress == state.Progress()
    found = read_model(hf)
    for name, view in parts.engine.weight_views(with_copies=True).items():
        for box, tensor in view.box_tensors():
            assert torch.equal(tensor, found.tensors[name][box.slices()]), name


def test_a_moved_import_gives_its_own_copy_of_the_tokenizer_to_training(run: Run, hf: Path, tmp_path: Path) -> None:
    run(convert_checkpoint, "hf-import", "--hf", hf, "--save", tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "moved")
    words = f"--use-checkpoint-args --finetune --load {tmp_path / 'moved'} --lr 1e-3 --train-iters 4 --mock-data"
    data = parse_args(words.split(), program="t", description="t", architecture="bert", log=lambda line: None).data
    assert data.tokenizer_model == str(tmp_path / "moved" / "tokenizer")


# --- embed_text -------------------------------------------------------------------------------------------------------


def test_vectors_of_a_directory_and_of_its_checkpoint_are_the_same_in_both_formats(
    run: Run, hf: Path, tmp_path: Path
) -> None:
    run(convert_checkpoint, "hf-import", "--hf", hf, "--save", tmp_path / "save")
    (tmp_path / "in.txt").write_text("\n".join(TEXTS[:2]) + "\n")
    inputs = ("--device", "cpu", "--input", tmp_path / "in.txt", TEXTS[2])
    _, err = run(embed_text, "--hf", hf, *inputs, "--output", tmp_path / "a.npy")
    assert "3 texts of 32 numbers" in err
    run(embed_text, "--load", tmp_path / "save", *inputs, "--output", tmp_path / "b.jsonl")
    array = np.load(tmp_path / "a.npy")
    lines = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert array.shape == (3, 32) and array.dtype == np.float32
    assert [line["text"] for line in lines] == TEXTS
    assert np.array_equal(array, np.array([line["embedding"] for line in lines], dtype=np.float32))


def test_a_text_is_framed_by_cls_and_sep_and_equals_transformers(run: Run, tmp_path: Path) -> None:
    hf = directory_of("bert-bare", tmp_path / "theirs")
    run(embed_text, "--hf", hf, "--device", "cpu", "--text", TEXTS[0], "--output", tmp_path / "a.npy")
    ids = [PIECES.index(piece) for piece in ("[CLS]", "the", "cat", "sat", ".", "[SEP]")]
    with torch.no_grad():
        expected = build("bert-bare")(torch.tensor([ids])).last_hidden_state[0].mean(0).numpy()
    assert np.abs(np.load(tmp_path / "a.npy")[0] - expected).max() < 1e-5 * np.abs(expected).max()


def test_long_texts_are_cut_and_counted(run: Run, hf: Path, tmp_path: Path) -> None:
    words = ("--hf", hf, "--device", "cpu", "--text", "the " * 50, "the", "--output", tmp_path / "a.npy")
    _, err = run(embed_text, *words)
    assert f"1 were cut to {POSITIONS} tokens" in err


BAD_WORDS: dict[str, tuple[tuple[str, ...], type[Megatron3dError], str]] = {
    "format": (("--text", "a", "--output", "v.csv"), ConfigError, "--output v.csv ends in '.csv'"),
    "no text": (("--output", "v.npy"), ConfigError, "no text is given"),
    "no file": (("--input", "nowhere.txt", "--output", "v.npy"), DataError, "--input nowhere.txt is no file"),
    "too long": (
        ("--text", "a", "--max-length", "600", "--output", "v.npy"),
        ConfigError,
        f"--max-length 600 is longer than the {POSITIONS} positions",
    ),
    "too short": (
        ("--text", "a", "--max-length", "2", "--output", "v.npy"),
        ConfigError,
        "--max-length 2 leaves no",
    ),
    "batch": (("--text", "a", "--batch-tokens", "0", "--output", "v.npy"), ConfigError, "--batch-tokens 0"),
    "heads": (
        ("--text", "a", "--output", "v.npy", "--tensor-model-parallel-size", "3"),
        ConfigError,
        "--num-attention-heads 4 is not a multiple of --tensor-model-parallel-size 3",
    ),
}


@pytest.mark.parametrize("name", BAD_WORDS)
def test_bad_options_are_refused_before_anything_is_computed(run: Run, hf: Path, name: str) -> None:
    words, error, text = BAD_WORDS[name]
    with pytest.raises(error, match=text):
        run(embed_text, "--hf", hf, "--device", "cpu", *words)


def test_bad_files_and_models_are_refused_by_name(run: Run, hf: Path, tmp_path: Path) -> None:
    def fails(error: type[Megatron3dError], text: str, *words: object) -> None:
        with pytest.raises(error, match=text):
            run(embed_text, "--device", "cpu", "--output", tmp_path / "v.npy", *words)

    (tmp_path / "gap.txt").write_text("one\n\ntwo\n")
    fails(DataError, "gap.txt line 2 is empty", "--hf", hf, "--input", tmp_path / "gap.txt")
    (tmp_path / "large.txt").write_text("\n".join(PIECES + [f"w{n}" for n in range(100)]))
    large = ("--hf", hf, "--text", "a", "--vocab-file", tmp_path / "large.txt")
    fails(ConfigError, "does not say how texts are cut, and the model's own tokenizer is a HuggingFace", *large)
    fails(ConfigError, "large.txt has 112 tokens", *large, "--tokenizer-type", "BertWordPieceLowerCase")
    gpt = saved(build("gpt2"), tmp_path / "gpt2")
    fails(ConfigError, "holds a GPT; vectors come from a BERT", "--hf", gpt, "--text", "a")
    masked = directory_of("bert-masked", tmp_path / "masked")
    fails(ConfigError, "--pooling pooler: .* has no pooler", "--hf", masked, "--text", "a", "--pooling", "pooler")
    shutil.copytree(hf, tmp_path / "wordless")
    (tmp_path / "wordless" / "vocab.txt").unlink()
    fails(ConfigError, "wordless names no tokenizer", "--hf", tmp_path / "wordless", "--text", "a")
