"""Memory that runs out is a sentence with the amount, wherever it ran out; other errors are left alone."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import torch

from megatron3d.train.memory_short import memory_short

CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 5.25 GiB is "
    "free. Process 1 has 73.8 GiB memory in use."
)


def test_torch_on_the_host_names_the_amount() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 48, dtype=torch.uint8)
    caught.value.add_note("on rank 3, after step 7")
    found = memory_short(caught.value)
    assert found is not None and found.exit_code == 9
    assert "this machine is out of memory: 262144.00 GiB more were asked for at once" in str(found)
    assert "tools/estimate.py" in str(found) and "--micro-batch-size" in str(found)
    assert found.__notes__ == ["on rank 3, after step 7"]


def test_numpy_names_the_amount() -> None:
    with pytest.raises(MemoryError) as caught:
        np.empty(1 << 48, dtype=np.uint8)
    assert "256. TiB more were asked for" in str(memory_short(caught.value))


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (
            torch.OutOfMemoryError(CUDA),
            "the GPU is out of memory: 20.00 GiB more .*; of 79.11 GiB it has 5.25 GiB free",
        ),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), "the GPU is out of memory[.]"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "the GPU is out of memory[.]"),
        (MemoryError(), "this machine is out of memory[.]"),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "this machine is out of memory[.]"),
    ],
)
def test_every_kind_is_recognised(error: Exception, part: str) -> None:
    found = memory_short(error)
    assert found is not None
    with pytest.raises(type(found), match=part):
        raise found


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), OSError(errno.ENOSPC, "full"), ValueError("memory")])
def test_other_errors_are_left_alone(error: Exception) -> None:
    assert memory_short(error) is None
