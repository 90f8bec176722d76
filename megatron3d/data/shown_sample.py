"""One sample of a training run for people: its tokens, document by document, and their text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron3d.data.gpt import GPTSamples
from megatron3d.data.indexed import IndexedDataset
from megatron3d.data.order import derive_seed
from megatron3d.data.splits import SPLIT_NAMES, split_documents


def shown_sample(
    dataset: IndexedDataset,
    number: int,
    *,
    seq_length: int,
    of: str,
    split: str,
    seed: int,
    decode: Callable[[Sequence[int]], str] | None,
) -> dict[str, Any]:
    """Sample `number` of the data `of` ("train", "valid" or "test") of a run from this corpus alone, as plain values.

    It has S + 1 tokens: the last one is a label alone. `parts` are the documents it consists of, with their number in
    the file, the place and the length there, the tokens, and their text where there is a `decode`.

    Raises: ConfigError for a `split` that is none; DataError if it leaves too few tokens for a sample.
    """
    place = SPLIT_NAMES.index(of)
    documents = split_documents(dataset.num_documents, split)[place]
    samples = GPTSamples(dataset, documents, seq_length=seq_length, seed=derive_seed(seed, of, 0))
    tokens = samples.sample(number).tolist()
    parts, begin = [], 0
    for part in samples.parts(number):
        shown: dict[str, Any] = {**vars(part), "tokens": tokens[begin : begin + part.count]}
        if decode is not None:
            shown["text"] = decode(shown["tokens"])
        parts.append(shown)
        begin += part.count
    return {"number": number, "of": of, "per_epoch": samples.num_samples_per_epoch, "parts": parts}
