"""From a checkpoint to one ONNX file: the same logits, checked before the file has its name, or a sentence and no file.

`small.py` makes the classifiers; that of single texts was written by four processes at TP2 x PP2.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron3d.comm.launch import Launch
from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.errors import CheckpointError, ConfigError, DataError, Megatron3dError, NumericsError
from megatron3d.serve import trained
from megatron3d.serve.classifier import open_classifier, open_session
from megatron3d.serve.description import INPUTS, OUTPUT, from_metadata
from megatron3d.serve.onnx_file import OutputDifference, require_exporter, temporary_beside
from megatron3d.serve.requests import Sample
from megatron3d.serve.trained import ServeOverrides, open_trained
from megatron3d.tasks.glue import weights
from megatron3d.train.launch import RunContext
from tests.convert.ours import Batch, said
from tests.dist.pool import Pool
from tests.parity.runs import Case, parts_of
from tests.serve.conftest import Exported
from tests.serve.small import KINDS, MAX_LENGTH, POSITIONS, SPECIAL, WORDS
from tools import export_onnx

onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install -e '.[onnx]'")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install -e '.[onnx]'")
pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install -e '.[onnx]'")

Get = Callable[[str], Exported]
ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-5  # of outputs up to 1, as the tool promises
SHAPES = [(1, 3), (1, MAX_LENGTH), (2, 7), (9, 12), (40, 4)]


def batch_of(num_samples: int, length: int, *, has_types: bool) -> Batch:
    """Random tokens, padded at their ends to different lengths; about half of each sample is a second text."""
    generator = torch.Generator().manual_seed(100 * num_samples + length)
    tokens_BS = torch.randint(0, len(SPECIAL) + len(WORDS), (num_samples, length), generator=generator)
    real_BS = torch.arange(length) < torch.randint(1, length + 1, (num_samples, 1), generator=generator)
    types_BS = (real_BS & (torch.arange(length) >= length // 2)).long() if has_types else None
    return Batch(tokens_BS, types_BS, real_BS)


def onnx_logits(path: Path, batch: Batch) -> torch.Tensor:
    """What ONNX Runtime says of a batch."""
    session = open_session(path, threads=1)
    types_BS = torch.zeros_like(batch.tokens_BS) if batch.types_BS is None else batch.types_BS
    given = dict(zip(INPUTS, (batch.tokens_BS, types_BS, batch.real_BS.long())))
    wanted = [value.name for value in session.get_inputs()]
    return torch.from_numpy(session.run([OUTPUT], {name: given[name].numpy() for name in wanted})[0])


@pytest.mark.parametrize("name", KINDS)
def test_the_file_gives_the_logits_of_the_layout_that_wrote_the_checkpoint(
    pool: Pool, exported: Get, name: str
) -> None:
    one = exported(name)
    has_types = "--num-token-types 0" not in KINDS[name].options
    for num_samples, length in SHAPES:
        batch = batch_of(num_samples, length, has_types=has_types)
        by_rank = pool.run(one.layout.world_size, said, one.checkpoint, one.layout, batch)
        expected_BC = next(found.classes for found in by_rank if found is not None)
        found_BC = onnx_logits(one.path, batch)
        assert found_BC.shape == expected_BC.shape
        largest = float(expected_BC.abs().max())
        assert largest > 0.1, "outputs this small would hide a difference"
        assert (found_BC - expected_BC).abs().max() <= TOLERANCE * max(1.0, largest)


def test_the_report_tells_the_difference_that_was_found(exported: Get) -> None:
    report = exported("single").report
    assert 0 < report["largest_difference"] <= TOLERANCE * max(1.0, report["largest_output"])
    assert report["bytes"] == exported("single").path.stat().st_size
    assert "ONNX Runtime is at most" in export_onnx.summary(report)


def test_one_file_is_all_that_is_there_and_it_names_no_place_of_this_machine(exported: Get, tmp_path: Path) -> None:
    one = exported("single")
    assert [path.name for path in one.path.parent.iterdir()] == ["single.onnx"]
    assert str(ROOT).encode() not in one.path.read_bytes() and str(one.path.parents[1]).encode() not in (
        one.path.read_bytes()
    )
    alone = Path(shutil.copy(one.path, tmp_path / "moved.onnx"))
    metadata = open_session(alone, threads=1).get_modelmeta().custom_metadata_map
    description, packed = from_metadata(metadata, "moved.onnx")
    assert description.labels == ("negative", "positive") and description.task == "sst-2"
    assert (description.max_length, description.num_texts, description.is_regression) == (MAX_LENGTH, 1, False)
    assert packed.build().encode("good film") == [len(SPECIAL) + WORDS.index(word) for word in ("good", "film")]


def nudged(source: Path, amount: float) -> Callable[..., None]:
    """Stands for an exporter with a mistake: the file as it should be, but one bias is off by `amount`."""

    def write(model: object, path: Path, metadata: object, *, max_length: int) -> None:
        file = onnx.load(source)
        bias = next(tensor for tensor in file.graph.initializer if tensor.name.endswith("classifier.bias"))
        values = onnx.numpy_helper.to_array(bias).copy()
        values[0] += amount
        bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
        onnx.save(file, path)

    return write


@pytest.mark.parametrize("amount", [1e-3, 1e-4, math.nan])
def test_a_file_that_differs_from_torch_is_refused_and_the_one_before_stays(
    exported: Get, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, amount: float
) -> None:
    output = tmp_path / "model.onnx"
    args = export_onnx.parser().parse_args(["--load", str(exported("single").checkpoint), "--output", str(output)])
    monkeypatch.setattr(export_onnx, "write", nudged(exported("single").path, 0.0))
    export_onnx.export(args)
    before = output.read_bytes()
    monkeypatch.setattr(export_onnx, "write", nudged(exported("single").path, amount))
    with pytest.raises(NumericsError, match=r"ONNX Runtime is .* away from torch.*the file was not written"):
        export_onnx.export(args)
    assert output.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(
    ("difference", "largest", "is_within"),
    [(0.9e-5, 0.1, True), (1.1e-5, 0.1, False), (1.1e-5, 2.0, True), (2.1e-5, 2.0, False), (math.nan, 1.0, False)],
)
def test_the_tolerance_is_1e_5_of_the_largest_output_or_of_1(
    difference: float, largest: float, is_within: bool
) -> None:
    assert OutputDifference(difference, largest, 1).is_within_tolerance is is_within


def test_a_name_is_given_only_at_a_good_end(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "file"
    with temporary_beside(path) as temporary:
        temporary.write_text("first")
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), temporary_beside(path) as temporary:
        temporary.write_text("second")
        raise ZeroDivisionError
    assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]


def labelled_file(exported: Get, path: Path, *, num_right: int) -> Path:
    """20 sentences, of whose labels the fp32 model agrees with `num_right`."""
    classifier = open_classifier(exported("single").path, threads=1)
    texts = [" ".join(WORDS[(number + step) % 30] for step in range(3 + number % 5)) for number in range(20)]
    rows = classifier.encode([Sample(text) for text in texts], truncate=False)
    found = classifier.logits(rows).argmax(1)
    labels = [int(label) if number < num_right else 1 - int(label) for number, label in enumerate(found)]
    path.write_text("\n".join(["sentence\tlabel", *(f"{text}\t{label}" for text, label in zip(texts, labels))]) + "\n")
    return path


def test_int8_prints_what_it_costs_and_gives_nearly_the_same_outputs(
    exported: Get, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("sklearn", reason="metrics need scikit-learn: pip install -e '.[glue]'")
    one, output = exported("single"), tmp_path / "int8.onnx"
    dev = labelled_file(exported, tmp_path / "dev.tsv", num_right=15)
    monkeypatch.setattr(export_onnx, "write", lambda model, path, metadata, max_length: shutil.copy(one.path, path))
    words = ["--load", str(one.checkpoint), "--output", str(output), "--int8", "--dev-file", str(dev)]
    monkeypatch.setattr(sys, "argv", ["export_onnx.py", *words])
    export_onnx.main(RunContext(Launch()))
    out, err = capsys.readouterr()
    report = json.loads(out)
    fp32, int8 = report["metrics"]["accuracy"], report["int8_metrics"]["accuracy"]
    assert fp32 == 15 / 20 and abs(int8 - fp32) <= 0.2
    assert f"accuracy: fp32 0.7500, int8 {int8:.4f} ({int8 - fp32:+.4f})" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dev.tsv", "int8.onnx"]
    kinds = {tensor.data_type for tensor in onnx.load(output).graph.initializer}
    assert onnx.TensorProto.INT8 in kinds and open_classifier(output).description.precision == "int8"
    batch = batch_of(9, 12, has_types=True)
    difference = (onnx_logits(output, batch) - onnx_logits(one.path, batch)).abs().max()
    assert 0 < difference < 0.5


def export_with(exported: Get, tmp_path: Path, *options: str) -> dict[str, object]:
    """Run the tool on the classifier of single texts."""
    words = ["--load", str(exported("single").checkpoint), "--output", str(tmp_path / "x.onnx"), *options]
    return export_onnx.export(export_onnx.parser().parse_args(words))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ("--int8", ConfigError, "without labelled data nobody knows by how much"),
        ("--data-dir a --dev-file b", ConfigError, "--data-dir a and --dev-file b exclude each other"),
        ("--dev-file nowhere.tsv", DataError, "nowhere.tsv cannot be read"),
        ("--data-dir nowhere", DataError, "nowhere/dev.tsv cannot be read"),
        (
            "--dev-file x.tsv --second-text-column b",
            ConfigError,
            "gives 2 text(s) a sample and sst-2 reads 1; leave out",
        ),
        ("--label-names good", ConfigError, "--label-names good: the model has 2 classes (0, 1)"),
        ("--label-names good good", ConfigError, "give each of them one name"),
        ("--max-length 25", ConfigError, f"--max-length 25 must be from 3 to the model's {POSITIONS} positions"),
        ("--max-length 2", ConfigError, "--max-length 2 must be from 3"),
        ("--vocab-file nowhere.txt", DataError, "the tokenizer's file nowhere.txt cannot be read"),
        ("--ckpt-step 8", CheckpointError, "8"),
    ],
)
def test_options_that_cannot_work_are_refused_by_name_before_anything_is_written(
    exported: Get, tmp_path: Path, options: str, kind: type[Megatron3dError], message: str
) -> None:
    with pytest.raises(kind) as caught:
        export_with(exported, tmp_path, *options.split())
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_vocabulary_that_is_larger_than_the_models_is_refused(exported: Get, tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*SPECIAL, *(f"w{number}" for number in range(200))]) + "\n")
    with pytest.raises(ConfigError, match=r"has 205 ids, but the model of .* has"):
        export_with(exported, tmp_path, "--vocab-file", str(path))


def test_output_and_processes_are_checked_first(exported: Get, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = ["export_onnx.py", "--load", str(exported("single").checkpoint), "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(ConfigError, match=r"is a directory; give the name of a file, such as .*model\.onnx"):
        export_onnx.main(RunContext(Launch()))
    with pytest.raises(ConfigError, match="the export runs in one process, not in 2"):
        export_onnx.main(RunContext(Launch(world_size=2)))


@pytest.mark.parametrize(("model", "said_kind"), [("gpt2", "GPT"), ("bert", "BERT")])
def test_a_model_without_a_classifier_is_refused_with_the_way_to_one(
    tmp_path: Path, model: str, said_kind: str
) -> None:
    weights.save(parts_of(Case(model, Layout()), make_mesh(Layout())), tmp_path, 1, {})
    with pytest.raises(CheckpointError, match=rf"holds a {said_kind} without a classifier; fine-tune one with tools/"):
        open_trained(tmp_path, None, ServeOverrides())


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        open_trained(tmp_path, None, ServeOverrides())


def test_weights_that_do_not_fit_into_one_file_are_refused_before_they_are_read(
    exported: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trained, "MAX_WEIGHT_BYTES", 1000)
    with pytest.raises(ConfigError, match="bytes of fp32 weights, and one ONNX file holds 1000"):
        open_trained(exported("single").checkpoint, None, ServeOverrides())


def test_checkpoints_that_moved_take_the_vocabulary_beside_them(exported: Get, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(exported("single").checkpoint.parent, moved)
    beside = moved / "tokenizer" / "vocab.txt"
    beside.write_text("\n".join([*SPECIAL, *reversed(WORDS)]) + "\n")
    with pytest.raises(ConfigError, match=r"other content than that with which .* by --override-tokenizer"):
        open_trained(moved, None, ServeOverrides())
    taken = open_trained(moved, None, ServeOverrides(override_tokenizer=True))
    assert taken.tokenizer.files == {"vocab.txt": beside.read_bytes()}
    other = tmp_path / "other.txt"
    other.write_text("\n".join([*SPECIAL, "other"]) + "\n")
    overridden = open_trained(moved, None, ServeOverrides(vocab_file=str(other), override_tokenizer=True))
    assert overridden.tokenizer.files == {"other.txt": other.read_bytes()}


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"{package} is not installed; run: .*constraints.txt -e '.*\[onnx\]'"):
        require_exporter()
