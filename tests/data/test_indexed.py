"""Token files: what is written is read, other programs agree, and damage is refused with the bytes that disagree."""

from __future__ import annotations

import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron3d.data import indexed
from megatron3d.data.indexed import IndexedDataset, IndexedDatasetWriter, token_dtype
from megatron3d.data.token_row import TokenRow
from megatron3d.errors import DataError, StorageError
from tests.data.corpora import counting_documents, write_documents


@pytest.fixture(scope="module")
def megatron() -> ModuleType:
    """Megatron-core's own reader and writer."""
    return pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="needs megatron-core")


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """Three documents of 2, 1 and 3 tokens: bytes 0 to 12 of .bin."""
    write_documents(tmp_path / "d", [[1, 2], [3], [4, 5, 6]])
    return tmp_path / "d"


def damage(path: Path, offset: int, new: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(new)] = new
    path.write_bytes(content)


@settings(max_examples=30, deadline=None)
@given(
    documents=st.lists(st.lists(st.lists(st.integers(0, 65499), max_size=5), max_size=3), max_size=6),
    dtype=st.sampled_from([np.uint16, np.int32, np.int64]),
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[list[int]]], dtype: type
) -> None:
    prefix = tmp_path_factory.mktemp("d") / "d"
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document([token for sequence in document for token in sequence], [len(s) for s in document])
    dataset = IndexedDataset(prefix)
    assert [dataset[i].tolist() for i in range(len(dataset))] == [s for document in documents for s in document]
    assert [dataset.document(k).tolist() for k in range(dataset.num_documents)] == [
        [t for s in d for t in s] for d in documents
    ]
    assert dataset.document_bounds.tolist() == np.cumsum([0] + [len(d) for d in documents]).tolist()
    assert dataset.dtype == dtype


def test_bytes_are_those_of_the_format(prefix: Path) -> None:
    expected = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 3, 4)
    expected += struct.pack("<3i", 2, 1, 3) + struct.pack("<3q", 0, 4, 6) + struct.pack("<4q", 0, 1, 2, 3)
    assert Path(f"{prefix}.idx").read_bytes() == expected
    assert Path(f"{prefix}.bin").read_bytes() == struct.pack("<6H", 1, 2, 3, 4, 5, 6)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_core_writes_the_same_bytes(tmp_path: Path, megatron: ModuleType, dtype: type) -> None:
    documents = [([5, 6, 7], [2, 1]), ([], []), ([60000, 1], [2])]
    theirs = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    with IndexedDatasetWriter(tmp_path / "ours", dtype) as ours:
        for tokens, lengths in documents:
            theirs.add_document(torch.tensor(tokens, dtype=torch.int64), lengths)
            ours.add_document(tokens, lengths)
    theirs.finalize(str(tmp_path / "theirs.idx"))
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"ours{ending}").read_bytes() == (tmp_path / f"theirs{ending}").read_bytes()
    assert IndexedDataset(tmp_path / "theirs").document(0).tolist() == [5, 6, 7]


def test_megatron_core_reads_our_files(prefix: Path, megatron: ModuleType) -> None:
    theirs = megatron.IndexedDataset(str(prefix))
    assert [theirs[i].tolist() for i in range(len(theirs))] == [[1, 2], [3], [4, 5, 6]]
    assert theirs.document_indices.tolist() == [0, 1, 2, 3]


def test_megatron_core_multimodal_file_is_read_with_its_modes(tmp_path: Path, megatron: ModuleType) -> None:
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.int32, multimodal=True)
    builder.add_document(torch.tensor([1, 2, 3]), [1, 2], [0, 7])
    builder.finalize(str(tmp_path / "m.idx"))
    dataset = IndexedDataset(tmp_path / "m")
    assert dataset.modes is not None and dataset.modes.tolist() == [0, 7]
    assert dataset[1].tolist() == [2, 3]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1, "uint16"), (65499, "uint16"), (65500, "int32"), (None, "int32")])
def test_dtype_is_the_one_megatron_core_chooses(megatron: ModuleType, vocab_size: int | None, dtype: str) -> None:
    assert token_dtype(vocab_size).name == dtype
    assert megatron.DType.optimal_dtype(vocab_size) == token_dtype(vocab_size)


def test_part_of_a_sequence_is_read(prefix: Path) -> None:
    dataset = IndexedDataset(prefix)
    assert dataset.get(2, 1).tolist() == [5, 6]
    assert dataset.get(2, 1, 1).tolist() == [5]
    assert dataset[-1].tolist() == [4, 5, 6]
    assert dataset.lengths.tolist() == [2, 1, 3]
    assert dataset.num_tokens == 6


