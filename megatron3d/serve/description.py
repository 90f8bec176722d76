"""What an exported classifier says of itself, as text in the metadata of its ONNX file.

The file alone is then enough to serve the model: labels, lengths and tokenizer travel inside.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from megatron3d.errors import DataError
from megatron3d.files.fields import Fields
from megatron3d.files.json_text import parse_object
from megatron3d.serve.packed_tokenizer import PackedTokenizer, from_text

INPUTS = ("input_ids", "token_type_ids", "attention_mask")
OUTPUT = "logits"
_CLASSIFIER, _TOKENIZER = "megatron3d.classifier", "megatron3d.tokenizer"


@dataclass(frozen=True)
class ClassifierDescription:
    """A classifier from outside.

    Attributes:
        task: its name, such as sst-2.
        labels: the classes in the order of the outputs; none in a regression.
        is_regression: whether the one output is a value.
        value_range: the values of a regression, if they have bounds.
        num_texts: 1 for texts, 2 for pairs; None takes both.
        max_length: tokens of a sample with its special ones, at most.
        precision: fp32 or int8.
    """

    task: str
    labels: tuple[str, ...]
    is_regression: bool
    value_range: tuple[float, float] | None
    num_texts: int | None
    max_length: int
    precision: str = "fp32"

    @property
    def num_outputs(self) -> int:
        """Outputs of the model."""
        return len(self.labels) or 1


def to_metadata(description: ClassifierDescription, tokenizer: PackedTokenizer) -> dict[str, str]:
    """The metadata of the ONNX file."""
    return {_CLASSIFIER: json.dumps(asdict(description)), _TOKENIZER: tokenizer.to_text()}


def from_metadata(metadata: Mapping[str, str], name: str) -> tuple[ClassifierDescription, PackedTokenizer]:
    """The reverse of `to_metadata`; `name` is that of the file, for messages.

    Raises:
        DataError: the metadata is missing or damaged.
    """
    missing = [key for key in (_CLASSIFIER, _TOKENIZER) if key not in metadata]
    if missing:
        raise DataError(f"{name} has no metadata {missing[0]!r}; give a file that tools/export_onnx.py wrote")
    try:
        return _described(Fields(parse_object(metadata[_CLASSIFIER]), "its description")), from_text(
            metadata[_TOKENIZER]
        )
    except ValueError as error:
        raise DataError(f"{name}: its description cannot be read ({error}); export the model again") from error


def _described(found: Fields) -> ClassifierDescription:
    """Raises: ValueError for a field that is missing or cannot be what it stands for."""
    labels, num_texts = found.texts("labels"), found.get("num_texts")
    if num_texts not in (None, 1, 2) or isinstance(num_texts, bool):
        raise ValueError(f"num_texts is {num_texts!r:.40} and must be 1, 2 or null")
    if len(set(labels)) != len(labels) or bool(labels) is found.flag("is_regression"):
        raise ValueError(f"labels are {', '.join(labels)!r:.100}, and must be different names, or none in a regression")
    return ClassifierDescription(
        task=found.text("task"),
        labels=labels,
        is_regression=found.flag("is_regression"),
        value_range=found.interval("value_range"),
        num_texts=num_texts,
        max_length=found.integer("max_length", least=3),
        precision=found.text("precision"),
    )
