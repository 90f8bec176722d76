"""int8 weights for a served classifier, and what they cost in accuracy.

Dynamic quantization: the weights of linear layers are int8 with one scale for each output, activations become int8 at
run time with a scale of their own. Weights use 7 of the 8 bits, so that sums of products fit in 16 bits on every
processor and the same file gives the same answers on all (without this, processors before VNNI saturate).

Source: Jacob et al. 2018 (arXiv:1712.05877), section 2 for the scheme.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from megatron3d.errors import DataError
from megatron3d.serve.classifier import Classifier
from megatron3d.serve.digest import append_digest
from megatron3d.serve.requests import RequestError, Sample
from megatron3d.tasks.glue.predict import metrics_of
from megatron3d.tasks.glue.read import SampleTable
from megatron3d.tasks.glue.tasks import Task

_LINEAR = ["MatMul", "Gemm"]


def quantize(source: Path, target: Path, metadata: Mapping[str, str]) -> None:
    """Write the int8 version of an exported file with metadata and a digest of its own; inputs and output stay."""
    import onnx
    from onnxruntime import quantization

    model = onnx.load(source)
    # The exporter notes the shapes of weights too, the library transposes some without changing the notes and then
    # stops at the contradiction. It works the shapes out again by itself.
    del model.graph.value_info[:]
    logger = logging.getLogger()
    before = logger.level
    logger.setLevel(logging.ERROR)  # it advises a preparation that the exporter has done already
    try:
        quantization.quantize_dynamic(
            model,
            target,
            op_types_to_quantize=_LINEAR,
            per_channel=True,
            reduce_range=True,
            weight_type=quantization.QuantType.QInt8,
        )
    finally:
        logger.setLevel(before)
    model = onnx.load(target)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.save(model, target)
    append_digest(target)


def metrics(classifier: Classifier, rows: SampleTable, task: Task) -> dict[str, float]:
    """The official metrics of the task on one labelled file, by the served model.

    Raises:
        DataError: a text has no characters that the model reads.
    """
    pairs = rows.texts[1] if len(rows.texts) == 2 else (None,) * len(rows)
    samples = [Sample(text, pair) for text, pair in zip(rows.texts[0], pairs)]
    try:
        encoded = classifier.encode(samples, truncate=True)
    except RequestError as error:
        raise DataError(f"{rows.path}: {error}") from error
    assert rows.labels is not None, f"{rows.path} was read without labels"
    labels = torch.tensor(rows.labels).numpy()
    return metrics_of(torch.from_numpy(classifier.logits_by_length(encoded)), labels, task)
