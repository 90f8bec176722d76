"""A process in which one library finds the ids of a corpus in memory; it prints the seconds, and the processor's.

    python -m tools.bench.peers.encoders MODE CORPUS WORKERS VOCAB_FILE MERGE_FILE

Each library has two modes: its own threads in one process, and forked processes of one thread with a part of the texts.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron3d.comm.launch import limit_tokenizers_to_one_thread
from megatron3d.data.tiktoken_file import byte_letters
from megatron3d.data.tokenizer import build_tokenizer

MODES: Mapping[str, str] = MappingProxyType(
    {
        "gigatoken, threads": "fast",
        "gigatoken, processes": "fast",
        "tokenizers, threads": "slow",
        "tokenizers, processes": "slow",
        "tiktoken, threads": "slow",
    }
)
_BATCH_CHARACTERS = 1 << 20
_GPT2_WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
Encode = Callable[[list[str]], Any]


def encoder_of(mode: str, workers: int, vocab_file: str, merge_file: str) -> Encode:
    """What encodes a list of texts, in threads or in the thread that asks."""
    name, kind = mode.split(", ")
    if name == "tiktoken":
        tiktoken = importlib.import_module("tiktoken")
        ranks = _byte_ranks(vocab_file)
        encoding = tiktoken.Encoding("gpt2", pat_str=_GPT2_WORDS, mergeable_ranks=ranks, special_tokens={})
        return lambda texts: encoding.encode_ordinary_batch(texts, num_threads=workers)
    description = build_tokenizer("GPT2BPETokenizer", vocab_file=vocab_file, merge_file=merge_file).as_json()
    if name == "gigatoken":
        tokenizer = importlib.import_module("gigatoken").Tokenizer.from_json(description)
        if kind == "threads":
            importlib.import_module("awkward")  # its import is no part of the time
            return lambda texts: tokenizer.encode_batch(texts, parallel=True)
        return lambda texts: [tokenizer.encode(text) for text in texts]
    if kind == "processes":
        limit_tokenizers_to_one_thread()
    library = importlib.import_module("tokenizers").Tokenizer.from_str(description)
    return lambda texts: [e.ids for e in library.encode_batch_fast(texts, add_special_tokens=False)]


def batches_of(texts: Sequence[str]) -> list[list[str]]:
    """Texts in batches of about a million characters."""
    batches: list[list[str]] = [[]]
    size = 0
    for text in texts:
        if size >= _BATCH_CHARACTERS:
            batches.append([])
            size = 0
        batches[-1].append(text)
        size += len(text)
    return batches


def encode_all(encode: Encode, batches: Sequence[list[str]]) -> None:
    """The ids of all batches, one after the other; they are let go as the next ones come."""
    for batch in batches:
        encode(batch)


def main(mode: str, corpus: str, workers: int, vocab_file: str, merge_file: str) -> None:
    """Time one mode."""
    texts = [json.loads(line)["text"] for line in Path(corpus).read_text(encoding="utf-8").split("\n") if line]
    encode = encoder_of(mode, workers, vocab_file, merge_file)
    batches = batches_of(texts)
    if mode.endswith("threads"):
        began_s, cpu_s = time.perf_counter(), time.process_time()
        encode_all(encode, batches)
        cpu_s = time.process_time() - cpu_s
    else:
        context = multiprocessing.get_context("fork")
        parts = [context.Process(target=encode_all, args=(encode, batches[rank::workers])) for rank in range(workers)]
        began_s = time.perf_counter()
        for part in parts:
            part.start()
        for part in parts:
            part.join()
        if any(part.exitcode for part in parts):
            raise SystemExit(f"a process of {mode} failed")
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_s = used.ru_utime + used.ru_stime
    print(f"seconds {time.perf_counter() - began_s:.4f} {cpu_s:.4f}")


def _byte_ranks(vocab_file: str) -> dict[bytes, int]:
    """tiktoken's form of GPT-2's vocabulary."""
    byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    vocab = json.loads(Path(vocab_file).read_text(encoding="utf-8"))
    return {bytes(byte_of[c] for c in token): id for token, id in vocab.items() if token != "<|endoftext|>"}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5])
