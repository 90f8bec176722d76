"""What describes a classifier, in a checkpoint and inside an ONNX file: read field by field, or refused."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron3d.checkpoint.index import read_index
from megatron3d.checkpoint.save import save_checkpoint
from megatron3d.convert.task_document import read_task_document
from megatron3d.data.tokenizer import TokenizerSpec
from megatron3d.errors import CheckpointError, DataError, Megatron3dError
from megatron3d.params.boxes import Box, ShardView
from megatron3d.serve.description import ClassifierDescription, from_metadata, to_metadata
from megatron3d.serve.packed_tokenizer import pack
from megatron3d.tasks.glue.tasks import find_task
from megatron3d.tasks.glue.weights import task_document
from tests.files.mutations import mutated_bytes, mutated_values
from tests.serve.small import write_vocabulary

DOCUMENT = task_document(find_task("sst-2"), max_length=20, metrics={"accuracy": 0.5})
DESCRIPTION = ClassifierDescription("sst-2", ("bad", "good"), False, None, 1, 20)


def saved(root: Path, document: dict[str, Any]) -> Path:
    """A checkpoint with this task.json."""
    views = {"model/x": ShardView((1,), (Box((0,), (1,)),), torch.zeros(1))}
    return save_checkpoint(
        root, 1, views, documents={"task": document}, keep_last=None, group=None, rank=0, world_size=1
    )


@pytest.mark.parametrize("name", ["sst-2", "mnli", "sts-b"])
def test_what_a_fine_tuning_writes_is_read_as_it_was(tmp_path: Path, name: str) -> None:
    document = task_document(find_task(name), max_length=20, metrics={})
    directory = saved(tmp_path, document)
    assert read_task_document(directory, read_index(directory)) == document


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"labels": "01"}, "labels '01', which must be a list of strings"),
        ({"labels": ["0", 1]}, "must be a list of strings"),
        ({"labels": ["0"]}, "has 1 labels for 2 outputs"),
        ({"is_regression": True}, "says is_regression beside it"),
        ({"num_texts": 3}, "num_texts 3, which must be 1 or 2"),
        ({"max_seq_length": 2}, "max_seq_length 2, which must be a whole number from 3 up"),
        ({"value_range": [5, 0]}, "two finite numbers that rise"),
        ({"task": None}, "task None, which must be a string"),
    ],
)
def test_a_field_that_cannot_be_is_named(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    directory = saved(tmp_path, DOCUMENT | values)
    with pytest.raises(CheckpointError, match=message):
        read_task_document(directory, read_index(directory))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changed=mutated_values(DOCUMENT))
def test_a_changed_task_json_is_read_or_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    directory = saved(tmp_path, changed)
    with contextlib.suppress(CheckpointError):
        found = read_task_document(directory, read_index(directory))
        assert found is not None and len(found["labels"]) in (0, found["num_outputs"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_metadata_of_an_onnx_file_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    packed = pack(TokenizerSpec("BertWordPieceLowerCase", vocab_file=str(write_vocabulary(tmp_path))))
    metadata = to_metadata(DESCRIPTION, packed)
    name = data.draw(st.sampled_from([*metadata]))
    text = data.draw(mutated_bytes(json.loads(metadata[name]))).decode(errors="replace")
    with contextlib.suppress(Megatron3dError):
        description, tokenizer = from_metadata(metadata | {name: text}, "model.onnx")
        assert description.num_outputs >= 1
        tokenizer.build()


def test_labels_that_are_the_same_are_refused() -> None:
    metadata = to_metadata(DESCRIPTION, pack(TokenizerSpec("ByteTokenizer")))
    twins = json.loads(metadata["megatron3d.classifier"]) | {"labels": ["good", "good"]}
    with pytest.raises(DataError, match="must be different names"):
        from_metadata(metadata | {"megatron3d.classifier": json.dumps(twins)}, "model.onnx")
