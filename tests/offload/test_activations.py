"""Inputs of recomputed layers off the device: they come back as they were, one group ahead, from memory that others may
use meanwhile; room is used again; a full disk is a sentence."""

from __future__ import annotations

import errno
import os
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron3d.comm.device import HOST_ALIGNMENT_BYTES
from megatron3d.errors import StorageError
from megatron3d.nn.inputs import LayerInputs
from megatron3d.nn.recompute import Layer, LayerGroup, run_layers
from megatron3d.offload.activations import FileInputs, HostInputs
from megatron3d.tensor.kept_inputs import InputStore, StoredInput
from tests.tensor.full import numbered

CPU = torch.device("cpu")
NUM_LAYERS = 4
GROUPS = [LayerGroup(range(i, i + 1), True) for i in range(NUM_LAYERS)]


class Recorded:
    """A store that notes what it is asked for, and whose inputs are still in memory when the forward is over."""

    def __init__(self, store: InputStore) -> None:
        self.store, self.log = store, list[str]()
        self.inputs: list[weakref.ref[torch.UntypedStorage]] = []

    def put(self, x: Tensor) -> StoredInput:
        self.inputs.append(weakref.ref(x.untyped_storage()))
        self.log.append(f"put {len(self.inputs)}")
        return _RecordedInput(self, self.store.put(x), len(self.inputs))

    def settle(self) -> None:
        self.log.append("settle")
        self.store.settle()


class _RecordedInput:
    def __init__(self, record: Recorded, stored: StoredInput, number: int) -> None:
        self.record, self.stored, self.number = record, stored, number

    def start_fetch(self) -> None:
        self.record.log.append(f"fetch {self.number}")
        self.stored.start_fetch()

    def take(self) -> Tensor:
        self.record.log.append(f"take {self.number}")
        return self.stored.take()


def results(store: InputStore | None, *, seed: int = 1, device: torch.device = CPU) -> tuple[list[Tensor], Tensor]:
    """Gradients of the stage's input and of each layer's weight, and the output of its layers."""
    weights = [numbered(8, 8, seed=10 + i, dtype=torch.float32).to(device).requires_grad_() for i in range(NUM_LAYERS)]

    def layer(number: int) -> Layer:
        return lambda x, inputs: torch.tanh(x @ weights[number])

    x = numbered(16, 2, 8, seed=seed, dtype=torch.float32).to(device).requires_grad_()
    y = run_layers([layer(i) for i in range(NUM_LAYERS)], GROUPS, x, LayerInputs(), store=store)
    if isinstance(store, Recorded):
        assert not any(one() for one in store.inputs), "an input is still on the device"
    (y * y).sum().backward()
    return [one.grad for one in (x, *weights) if one.grad is not None], y.detach()


@pytest.mark.parametrize("kind", ["files", "host", pytest.param("pinned", marks=pytest.mark.gpu)])
def test_inputs_come_back_one_group_ahead_and_leave_the_device_meanwhile(kind: str, tmp_path: Path) -> None:
    device = torch.device("cuda", 0) if kind == "pinned" else CPU
    store = Recorded(FileInputs(tmp_path, "rank00000") if kind == "files" else HostInputs(device))
    (expected, y), (found, its_y) = results(None, device=device), results(store, device=device)
    assert len(found) == NUM_LAYERS + 1 and torch.equal(y, its_y)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    # The first group's input came from outside, and stays there.
    forward, backward = store.log[:4], store.log[4:]
    assert forward == ["put 1", "put 2", "put 3", "settle"]
    assert backward == ["take 3", "fetch 2", "take 2", "fetch 1", "take 1"]
    assert os.listdir(tmp_path) == []


def test_room_is_used_again_from_step_to_step(tmp_path: Path) -> None:
    files, host = FileInputs(tmp_path, "rank00000"), HostInputs(CPU)
    for store in (files, host):
        for seed in range(4):
            results(store, seed=seed)
    num_bytes = 16 * 2 * 8 * 4
    assert host.host_bytes == 3 * num_bytes
    assert files.file_bytes == 3 * HOST_ALIGNMENT_BYTES


def test_a_full_disk_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = FileInputs(tmp_path, "rank00000-inputs")
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(StorageError, match=r"rank00000-inputs.*No space left on device.*--offload-dir"):
        results(store)