@pytest.mark.parametrize("arguments", [(3,), (-4,), (0, 1, 2), (0, -1), (0, 3)])
def test_part_that_does_not_exist_is_an_index_error(prefix: Path, arguments: tuple[int, ...]) -> None:
    with pytest.raises(IndexError, match=r" of \d"):
        IndexedDataset(prefix).get(*arguments)


def test_a_sequence_is_a_copy_that_leaves_the_file_as_it_is(prefix: Path) -> None:
    dataset = IndexedDataset(prefix)
    dataset[0][0] = 9
    assert dataset[0].tolist() == [1, 2]
    with pytest.raises(ValueError, match="read-only"):
        dataset.lengths[0] = 9


def test_a_file_cut_short_while_it_is_open_is_a_data_error_with_the_bytes(prefix: Path) -> None:
    dataset, bin_path = IndexedDataset(prefix), Path(f"{prefix}.bin")
    os.truncate(bin_path, 7)
    assert dataset[1].tolist() == [3]
    with pytest.raises(DataError) as caught:
        dataset.get(2)
    assert str(caught.value).startswith(
        f"{bin_path} ends at byte 7, and bytes 6 to 12 are needed: it held 12 bytes when it was opened and was cut"
    )
    with pytest.raises(DataError, match="ends at byte 7"):
        TokenRow(dataset, range(3)).read(2, 3)


def test_an_index_cut_short_while_it_is_open_changes_nothing(prefix: Path) -> None:
    dataset = IndexedDataset(prefix)
    os.truncate(f"{prefix}.idx", 0)
    assert [dataset[i].tolist() for i in range(len(dataset))] == [[1, 2], [3], [4, 5, 6]]


def test_threads_read_the_same_file_at_the_same_time(tmp_path: Path) -> None:
    documents = counting_documents([97] * 400)
    dataset = write_documents(tmp_path / "d", documents)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda k: dataset[k].tolist(), [*range(400)] * 5))
    assert found == documents * 5


def test_a_large_index_is_mapped_and_read_alike(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed, "LARGEST_INDEX_READ", 10)
    dataset = IndexedDataset(prefix)
    assert [dataset[i].tolist() for i in range(len(dataset))] == [[1, 2], [3], [4, 5, 6]]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]], ids=["in file order", "elsewhere"])
def test_a_row_reads_across_sequences_wherever_they_lie(prefix: Path, order: list[int]) -> None:
    """The format lets sequences lie anywhere in .bin; the second index places them in another order."""
    idx_path, lengths, offsets = Path(f"{prefix}.idx"), [2, 1, 3], [0, 4, 6]
    damage(idx_path, 34, struct.pack("<3i", *(lengths[k] for k in order)))
    damage(idx_path, 34 + 12, struct.pack("<3q", *(offsets[k] for k in order)))
    documents = [[1, 2], [3], [4, 5, 6]]
    whole = [token for k in order for token in documents[k]]
    row = TokenRow(IndexedDataset(prefix), range(3))
    for first in range(6):
        for count in range(1, 7 - first):
            assert row.read(first, count).tolist() == whole[first : first + count]
    for first, count in ((0, 7), (5, 2), (-1, 1)):
        with pytest.raises(IndexError, match="of 6 in"):
            row.read(first, count)


def test_truncated_bin_is_refused_with_the_byte_range(prefix: Path) -> None:
    bin_path = Path(f"{prefix}.bin")
    bin_path.write_bytes(bin_path.read_bytes()[:9])
    with pytest.raises(DataError) as caught:
        IndexedDataset(prefix)
    assert str(caught.value) == (
        f"{bin_path} holds 9 bytes, but {prefix}.idx places sequence 2 of 3 at bytes 6 to 12 and the last byte at 12: "
        f"the file is truncated or belongs to another index. Copy or preprocess it again."
    )


def test_bin_longer_than_the_index_says_is_refused(prefix: Path) -> None:
    with open(f"{prefix}.bin", "ab") as stream:
        stream.write(b"\0\0\0")
    with pytest.raises(DataError, match=r"holds 15 bytes, .* first 12: bytes 12 to 15 belong to no sequence"):
        IndexedDataset(prefix)


