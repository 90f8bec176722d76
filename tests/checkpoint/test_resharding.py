"""Any layout reads what any other wrote, bit for bit: simulated for many layouts, with real processes for a few."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron3d.checkpoint.directory import latest_checkpoint, verify
from megatron3d.checkpoint.index import read_index
from megatron3d.checkpoint.load import assemble, load_tensors
from megatron3d.checkpoint.save import save_checkpoint
from megatron3d.params.boxes import Box, ShardView
from tests.checkpoint.layouts import SPECS, SmallLayout, full_tensor, merged, views, wrong
from tests.dist.pool import Pool

LAYOUTS = st.builds(SmallLayout, tp=st.sampled_from([1, 2, 3, 6]), dp=st.integers(1, 5), sliced=st.booleans())


def save_alone(root: Path, tensors: dict[str, ShardView], step: int = 1) -> Path:
    return save_checkpoint(root, step, tensors, documents={}, keep_last=None, group=None, rank=0, world_size=1)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(written=LAYOUTS, read=LAYOUTS, data=st.data())
def test_any_layout_reads_what_any_other_wrote(
    tmp_path: Path, written: SmallLayout, read: SmallLayout, data: st.DataObject
) -> None:
    directory = save_alone(tmp_path, merged(written))
    rank = data.draw(st.integers(0, read.world_size - 1))
    held = views(read, rank, filled=False)
    load_tensors(directory, held, group=None)
    assert wrong(held) == []


def test_assembled_tensors_equal_the_full_ones(tmp_path: Path) -> None:
    directory = save_alone(tmp_path, merged(SmallLayout(tp=3, dp=4)))
    for spec in SPECS:
        name = f"model/{spec.name}"
        assert torch.equal(assemble(directory, name), full_tensor(name, spec.shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_values_are_converted_to_the_dtype_of_the_buffer_as_copy_does(tmp_path: Path, dtype: torch.dtype) -> None:
    directory = save_alone(tmp_path, merged(SmallLayout(tp=2, dp=3)))
    held = {
        name: ShardView(view.full_shape, view.boxes, torch.zeros_like(view.data, dtype=dtype))
        for name, view in views(SmallLayout(1, 1), 0, filled=False).items()
    }
    load_tensors(directory, held, group=None)
    for name, view in held.items():
        assert torch.equal(view.data, full_tensor(name, view.full_shape).to(dtype).flatten())


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.int64,
        torch.int8,
        torch.uint8,
        torch.bool,
    ],
)
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    value = torch.randint(0, 2, (3, 5)).to(dtype)
    odd = torch.ones(3, dtype=torch.uint8)  # An odd number of bytes beside it must not shift anything.
    boxes = {
        "x": ShardView((3, 5), (Box((0, 0), (3, 5)),), value.flatten()),
        "odd": ShardView((3,), (Box((0,), (3,)),), odd),
    }
    directory = save_alone(tmp_path, boxes)
    assert torch.equal(assemble(directory, "x").view(torch.uint8), value.view(torch.uint8))
    assert assemble(directory, "x").dtype == dtype


def save_body(rank: int, world_size: int, root: str, layout: SmallLayout) -> None:
    """Save `layout` with real processes, moments included."""
    tensors = views(layout, rank, filled=True) | views(layout, rank, filled=True, prefix="exp_avg/")
    if rank % 2:
        del tensors["model/scale"]  # A rank may also leave out what others hold.
    save_checkpoint(
        Path(root), 20, tensors, documents={"state": {"step": 20}}, keep_last=None,
        group=dist.group.WORLD, rank=rank, world_size=world_size,
    )  # fmt: skip


def load_body(rank: int, world_size: int, root: str, layout: SmallLayout) -> list[str]:
    """Load into `layout` with real processes; names that came out wrong."""
    held = views(layout, rank, filled=False) | views(layout, rank, filled=False, prefix="exp_avg/")
    group = dist.group.WORLD if world_size > 1 else None
    load_tensors(latest_checkpoint(Path(root)), held, group=group)
    return wrong(held)


@pytest.mark.parametrize("sliced", [True, False])
def test_four_processes_save_and_one_two_three_and_four_load(pool: Pool, tmp_path: Path, sliced: bool) -> None:
    pool.run(4, save_body, str(tmp_path), SmallLayout(tp=2, dp=2, sliced=sliced))
    assert verify(tmp_path / "iter_0000020", "full") == []
    for layout in (SmallLayout(1, 1), SmallLayout(2, 1), SmallLayout(3, 1), SmallLayout(1, 3), SmallLayout(1, 4)):
        assert pool.run(layout.world_size, load_body, str(tmp_path), layout) == [[]] * layout.world_size


def test_a_box_held_by_several_ranks_is_written_once_and_the_work_is_spread(pool: Pool, tmp_path: Path) -> None:
    layout = SmallLayout(tp=1, dp=4, sliced=False)
    pool.run(4, save_body, str(tmp_path), layout)
    index = read_index(tmp_path / "iter_0000020")
    assert sum(len(tensor.boxes) for tensor in index.tensors.values()) == 2 * sum(
        len(view.boxes) for view in views(layout, 0, filled=False).values()
    )
    elements: Counter[str] = Counter()
    for tensor in index.tensors.values():
        for stored in tensor.boxes:
            elements[stored.file] += stored.box.numel
    assert len(elements) == 4
    assert max(elements.values()) <= 0.5 * sum(elements.values())


def test_nothing_on_disk_but_safetensors_json_and_the_name_of_the_latest(pool: Pool, tmp_path: Path) -> None:
    pool.run(4, save_body, str(tmp_path), SmallLayout(tp=2, dp=2))
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    ranks = {f"iter_0000020/rank0000{rank}.safetensors" for rank in range(4)}
    assert files == ranks | {"latest", "iter_0000020/index.json", "iter_0000020/state.json"}
    assert (tmp_path / "latest").read_text() == "iter_0000020\n"
    assert json.loads((tmp_path / "iter_0000020/state.json").read_text()) == {"step": 20}


# What torch says of boxes that overlap; torch 2.11 has the reason in its log.
OVERLAPPING = "overlapping" if torch.__version__ >= "2.12" else "Failed to validate global plan"


def overlapping_body(rank: int, world_size: int, root: str, boxes: list[Box], shape: tuple[int, ...]) -> str:
    """Save boxes that do not fit together; the message of the refusal."""
    view = ShardView(shape, (boxes[rank],), torch.ones(boxes[rank].numel))
    with pytest.raises(RuntimeError) as refusal:
        save_checkpoint(
            Path(root), 1, {"model/w": view}, documents={}, keep_last=None,
            group=dist.group.WORLD, rank=rank, world_size=world_size,
        )  # fmt: skip
    return str(refusal.value)


@pytest.mark.parametrize(
    ("boxes", "reason"),
    [
        ([Box((0,), (4,)), Box((0,), (6,))], "ranks 0 and 1 disagree about model/w"),
        ([Box((0,), (4,)), Box((3,), (5,))], OVERLAPPING),
        ([Box((0,), (3,)), Box((4,), (4,))], "hold 7 of the 8 elements of model/w"),
    ],
)
def test_boxes_that_do_not_cover_a_tensor_exactly_once_are_refused_on_every_rank(
    pool: Pool, tmp_path: Path, boxes: list[Box], reason: str
) -> None:
    messages = pool.run(2, overlapping_body, str(tmp_path), boxes, (8,))
    assert all(reason in message for message in messages), messages
    assert [path.name for path in tmp_path.iterdir()] == []


def test_a_gap_is_refused_in_a_single_process_too(tmp_path: Path) -> None:
    view = ShardView((8,), (Box((0,), (7,)),), torch.ones(7))
    with pytest.raises(ValueError, match="hold 7 of the 8 elements of model/w"):
        save_alone(tmp_path, {"model/w": view})
