"""Finding checkpoints, refusing what does not fit or is damaged, and telling two runs in one directory apart."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megatron3d.checkpoint.directory import (
    find_checkpoint,
    hold_directory,
    latest_checkpoint,
    list_checkpoints,
    step_of,
    verify,
)
from megatron3d.checkpoint.load import assemble, load_tensors, read_document, tensor_shapes
from megatron3d.checkpoint.save import save_checkpoint
from megatron3d.errors import CheckpointError, InUseError, StorageError
from megatron3d.params.boxes import ShardView, flat_range_to_boxes
from tests.checkpoint import crash
from tests.checkpoint.layouts import SPECS, SmallLayout, full_tensor, merged, views

SHARD = "rank00000.safetensors"


def save(root: Path, step: int) -> Path:
    return save_checkpoint(
        root,
        step,
        merged(SmallLayout(tp=2, dp=1)),
        documents={"run": {"hidden_size": 6}, "state": {"step": step}},
        keep_last=None,
        group=None,
        rank=0,
        world_size=1,
    )


def whole(name: str, shape: tuple[int, ...]) -> dict[str, ShardView]:
    """A tensor to load all of."""
    data = torch.zeros(torch.Size(shape).numel())
    return {name: ShardView(shape, tuple(flat_range_to_boxes(shape, 0, data.numel())), data)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to look at; copy it before changing it."""
    return save(tmp_path_factory.mktemp("root"), 20)


@pytest.fixture
def own(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / checkpoint.name))


# --- finding ---


def test_the_latest_is_found_unless_a_step_is_named(tmp_path: Path) -> None:
    first, second = save(tmp_path, 10), save(tmp_path, 20)
    assert find_checkpoint(tmp_path) == latest_checkpoint(tmp_path) == second
    assert find_checkpoint(tmp_path, 10) == first
    assert find_checkpoint(first) == first
    assert list_checkpoints(tmp_path) == [first, second]
    assert [step_of(first), step_of(second)] == [10, 20]


@pytest.mark.parametrize(
    ("there", "reason"),
    [
        ([], "it is empty"),
        (["corpus.bin", "corpus.idx"], "it holds corpus.bin, corpus.idx"),
        ([f"file{n}" for n in range(9)], "and 4 more"),
    ],
)
def test_a_directory_without_a_checkpoint_is_refused_with_what_is_there(
    tmp_path: Path, there: list[str], reason: str
) -> None:
    for name in there:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=re.escape(f"--load {tmp_path} has no file named latest")) as refusal:
        find_checkpoint(tmp_path)
    assert reason in str(refusal.value)
    assert latest_checkpoint(tmp_path) is None


def test_a_directory_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"--load .*nowhere is not a directory"):
        find_checkpoint(tmp_path / "nowhere")
    assert latest_checkpoint(tmp_path / "nowhere") is None
    assert list_checkpoints(tmp_path / "nowhere") == []


def test_a_step_that_was_not_saved_is_refused_with_those_that_were(tmp_path: Path) -> None:
    save(tmp_path, 10), save(tmp_path, 20)
    with pytest.raises(CheckpointError, match=r"--ckpt-step 15: .* holds checkpoints of steps 10, 20"):
        find_checkpoint(tmp_path, 15)


def test_a_latest_that_names_nothing_is_refused_and_not_taken_for_a_new_start(tmp_path: Path) -> None:
    save(tmp_path, 10)
    shutil.rmtree(save(tmp_path, 20))
    for find in (find_checkpoint, latest_checkpoint):
        with pytest.raises(CheckpointError, match=r"names 'iter_0000020', which is not a checkpoint .* of steps 10"):
            find(tmp_path)
    (tmp_path / "latest").write_text("../elsewhere")
    with pytest.raises(CheckpointError, match=r"names '\.\./elsewhere'"):
        latest_checkpoint(tmp_path)


