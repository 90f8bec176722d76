"""The served model without HTTP: texts become the ids they were in training, and company changes no answer."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron3d.data.tokenizer import ByteTokenizer, TokenizerSpec
from megatron3d.errors import ConfigError, DataError
from megatron3d.serve.classifier import Classifier, EncodedSample, open_classifier, probabilities
from megatron3d.serve.description import from_metadata, to_metadata
from megatron3d.serve.digest import DIGEST_BYTES, append_digest
from megatron3d.serve.packed_tokenizer import from_text, pack
from megatron3d.serve.requests import RequestError, Sample
from megatron3d.serve.trained import ServeOverrides, load_classifier, open_trained
from megatron3d.tasks.glue.encode import encode
from megatron3d.tasks.glue.read import SampleTable
from tests.serve.conftest import Exported
from tests.serve.small import MAX_LENGTH, WORDS

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install -e '.[serve]'")
onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install -e '.[onnx]'")
pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install -e '.[onnx]'")

Get = Callable[[str], Exported]
TOLERANCE = 1e-5
TEXTS = st.lists(st.sampled_from([*WORDS, "unheard", "Goods"]), min_size=1, max_size=30).map(" ".join)


@pytest.fixture(scope="module")
def opened(exported: Get) -> Callable[[str], Classifier]:
    """The classifiers on one thread, each opened once."""
    found: dict[str, Classifier] = {}

    def get(name: str) -> Classifier:
        if name not in found:
            found[name] = open_classifier(exported(name).path, threads=1)
        return found[name]

    return get


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4), is_pair=st.booleans())
def test_texts_become_the_ids_and_types_of_fine_tuning(
    opened: Callable[[str], Classifier], texts: list[tuple[str, str]], is_pair: bool
) -> None:
    classifier = opened("pairs")
    firsts, seconds = zip(*texts)
    rows = SampleTable(Path("train.tsv"), (firsts, seconds) if is_pair else (firsts,), None)
    trained = encode(rows, classifier.tokenizer, max_length=MAX_LENGTH)
    samples = [Sample(a, b if is_pair else None) for a, b in texts]
    served = classifier.encode(samples, truncate=True)
    assert [id for row in served for id in row.ids] == trained.tokens_T.tolist()
    assert [len(row.ids) for row in served] == trained.lengths_N.tolist()
    assert [row.first_length for row in served] == trained.first_lengths_N.tolist()
    assert sum(row.is_cut for row in served) == trained.num_cut


@pytest.mark.parametrize("name", ["single", "pairs", "regression"])
def test_padding_beside_longer_texts_changes_no_output(opened: Callable[[str], Classifier], name: str) -> None:
    classifier = opened(name)
    texts = ["good", "not good .", "why a film that is long is very poor !", "it was fine"]
    pair = None if classifier.description.num_texts == 1 else "a story"
    rows = classifier.encode([Sample(text, pair) for text in texts], truncate=False)
    alone_NC = np.concatenate([classifier.logits([row]) for row in rows])
    assert alone_NC.std() > 0.05, "outputs this alike would hide a mixed-up order"
    largest = max(1.0, float(np.abs(alone_NC).max()))
    assert np.abs(classifier.logits(rows) - alone_NC).max() < TOLERANCE * largest
    many = [number % 4 for number in range(30)]
    found_NC = classifier.logits_by_length([rows[number] for number in many])
    assert np.abs(found_NC - alone_NC[many]).max() < TOLERANCE * largest


def test_outputs_of_pairs_are_those_of_torch_on_a_batch_of_fine_tuning(
    opened: Callable[[str], Classifier], exported: Get
) -> None:
    classifier, model = (
        opened("pairs"),
        load_classifier(open_trained(exported("pairs").checkpoint, None, ServeOverrides())),
    )
    texts = (("good film", "good film", "it was dull and long ."), ("bad plot", "good plot", "why ?"))
    batch = encode(SampleTable(Path("dev.tsv"), texts, None), classifier.tokenizer, max_length=MAX_LENGTH).batch(
        np.arange(3), np.ones(3, dtype=np.float32), MAX_LENGTH
    )
    assert batch.token_types_BS.any() and batch.padding_mask_BS is not None
    with torch.no_grad():
        expected_NC = model(batch.tokens_BS, batch.token_types_BS, batch.padding_mask_BS.long()).numpy()
    rows = classifier.encode([Sample(a, b) for a, b in zip(*texts)], truncate=False)
    assert np.abs(classifier.logits(rows) - expected_NC).max() < TOLERANCE * max(1.0, float(np.abs(expected_NC).max()))


def test_answers_are_the_softmax_and_its_largest_label(opened: Callable[[str], Classifier]) -> None:
    classifier, row = opened("single"), EncodedSample([2, 3], 2)
    answer = classifier.answer(np.array([1.0, 3.0], dtype=np.float32), row)
    positive = 1 / (1 + np.exp(-2.0))
    assert answer == {
        "label": "positive",
        "scores": {"negative": pytest.approx(1 - positive), "positive": pytest.approx(positive)},
    }
    assert probabilities(np.array([1e4, -1e4], dtype=np.float32)).tolist() == [1.0, 0.0]


def test_values_of_a_regression_stay_in_its_range(opened: Callable[[str], Classifier]) -> None:
    classifier, row = opened("regression"), EncodedSample([2, 3], 2)
    found = [classifier.answer(np.array([value], dtype=np.float32), row)["value"] for value in (-1.0, 2.5, 7.0)]
    assert found == [0.0, 2.5, 5.0]


def test_outputs_that_are_not_finite_are_an_error_and_no_answer(opened: Callable[[str], Classifier]) -> None:
    with pytest.raises(DataError, match="outputs are not finite"):
        opened("single").answer(np.array([0.0, np.nan], dtype=np.float32), EncodedSample([2, 3], 2))


def test_a_text_may_fill_the_model_and_one_word_more_is_refused_or_cut(opened: Callable[[str], Classifier]) -> None:
    classifier = opened("single")
    full, over = ["good"] * (MAX_LENGTH - 2), ["good"] * (MAX_LENGTH - 1)
    (row,) = classifier.encode([Sample(" ".join(full))], truncate=False)
    assert len(row.ids) == MAX_LENGTH and not row.is_cut
    with pytest.raises(RequestError, match=f"text 1 has {MAX_LENGTH + 1} tokens, 2 special ones included") as caught:
        classifier.encode([Sample("good"), Sample(" ".join(over))], truncate=False)
    assert caught.value.status == 413
    (cut,) = classifier.encode([Sample(" ".join(over))], truncate=True)
    assert cut.ids == row.ids and cut.is_cut
    assert classifier.answer(classifier.logits([cut])[0], cut)["truncated"] is True


def test_a_text_of_which_nothing_is_left_is_refused(opened: Callable[[str], Classifier]) -> None:
    with pytest.raises(RequestError, match="text 1 has no characters that the model reads") as caught:
        opened("single").encode([Sample("good"), Sample("\u200b\x00")], truncate=False)
    assert caught.value.status == 422


def test_files_that_are_no_exported_classifier_are_refused_by_name(exported: Get, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(DataError, match=r"model\.onnx is not a file"):
        open_classifier(path)
    path.write_bytes(exported("single").path.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"model\.onnx does not end with the digest"):
        open_classifier(path)
    append_digest(path)
    with pytest.raises(DataError, match=r"model\.onnx cannot be read as an ONNX model"):
        open_classifier(path)
    model = onnx.load(exported("single").path)
    metadata = {prop.key: prop.value for prop in model.metadata_props}
    for spoil, message in (
        ({}, r"has no metadata 'megatron3d\.classifier'"),
        (metadata | {"megatron3d.classifier": "{"}, "its description cannot be read"),
        (metadata | {"megatron3d.classifier": "{}"}, "its description cannot be read"),
        (metadata | {"megatron3d.tokenizer": "{}"}, "the tokenizer inside the model cannot be read"),
        (metadata | {"megatron3d.classifier": three_labels(metadata)}, "its description has 3 outputs"),
    ):
        del model.metadata_props[:]
        onnx.helper.set_model_props(model, spoil)
        onnx.save(model, path)
        append_digest(path)
        with pytest.raises(DataError, match=message):
            open_classifier(path)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_file_with_any_bit_flipped_is_not_served(exported: Get, tmp_path: Path, where: float, bit: int) -> None:
    content = bytearray(exported("single").path.read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    path = tmp_path / "flipped.onnx"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"digest|SHA-256"):
        open_classifier(path)


def test_the_digest_is_the_sha256_of_all_before_it_and_programs_of_onnx_read_it(exported: Get) -> None:
    content, path = exported("single").path.read_bytes(), exported("single").path
    metadata = {prop.key: prop.value for prop in onnx.load(path).metadata_props}
    assert metadata["megatron3d.sha256"] == hashlib.sha256(content[:-DIGEST_BYTES]).hexdigest()
    onnx.checker.check_model(str(path))


@pytest.mark.parametrize("kept", [0, 1, 50, 0.5, -1, -DIGEST_BYTES])
def test_a_file_that_was_cut_is_not_served(exported: Get, tmp_path: Path, kept: float) -> None:
    content, path = exported("single").path.read_bytes(), tmp_path / "cut.onnx"
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(DataError, match=r"cut\.onnx does not end with the digest"):
        open_classifier(path)


def three_labels(metadata: dict[str, str]) -> str:
    """The description of a model with one class more than it has."""
    description, packed = from_metadata(metadata, "model.onnx")
    return to_metadata(replace(description, labels=("a", "b", "c")), packed)["megatron3d.classifier"]


def test_a_missing_runtime_is_named(exported: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    path = exported("single").path
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"onnxruntime is not installed; run: .*constraints.txt -e '.*\[serve\]'"):
        open_classifier(path)


def test_a_tokenizer_without_special_tokens_is_refused(opened: Callable[[str], Classifier]) -> None:
    with pytest.raises(DataError, match=r"has no \[CLS\] and no \[SEP\] and no \[PAD\]"):
        Classifier(None, opened("single").description, ByteTokenizer())


def test_a_packed_tokenizer_is_the_same_one_elsewhere(exported: Get, tmp_path: Path) -> None:
    vocabulary = exported("single").checkpoint.parent / "tokenizer" / "vocab.txt"
    spec = TokenizerSpec("BertWordPieceLowerCase", vocab_file=str(vocabulary))
    again = from_text(pack(spec).to_text()).build()
    text = "It WASN'T good , unheard-of !"
    assert again.encode(text) == spec.build().encode(text) and again.cls == spec.build().cls
    library = tokenizers.BertWordPieceTokenizer(str(vocabulary), lowercase=True)
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "special_tokens_map.json").write_text('{"cls_token": "[CLS]"}')
    for path in (tmp_path / "tokenizer.json", tmp_path):
        packed = from_text(pack(TokenizerSpec("HuggingFaceTokenizer", tokenizer_model=str(path))).to_text())
        assert packed.build().encode(text) == again.encode(text) and packed.build().cls == again.cls


@pytest.mark.parametrize("name", ["../escaped", "/etc/escaped", "a/b", "..", ".", ""])
def test_names_inside_a_model_cannot_leave_the_folder_of_its_tokenizer(name: str) -> None:
    text = json.dumps({"kind": "BertWordPieceCase", "options": {"vocab_file": name}, "files": {name: "YQ=="}})
    with pytest.raises(DataError, match="which is no file of it"):
        from_text(text)
