"""An exported classifier at work: texts to tokens, tokens to scores, scores to answers. numpy alone, no torch.

Shapes: B samples of a batch, S their longest length in tokens, C outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron3d.data.text_pair import cut, with_special_tokens
from megatron3d.data.tokenizer import Tokenizer
from megatron3d.errors import ConfigError, DataError, install_extra
from megatron3d.serve.description import INPUTS, OUTPUT, ClassifierDescription, from_metadata
from megatron3d.serve.digest import check_digest
from megatron3d.serve.requests import TOO_LARGE, UNPROCESSABLE, RequestError, Sample

# Rows that run together. A few fill the arithmetic of a CPU, and more bring only padding: with 8 of like length a core
# answers almost twice as many sentences of SST-2 as with 32 as they come (docs/serving.md).
_RUN_SIZE = 8


@dataclass(frozen=True)
class EncodedSample:
    """One sample as token ids, the length of its first text with [CLS] and [SEP], and whether it lost tokens."""

    ids: Sequence[int]
    first_length: int
    is_cut: bool = False


class Classifier:
    """A model with its tokenizer; may be called from several threads."""

    def __init__(self, session: Any, description: ClassifierDescription, tokenizer: Tokenizer) -> None:
        """Put together what `open_classifier` found.

        Raises:
            DataError: the tokenizer has no [CLS], [SEP] or [PAD].
        """
        ids = {"[CLS]": tokenizer.cls, "[SEP]": tokenizer.sep, "[PAD]": tokenizer.pad}
        missing = [name for name, id in ids.items() if id is None]
        if missing:
            raise DataError(f"the tokenizer has no {' and no '.join(missing)}, which BERT's inputs are made of")
        self.description, self.tokenizer, self._session = description, tokenizer, session

    def encode(self, samples: Sequence[Sample], *, truncate: bool) -> list[EncodedSample]:
        """Token ids of each sample.

        Args:
            samples: what is asked about.
            truncate: cut samples that are too long, as in training.

        Raises:
            RequestError: a sample is too long, or has nothing that the tokenizer reads.
        """
        halves = [self.tokenizer.encode_batch([sample.text for sample in samples])]
        pairs = [sample.pair for sample in samples if sample.pair is not None]
        if pairs:
            halves.append(self.tokenizer.encode_batch(pairs))
        return [self._row(parts, number, truncate) for number, parts in enumerate(zip(*halves, strict=True))]

    def _row(self, parts: tuple[Sequence[int], ...], number: int, truncate: bool) -> EncodedSample:
        if not all(parts):
            raise RequestError(UNPROCESSABLE, f"text {number} has no characters that the model reads; give words")
        special = 1 + len(parts)
        length, most = special + sum(map(len, parts)), self.description.max_length
        if length > most and not truncate:
            raise RequestError(
                TOO_LARGE,
                f"text {number} has {length} tokens, {special} special ones included, and the model reads {most}; "
                "shorten it (a service started with --truncate cuts texts instead)",
            )
        kept = cut(parts, most - special)
        cls, sep = self.tokenizer.cls, self.tokenizer.sep
        assert cls is not None and sep is not None, "the constructor refuses a tokenizer without them"
        return EncodedSample(with_special_tokens(kept, cls=cls, sep=sep), len(kept[0]) + 2, length > most)

    def logits(self, rows: Sequence[EncodedSample]) -> NDArray[np.float32]:
        """The outputs of the model, [B, C]; rows are padded to the longest."""
        lengths_B = np.array([len(row.ids) for row in rows])
        places_S = np.arange(lengths_B.max())
        mask_BS = places_S < lengths_B[:, None]
        ids_BS = np.full(mask_BS.shape, self.tokenizer.pad, dtype=np.int64)
        ids_BS[mask_BS] = np.concatenate([np.asarray(row.ids, dtype=np.int64) for row in rows])
        types_BS = mask_BS & (places_S >= np.array([row.first_length for row in rows])[:, None])
        given = dict(zip(INPUTS, (ids_BS, types_BS.astype(np.int64), mask_BS.astype(np.int64)), strict=True))
        wanted = {value.name for value in self._session.get_inputs()}
        found: NDArray[np.float32] = self._session.run([OUTPUT], {n: v for n, v in given.items() if n in wanted})[0]
        return found

    def logits_by_length(self, rows: Sequence[EncodedSample]) -> NDArray[np.float32]:
        """The outputs for any number of rows, [N, C]; rows of like length run together, so that little is padding."""
        order = sorted(range(len(rows)), key=lambda number: len(rows[number].ids))
        found = np.empty((len(rows), self.description.num_outputs), dtype=np.float32)
        for start in range(0, len(order), _RUN_SIZE):
            chosen = order[start : start + _RUN_SIZE]
            found[chosen] = self.logits([rows[number] for number in chosen])
        return found

    def answer(self, logits_C: NDArray[np.float32], row: EncodedSample) -> dict[str, Any]:
        """What a client gets: the most probable label and the probability of each, or the value of a regression;
        `truncated` where the sample lost tokens.

        Raises:
            DataError: the outputs are not finite.
        """
        if not np.isfinite(logits_C).all():
            raise DataError(f"the model's outputs are not finite ({logits_C.tolist()}); its weights are damaged")
        description = self.description
        if description.is_regression:
            low, high = description.value_range or (-np.inf, np.inf)
            answer: dict[str, Any] = {"value": float(np.clip(logits_C[0], low, high))}
        else:
            scores_C = probabilities(logits_C)
            scores = dict(zip(description.labels, map(float, scores_C), strict=True))
            answer = {"label": description.labels[int(scores_C.argmax())], "scores": scores}
        return answer | ({"truncated": True} if row.is_cut else {})


def probabilities(logits_C: NDArray[np.float32]) -> NDArray[np.float64]:
    """softmax in fp64."""
    grown_C = np.exp(logits_C.astype(np.float64) - logits_C.max())
    return grown_C / grown_C.sum()


def open_classifier(path: Path, *, threads: int = 0) -> Classifier:
    """Open a file of `tools/export_onnx.py`; `threads` share one batch, 0 for all cores.

    Raises:
        ConfigError: onnxruntime is not installed.
        DataError: the file is missing, damaged, changed since its export, or another kind of model.
    """
    if path.is_file():  # The session says what is wrong with one that is not.
        check_digest(path)
    session = open_session(path, threads=threads)
    metadata = session.get_modelmeta().custom_metadata_map
    description, packed = from_metadata(metadata, str(path))
    outputs = session.get_outputs()
    if [value.name for value in outputs] != [OUTPUT] or outputs[0].shape[-1] != description.num_outputs:
        raise DataError(
            f"{path} gives {[(value.name, value.shape) for value in outputs]}, and its description has "
            f"{description.num_outputs} outputs; export the model again"
        )
    return Classifier(session, description, packed.build())


def open_session(path: Path, *, threads: int) -> Any:
    """An ONNX Runtime session on the CPU. Raises: as `open_classifier`."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigError(
            f"serving needs onnxruntime, and {error.name} is not installed; run: {install_extra('serve')}"
        ) from error
    if not path.is_file():
        raise DataError(f"--model {path} is not a file; give one that tools/export_onnx.py wrote")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # Errors come as exceptions too; warnings are of no use to a client.
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library has an exception of its own for each way to be damaged
        raise DataError(f"--model {path} cannot be read as an ONNX model ({error}); export it again") from error