def test_a_directory_without_an_index_is_not_a_checkpoint(own: Path) -> None:
    (own / "index.json").unlink()
    assert list_checkpoints(own.parent) == []
    assert verify(own) == [f"{own} is not a checkpoint: it has no index.json; give the directory that --save wrote"]


# --- what fits and what does not ---


def test_a_vocabulary_larger_than_the_saved_one_is_refused_with_the_option(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError) as refusal:
        load_tensors(checkpoint, whole("model/embedding.word.weight", (20, 6)), group=None)
    text = str(refusal.value)
    assert "model/embedding.word.weight has shape (13, 6) there and (20, 6) here" in text
    assert "--vocab-size 20 is larger than the checkpoint's 13; use --vocab-size 13" in text


def test_another_shape_is_refused_with_both_shapes_and_where_to_look(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"fc1.bias has shape \(12,\) there and \(16,\) here.*run\.json"):
        load_tensors(checkpoint, whole("model/layers.0.fc1.bias", (16,)), group=None)


def test_a_tensor_that_was_not_saved_is_named(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor model/layers\.9\.fc1\.bias"):
        load_tensors(checkpoint, whole("model/layers.9.fc1.bias", (12,)), group=None)
    with pytest.raises(CheckpointError, match=r"no tensor exp_avg/scale; .*--no-load-optim"):
        load_tensors(checkpoint, whole("exp_avg/scale", (1,)), group=None)
    with pytest.raises(CheckpointError, match="has no tensor model/nothing; it has model/embedding"):
        assemble(checkpoint, "model/nothing")


def test_only_the_first_of_many_problems_are_told(checkpoint: Path) -> None:
    many = {name: view for n in range(30) for name, view in whole(f"model/new{n}", (2,)).items()}
    with pytest.raises(CheckpointError, match="and 25 more tensors"):
        load_tensors(checkpoint, many, group=None)


def test_a_part_of_the_tensors_can_be_loaded(checkpoint: Path) -> None:
    wanted = whole("model/layers.0.norm.weight", (7,))
    load_tensors(checkpoint, wanted, group=None)
    assert torch.equal(wanted["model/layers.0.norm.weight"].data, full_tensor("model/layers.0.norm.weight", (7,)))


def test_documents_come_back_as_they_were_given(checkpoint: Path) -> None:
    assert read_document(checkpoint, "run") == {"hidden_size": 6}
    with pytest.raises(CheckpointError, match=r"has no notes\.json; it has run\.json, state\.json"):
        read_document(checkpoint, "notes")


def test_shapes_are_listed_without_reading_tensors(checkpoint: Path) -> None:
    assert tensor_shapes(checkpoint) == {f"model/{spec.name}": spec.shape for spec in SPECS}


# --- damage ---


def test_a_missing_file_is_named(own: Path) -> None:
    (own / SHARD).unlink()
    assert [problem.partition(";")[0] for problem in verify(own, "sizes")] == [
        f"checkpoint file {own / SHARD} is missing (No such file or directory)"
    ]
    with pytest.raises(CheckpointError, match=re.escape(f"{own / SHARD} is missing")):
        load_tensors(own, views(SmallLayout(1, 1), 0, filled=False), group=None)
    with pytest.raises(CheckpointError, match=re.escape(f"{own / SHARD} is missing")):
        assemble(own, "model/scale")


def test_a_truncated_file_is_named_with_both_lengths(own: Path) -> None:
    size = (own / SHARD).stat().st_size
    os.truncate(own / SHARD, size - 4)
    with pytest.raises(CheckpointError, match=f"{SHARD} is damaged: {size - 4} bytes long instead of {size}"):
        load_tensors(own, views(SmallLayout(1, 1), 0, filled=False), group=None)
    assert len(verify(own, "sizes")) == 1


def flip(path: Path, position: int, bit: int = 0) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def test_a_flipped_bit_is_found_in_the_tensor_it_hit_and_does_not_hinder_others(own: Path) -> None:
    original = {key: value.clone() for key, value in load_file(own / SHARD).items()}  # not the mapped file
    flip(own / SHARD, -1)
    changed = load_file(own / SHARD)  # The format itself does not notice.
    (key,) = [key for key in original if not torch.equal(original[key], changed[key])]
    hit = key.partition("@")[0]
    assert verify(own, "headers") == []
    assert len(verify(own, "full")) == 1 and hit in verify(own, "full")[0]
    for spec in SPECS:
        name, wanted = f"model/{spec.name}", whole(f"model/{spec.name}", spec.shape)
        if name != hit:
            load_tensors(own, wanted, group=None)
            continue
        with pytest.raises(CheckpointError, match=rf"{SHARD} is damaged at tensor {re.escape(hit)} .*checksum"):
            load_tensors(own, wanted, group=None)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    file=st.sampled_from([SHARD, "index.json", "run.json"]),
    where=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
)
def test_any_flipped_bit_of_any_file_is_found(own: Path, file: str, where: float, bit: int) -> None:
    position = int(where * (own / file).stat().st_size)
    flip(own / file, position, bit)
    try:
        assert any(file in problem for problem in verify(own, "full"))
    finally:
        flip(own / file, position, bit)