@pytest.mark.parametrize("length", range(102))
def test_truncated_idx_is_refused_at_every_length(prefix: Path, length: int) -> None:
    idx_path = Path(f"{prefix}.idx")
    whole = idx_path.read_bytes()
    assert len(whole) == 34 + 3 * 12 + 4 * 8 == 102
    idx_path.write_bytes(whole[:length])
    with pytest.raises(DataError) as caught:
        IndexedDataset(prefix)
    assert str(idx_path) in str(caught.value)
    if length >= 34:
        assert f"is {length} bytes long" in str(caught.value) and "takes bytes 0 to 102" in str(caught.value)


@pytest.mark.parametrize(
    ("offset", "new", "message"),
    [
        (0, b"PK", r"is no token index: its bytes 0 to 9 are b'PKIDIDX"),
        (9, b"\x02", "format version 2 in bytes 9 to 17"),
        (17, b"\x09", "dtype code 9 in byte 17"),
        (17, b"\x07", "stores float32 numbers"),
        (18, b"\x04", "is 102 bytes long, but with 4 sequences"),
        (34, struct.pack("<i", -2), "sequence 0 has the length -2"),
        (46, struct.pack("<q", 100), "places sequence 0 of 3 at bytes 100 to 104"),
        (46, struct.pack("<q", -2), "places sequence 0 of 3 at bytes -2 to 2"),
        (46, struct.pack("<q", 2), r"contradicts itself: sequence 0 of 3 begins at byte 2 .* end at byte 0"),
        (54, struct.pack("<q", 0), r"contradicts itself: sequence 0 of 3 begins at byte 0 .* end at byte 2"),
        (54, struct.pack("<q", 5), r"contradicts itself: sequence 1 of 3 begins at byte 5 .* end at byte 4"),
        (34, struct.pack("<i", 1), r"contradicts itself: sequence 1 of 3 begins at byte 4 .* end at byte 2"),
        (70, struct.pack("<q", 1), "document bounds run from 1 to 3"),
        (78, struct.pack("<q", 3), "document bounds run from 0 to 3; they must rise"),
        (94, struct.pack("<q", 4), "document bounds run from 0 to 4"),
    ],
)
def test_damaged_index_is_refused_by_what_is_wrong(prefix: Path, offset: int, new: bytes, message: str) -> None:
    damage(Path(f"{prefix}.idx"), offset, new)
    with pytest.raises(DataError, match=message):
        IndexedDataset(prefix)


def test_missing_file_is_named(prefix: Path) -> None:
    Path(f"{prefix}.idx").unlink()
    with pytest.raises(DataError, match=rf"data path {prefix} needs {prefix}\.idx, which cannot be found"):
        IndexedDataset(prefix)


def test_ending_given_with_the_prefix_is_pointed_out(prefix: Path) -> None:
    with pytest.raises(DataError, match=rf"give the prefix without the ending: {prefix}$|ending: {prefix}\."):
        IndexedDataset(f"{prefix}.bin")


def test_writer_that_fails_leaves_the_old_files_and_nothing_else(prefix: Path) -> None:
    before = Path(f"{prefix}.bin").read_bytes()
    with pytest.raises(RuntimeError, match="stop"), IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add_document([9, 9])
        raise RuntimeError("stop")
    assert Path(f"{prefix}.bin").read_bytes() == before
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["d.bin", "d.idx"]


def test_nothing_is_visible_before_the_writer_is_done(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "d", np.uint16) as writer:
        writer.add_document([1])
        assert not (tmp_path / "d.bin").exists() and not (tmp_path / "d.idx").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.bin", "d.idx"]


def test_id_that_does_not_fit_the_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"65536 do not fit uint16"), IndexedDatasetWriter(tmp_path / "d", "u2") as w:
        w.add_document([1, 65536])


def test_place_that_is_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="could not write"):
        IndexedDatasetWriter(tmp_path / "file" / "d", np.uint16)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 5), value=st.integers(-(2**31), 2**31 - 1))
def test_a_length_or_offset_that_is_another_is_always_refused(prefix: Path, place: int, value: int) -> None:
    """The six numbers of three sequences: each follows from the others, by the length of .bin or by the last bound."""
    path = Path(f"{prefix}.idx")
    whole = path.read_bytes()
    start, form = (34 + 4 * place, "<i") if place < 3 else (46 + 8 * (place - 3), "<q")
    damage(path, start, struct.pack(form, value))
    try:
        if path.read_bytes() != whole:
            with pytest.raises(DataError):
                IndexedDataset(prefix)
    finally:
        path.write_bytes(whole)
