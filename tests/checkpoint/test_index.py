"""Indexes of checkpoints that are not what a save writes: refused by what is wrong, whatever their checksum says."""

from __future__ import annotations

import contextlib
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron3d.checkpoint.coverage import cover_problem
from megatron3d.checkpoint.directory import verify
from megatron3d.checkpoint.index import Index, read_index
from megatron3d.checkpoint.load import assemble, load_tensors, read_document
from megatron3d.checkpoint.save import save_checkpoint
from megatron3d.errors import CheckpointError, Megatron3dError
from megatron3d.params.boxes import Box, flat_range_to_boxes
from tests.checkpoint.layouts import SPECS, SmallLayout, merged, views
from tests.files.mutations import mutated_bytes, mutated_values

SHARD, WEIGHT = "rank00000.safetensors", f"model/{SPECS[0].name}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to look at; copy it before changing it."""
    return save_checkpoint(
        tmp_path_factory.mktemp("root"),
        20,
        merged(SmallLayout(tp=2, dp=2)),
        documents={"run": {"hidden_size": 6}},
        keep_last=None,
        group=None,
        rank=0,
        world_size=1,
    )


@pytest.fixture
def own(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of it to change."""
    return Path(shutil.copytree(checkpoint, tmp_path / checkpoint.name))


def sealed(body: dict[str, Any]) -> str:
    """The text of an index with the checksum that belongs to it, by the description in docs/checkpoint.md."""
    rest = {key: value for key, value in body.items() if key != "crc32"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return json.dumps({"crc32": f"{zlib.crc32(text.encode()):08x}", **rest})


def change(directory: Path, changed: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite the index with a change and a checksum that agrees."""
    body = json.loads((directory / "index.json").read_text())
    changed(body)
    (directory / "index.json").write_text(sealed(body))


def box(body: dict[str, Any], number: int = 0) -> dict[str, Any]:
    return body["tensors"][WEIGHT]["boxes"][number]


def rename_shard(name: str) -> Callable[[dict[str, Any]], None]:
    def renamed(body: dict[str, Any]) -> None:
        body["files"] = {name: body["files"][SHARD]}
        for tensor in body["tensors"].values():
            for stored in tensor["boxes"]:
                stored["file"] = name

    return renamed


NOT_A_PLAIN_NAME = "which is not the plain name of a file inside the checkpoint"
WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a path that leads out": (rename_shard(f"../other/{SHARD}"), NOT_A_PLAIN_NAME),
    "an absolute path": (rename_shard("/etc/passwd"), NOT_A_PLAIN_NAME),
    "a folder": (rename_shard(f"x/{SHARD}"), NOT_A_PLAIN_NAME),
    "the directory above": (rename_shard(".."), NOT_A_PLAIN_NAME),
    "a zero byte": (rename_shard("a\0b"), NOT_A_PLAIN_NAME),
    "a document outside": (lambda b: b["documents"].update({"../run.json": b["documents"]["run.json"]}), "../run.json"),
    "a box in no file": (lambda b: box(b).update(file="rank7.safetensors"), "'rank7.safetensors', which is none of"),
    "a box outside": (lambda b: box(b).update(offset=[9999, 0]), "outside of it"),
    "a box of other dimensions": (lambda b: box(b).update(offset=[0]), "outside of it"),
    "a negative offset": (lambda b: box(b).update(offset=[-1, 0]), "must be a list of whole numbers from 0 up"),
    "a shape of text": (lambda b: b["tensors"][WEIGHT].update(shape="67"), "must be a list of whole numbers"),
    "an unknown dtype": (lambda b: b["tensors"][WEIGHT].update(dtype="int4"), "has the dtype 'int4'; known are"),
    "a dtype that is a list": (lambda b: b["tensors"][WEIGHT].update(dtype=[1]), r"dtype [1], which must be a string"),
    "boxes that are a number": (lambda b: b["tensors"][WEIGHT].update(boxes=7), "must be a list of objects"),
    "tensors that are a list": (lambda b: b.update(tensors=[]), "must be an object"),
    "a step that is a word": (lambda b: b.update(step="x"), "step 'x', which must be a whole number"),
    "a size that is true": (lambda b: b["files"].update({SHARD: True}), "must be a whole number"),
    "a checksum that is none": (lambda b: box(b).update(crc32="zz"), "must be eight hexadecimal digits"),
    "a field that is gone": (lambda b: b.pop("files"), "has no field 'files'"),
    "a tensor without boxes": (lambda b: b["tensors"][WEIGHT].update(boxes=[]), "0 boxes hold 0 of its"),
    "a gap": (lambda b: b["tensors"][WEIGHT]["boxes"].pop(), "is not whole: its"),
    "a box twice": (lambda b: b["tensors"][WEIGHT]["boxes"].append(box(b)), "is there twice"),
    "a tensor that is larger": (lambda b: b["tensors"][WEIGHT].update(shape=[99, 6]), "of its 594 elements"),
    "an entry of two tensors": (lambda b: b["tensors"].update(twin=b["tensors"][WEIGHT]), f"stands for {WEIGHT} and"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_index_that_no_save_writes_is_refused_by_every_reader(own: Path, case: str) -> None:
    changed, message = WRONG[case]
    assert verify(own) == []
    change(own, changed)
    assert any(message in problem for problem in verify(own, "sizes"))
    with pytest.raises(CheckpointError) as refusal:
        load_tensors(own, views(SmallLayout(1, 1), 0, filled=False), group=None)
    assert message in str(refusal.value) and str(own / "index.json") in str(refusal.value)
    for read in (lambda: assemble(own, WEIGHT), lambda: read_document(own, "run")):
        with pytest.raises(CheckpointError):
            read()


def test_every_tensor_that_is_not_whole_is_named(own: Path) -> None:
    def without_boxes(body: dict[str, Any]) -> None:
        for tensor in body["tensors"].values():
            tensor["boxes"] = tensor["boxes"][1:]

    change(own, without_boxes)
    named = [problem for problem in verify(own, "sizes") if "is not whole" in problem]
    assert len(named) == len(SPECS)


def test_an_entry_that_the_index_does_not_name_is_found(own: Path) -> None:
    change(own, lambda body: body["tensors"].pop(WEIGHT))
    assert verify(own, "sizes") == []
    for level in ("headers", "full"):
        problems = verify(own, level)
        assert problems and all(f"has the entry {WEIGHT}@" in problem for problem in problems)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_index_with_a_valid_checksum_is_read_or_refused(own: Path, data: st.DataObject) -> None:
    path = own / "index.json"
    before = path.read_bytes()
    changed = data.draw(mutated_values(json.loads(before)))
    path.write_text(sealed(changed) if isinstance(changed, dict) else "[]")
    try:
        problems = verify(own, "full")
        assert all(isinstance(problem, str) for problem in problems)
        load_tensors(own, views(SmallLayout(1, 1), 0, filled=False), group=None)
        assemble(own, WEIGHT)
    except Megatron3dError:
        pass
    finally:
        path.write_bytes(before)


@settings(max_examples=100, deadline=None)
@given(data=mutated_bytes({"crc32": "0", "format": "megatron3d-checkpoint", "version": 1, "step": 1}))
def test_any_text_of_an_index_is_refused_with_a_sentence(data: bytes) -> None:
    with pytest.raises(CheckpointError):
        Index.from_json(data.decode(errors="replace"), Path("index.json"))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=mutated_bytes({"step": 20, "values": [1, {"a": "b"}]}))
def test_a_document_with_a_valid_checksum_is_an_object_or_refused(own: Path, data: bytes) -> None:
    (own / "run.json").write_bytes(data)
    change(own, lambda b: b["documents"]["run.json"].update(size_bytes=len(data), crc32=f"{zlib.crc32(data):08x}"))
    with contextlib.suppress(CheckpointError):
        assert isinstance(read_document(own, "run"), dict)


# --- coverage ---


def counts(shape: tuple[int, ...], boxes: list[Box]) -> np.ndarray:
    """How many boxes hold each element, counted one by one."""
    found = np.zeros(shape, dtype=int)
    for one in boxes:
        found[one.slices()] += 1
    return found


_SHAPES = st.sampled_from([(), (0,), (1,), (7,), (4, 3), (3, 4), (2, 3, 4), (5, 0, 2)])


@settings(max_examples=300, deadline=None)
@given(data=st.data(), shape=_SHAPES)
def test_coverage_is_found_as_by_counting_elements(data: st.DataObject, shape: tuple[int, ...]) -> None:
    size = int(np.prod(shape))
    cuts = sorted(data.draw(st.lists(st.integers(0, size), max_size=4)))
    whole = [one for pair in zip([0, *cuts], [*cuts, size]) for one in flat_range_to_boxes(shape, *pair)]
    boxes = data.draw(st.permutations(whole))
    if boxes and data.draw(st.booleans()):
        boxes.pop()
    if boxes and data.draw(st.booleans()):
        boxes.append(data.draw(st.sampled_from(boxes)))
    if shape and data.draw(st.booleans()):
        offset = tuple(data.draw(st.integers(0, n)) for n in shape)
        boxes.append(Box(offset, tuple(data.draw(st.integers(0, n - o)) for n, o in zip(shape, offset))))
    is_whole = bool((counts(shape, boxes) == 1).all())
    assert (cover_problem(shape, boxes) is None) is is_whole


def test_boxes_of_any_layout_cover_their_tensors() -> None:
    for layout in (SmallLayout(1, 1), SmallLayout(2, 1), SmallLayout(3, 2), SmallLayout(2, 4)):
        for name, view in merged(layout).items():
            assert cover_problem(view.full_shape, view.boxes) is None, name


def test_the_index_that_is_written_is_the_one_that_is_read(checkpoint: Path) -> None:
    index = read_index(checkpoint)
    assert Index.from_json(index.to_json(), checkpoint) == index and index.problems() == []