def test_a_changed_document_is_refused(own: Path) -> None:
    (own / "run.json").write_text((own / "run.json").read_text().replace("6", "8"))
    with pytest.raises(CheckpointError, match=r"run\.json was changed or damaged"):
        read_document(own, "run")


def test_an_index_of_a_later_version_is_refused_with_both_versions(own: Path) -> None:
    text = (own / "index.json").read_text()
    (own / "index.json").write_text(text.replace('"version": 1', '"version": 2'))
    with pytest.raises(CheckpointError, match=r"version 2, this program reads .* version 1"):
        tensor_shapes(own)


# --- two runs ---


def test_a_second_run_in_the_same_directory_is_refused_with_who_holds_it(tmp_path: Path) -> None:
    with hold_directory(tmp_path / "new"):
        with (
            pytest.raises(InUseError, match=f"process {os.getpid()} on {re.escape(socket.gethostname())}") as refusal,
            hold_directory(tmp_path / "new"),
        ):
            pass
        assert refusal.value.exit_code == 8
    with hold_directory(tmp_path / "new"):
        pass


def test_a_killed_run_leaves_no_lock(tmp_path: Path) -> None:
    def hold_and_die() -> None:
        with hold_directory(tmp_path):
            crash.kill()

    assert crash.in_fork(hold_and_die) == -signal.SIGKILL
    with hold_directory(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()


def test_a_directory_that_was_removed_is_held_again_before_anybody_else_can(tmp_path: Path) -> None:
    root = tmp_path / "save"
    with hold_directory(root) as held:
        assert held.renew() is None
        shutil.rmtree(root)
        assert f"--save {root} was removed while this run was saving there" in (held.renew() or "")
        with pytest.raises(InUseError, match=f"process {os.getpid()}"), hold_directory(root):
            pass
        (root / ".lock").unlink()
        assert held.renew() is not None and held.renew() is None
    with hold_directory(root):
        pass


def test_a_directory_that_was_removed_and_taken_by_another_run_is_lost(tmp_path: Path) -> None:
    root = tmp_path / "save"
    with hold_directory(root) as first:
        shutil.rmtree(root)
        with hold_directory(root):
            for _ in range(2):
                with pytest.raises(InUseError, match="is in use by another run"):
                    first.renew()
        assert first.renew() is not None, "the other run has ended"


def test_saving_and_finding_do_not_mind_the_lock(tmp_path: Path) -> None:
    with hold_directory(tmp_path):
        assert find_checkpoint(save(tmp_path, 10).parent) == tmp_path / "iter_0000010"
    assert (tmp_path / ".lock").exists()


def test_a_save_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="Not a directory"), hold_directory(tmp_path / "file" / "runs"):
        pass
