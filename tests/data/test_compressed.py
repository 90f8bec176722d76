"""Compressed streams, cut at every byte: never taken for whole unless they are."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron3d.data.prepare.compressed import DAMAGE, decompressed
from megatron3d.data.prepare.corpus import iterate_texts
from megatron3d.errors import DataError
from tools import preprocess_data

TEXT = b"".join(b'{"text": "line %d of a text"}\n' % (number * 7919 % 99991) for number in range(120))
_SKIPPED = (0x184D2A50).to_bytes(4, "little") + (5).to_bytes(4, "little") + b"hello"  # a frame without content


def streamed_zstd(text: bytes) -> bytes:
    """zstd without the size of the content in its head, in several blocks, as a pipe makes it."""
    stream = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    blocks = [
        stream.compress(part) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK) for part in (text[:99], text[99:])
    ]
    return b"".join([*blocks, stream.flush()])


def twice(compress: Callable[[bytes], bytes]) -> list[bytes]:
    """Both halves of the text, each compressed by itself."""
    return [compress(TEXT[:1000]), compress(TEXT[1000:])]


# name -> ending, and the stream in parts, at whose ends a cut leaves a whole stream
STREAMS: dict[str, tuple[str, list[bytes]]] = {
    "gzip": (".gz", [gzip.compress(TEXT)]),
    "gzip in two members": (".gz", twice(gzip.compress)),
    "gzip and zeros": (".gz", [gzip.compress(TEXT), *[b"\0"] * 20]),
    "xz": (".xz", [lzma.compress(TEXT)]),
    "xz in two streams with padding between": (".xz", [lzma.compress(TEXT[:999]), bytes(4), lzma.compress(TEXT[999:])]),
    "bzip2": (".bz2", [bz2.compress(TEXT)]),
    "bzip2 in two streams": (".bz2", twice(bz2.compress)),
    "zstd": (".zst", [zstandard.compress(TEXT)]),
    "zstd in two frames": (".zst", twice(zstandard.compress)),
    "zstd with a checksum and no size": (".zst", [streamed_zstd(TEXT)]),
    "zstd among skipped frames": (".zst", [_SKIPPED, zstandard.compress(TEXT), _SKIPPED]),
}


def read(data: bytes, ending: str) -> bytes:
    return decompressed(io.BytesIO(data), ending).read()


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_is_read_whole_and_a_cut_at_any_byte_is_damage(name: str) -> None:
    ending, parts = STREAMS[name]
    data = b"".join(parts)
    assert read(data, ending) == TEXT
    whole_at = {sum(map(len, parts[:count])) for count in range(1, len(parts) + 1)}
    for length in range(len(data) + 1):
        if length in whole_at:
            assert TEXT.startswith(read(data[:length], ending))
            continue
        with pytest.raises(DAMAGE):
            read(data[:length], ending)


@settings(deadline=None)
@given(name=st.sampled_from([*STREAMS]), sizes=st.lists(st.integers(1, 4000), min_size=1))
def test_reads_of_any_size_give_the_same_text(name: str, sizes: list[int]) -> None:
    ending, parts = STREAMS[name]
    stream, found = decompressed(io.BytesIO(b"".join(parts)), ending), b""
    while piece := stream.read(sizes[len(found) % len(sizes)]):
        found += piece
    assert found == TEXT


@settings(deadline=None, max_examples=200)
@given(name=st.sampled_from([*STREAMS]), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_gives_damage_or_a_text_and_no_other_error(name: str, where: float, bit: int) -> None:
    ending, parts = STREAMS[name]
    data = bytearray(b"".join(parts))
    data[int(where * len(data))] ^= 1 << bit
    try:
        found = read(bytes(data), ending)
    except DAMAGE:
        return
    # A bit of a head, such as the time in gzip's, changes nothing, and a checksum finds the rest where there is one.
    assert found == TEXT or "zstd" in name


@pytest.mark.parametrize("name", ["c.jsonl.zst", "c.txt.zst", "c.jsonl.gz", "c.txt.gz"])
def test_a_truncated_corpus_is_an_error_that_names_the_file(tmp_path: Path, name: str) -> None:
    compress = zstandard.compress if name.endswith(".zst") else gzip.compress
    (tmp_path / name).write_bytes(compress(TEXT)[:-1])
    with pytest.raises(DataError, match=rf"{name} is damaged or truncated: it cannot be decompressed"):
        list(iterate_texts([tmp_path / name], "text"))


def test_a_truncated_shard_of_many_stops_preprocessing_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in "ab":
        (tmp_path / f"{part}.jsonl.zst").write_bytes(zstandard.compress(TEXT)[: None if part == "a" else -1])
    words = ["--input", str(tmp_path / "*.zst"), "--output-prefix", str(tmp_path / "out")]
    assert preprocess_data.main([*words, "--tokenizer-type", "ByteTokenizer"]) == DataError.exit_code
    assert f"{tmp_path / 'b.jsonl.zst'} is damaged or truncated" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl.zst", "b.jsonl.zst"]


def test_a_small_file_that_expands_a_thousandfold_does_not_take_as_much_memory() -> None:
    """600 MB of zeros from 60 kB, read in pieces by a process that may not have 400 MB."""
    program = (
        "import io, resource, zstandard; from megatron3d.data.prepare.compressed import decompressed\n"
        "c = zstandard.ZstdCompressor().compressobj()\n"
        "data = b''.join(c.compress(bytes(1 << 20)) for _ in range(600)) + c.flush()\n"
        "used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "stream = decompressed(io.BytesIO(data), '.zst'); total = 0\n"
        "while piece := stream.read(1 << 20): total += len(piece)\n"
        "print(total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    total, more_kb = map(int, ran.stdout.split())
    assert total == 600 << 20 and more_kb < 400_000
