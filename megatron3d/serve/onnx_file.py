"""The ONNX file of a classifier: written under a temporary name, compared with torch, and only then given its own.

Batch and length are dynamic. The comparison runs ONNX Runtime on batches of many shapes, padding and pairs among them.

Shapes: B samples, S sequence, C outputs.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron3d.errors import ConfigError, NumericsError, install_extra
from megatron3d.serve.classifier import open_session
from megatron3d.serve.description import INPUTS, OUTPUT
from megatron3d.serve.digest import append_digest
from megatron3d.serve.trained import ExportedClassifier
from megatron3d.storage.atomic import atomic_path
from megatron3d.storage.refusals import storage_errors

# Largest difference from torch, for outputs up to 1; larger outputs have fp32 roundings that are larger alike.
TOLERANCE = 1e-5
_BATCHES = ((1, 1.0), (1, 0.0), (2, 0.5), (3, 0.1), (5, 0.3), (8, 0.05))  # samples, and share of the whole length


@dataclass(frozen=True)
class OutputDifference:
    """How far ONNX Runtime is from torch: the largest difference, the largest output, and the batches compared."""

    difference: float
    largest: float
    num_batches: int

    @property
    def is_within_tolerance(self) -> bool:
        """Whether the difference is within TOLERANCE (false where anything is not finite)."""
        return self.difference <= TOLERANCE * max(1.0, self.largest)


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; takes the name `path` if the block ends well, else is removed.

    Raises:
        StorageError: the file system refused.
    """
    with storage_errors("write --output", path, way_out="give another path"), atomic_path(path) as temporary:
        yield temporary


def require_exporter() -> None:
    """Raises: ConfigError where a package of the export is missing, before any weights are read."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"the export needs onnx, onnxscript and onnxruntime, and {error.name} is not installed; "
            f"run: {install_extra('onnx')}"
        ) from error


def write(model: ExportedClassifier, path: Path, metadata: Mapping[str, str], *, max_length: int) -> None:
    """Export the model to `path`; inputs are `INPUTS`, int64 [batch, length], and the output fp32 [batch, C]. The file
    ends with its digest.

    Args:
        model: with weights that need no gradients.
        path: written whole or not at all is the caller's care (`temporary_beside`).
        metadata: kept inside the file.
        max_length: longest S.
    """
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=1, max=max_length)
    inputs = example(model, 3, max(2, max_length // 2), seed=0)
    with torch.no_grad(), _quiet():
        program: Any = torch.onnx.export(
            model,
            inputs,
            dynamo=True,
            dynamic_shapes=({0: batch, 1: length},) * len(inputs),
            input_names=list(INPUTS),
            output_names=[OUTPUT],
            external_data=False,
            verbose=False,
        )
    # The exporter notes for every node which line of which file it came from: paths of this machine, in most of a small
    # file's bytes.
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
    program.model.metadata_props.update(metadata)
    program.save(path)
    append_digest(path)


def compare(model: ExportedClassifier, path: Path, *, max_length: int) -> OutputDifference:
    """Run the file and the model on the same batches of random tokens: short, full, padded, single and paired texts."""
    session = open_session(path, threads=1)
    wanted = {value.name for value in session.get_inputs()}
    difference = largest = 0.0
    for number, (num_samples, share) in enumerate(_BATCHES):
        inputs = example(model, num_samples, max(1, round(share * max_length)), seed=number + 1)
        with torch.no_grad():
            expected_BC = model(*inputs)
        given = {name: value.numpy() for name, value in zip(INPUTS, inputs) if name in wanted}
        found_BC = torch.from_numpy(session.run([OUTPUT], given)[0])
        # max() of Python drops values that are not numbers; torch's keeps them.
        difference = _larger(difference, (found_BC - expected_BC).abs())
        largest = _larger(largest, expected_BC.abs())
    return OutputDifference(difference, largest, len(_BATCHES))


def check(agreement: OutputDifference, path: Path) -> None:
    """Raises: NumericsError where the file does not compute what the model does."""
    if not agreement.is_within_tolerance:
        raise NumericsError(
            f"{path}: ONNX Runtime is {agreement.difference:.3g} away from torch, whose outputs go up to "
            f"{agreement.largest:.3g}, and {TOLERANCE:g} is allowed; the file was not written"
        )


def example(model: ExportedClassifier, num_samples: int, length: int, *, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random tokens, types and masks, int64 [B, S]; every sample has at least one real token, the first all S."""
    config, generator = model.stage.config, torch.Generator().manual_seed(seed)
    tokens_BS = torch.randint(0, config.vocab_size, (num_samples, length), generator=generator)
    lengths_B1 = torch.randint(1, length + 1, (num_samples, 1), generator=generator)
    lengths_B1[0] = length
    firsts_B1 = torch.randint(1, length + 1, (num_samples, 1), generator=generator)
    places_S = torch.arange(length)
    mask_BS = places_S < lengths_B1
    types_BS = mask_BS & (places_S >= firsts_B1)
    return tokens_BS, types_BS.long(), mask_BS.long()


def _larger(known: float, values: Tensor) -> float:
    return float(torch.cat([values.flatten(), torch.tensor([known])]).max())


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of packages that a BERT has no use for; its errors are exceptions and still come out."""
    exporter = logging.getLogger("torch.onnx")
    before = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(before)
