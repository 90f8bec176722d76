"""Whole training steps on a GPU: what the CPU computes, and no wait but one; a checkpoint; two devices.

What is looked at is in `tools/bench/gpu_parts.py`, whose parts also run on a CPU in tests/tools/test_gpu_check.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tools.bench.gpu_parts import EQUAL_CASES, PARTS, Check, equal_case

pytestmark = pytest.mark.gpu


def check_in(folder: Path) -> Check:
    """The first GPU, with the models of a GPU's check."""
    return Check(torch.device("cuda", 0), tiny=False, steps=2, out=folder)


def require_ok(part: str, folder: Path) -> None:
    """All findings of a part."""
    found = list(PARTS[part](check_in(folder)))
    assert found
    assert not [one for one in found if "error" in one or one.get("ok") is False]


@pytest.mark.parametrize("case", EQUAL_CASES)
def test_losses_and_norms_are_those_of_a_cpu(case: str, tmp_path: Path) -> None:
    found = equal_case(check_in(tmp_path), case)
    assert found.get("ok") is True, found


def test_masks_of_dropout_and_sums_of_narrow_products_are_those_of_a_cpu(tmp_path: Path) -> None:
    require_ok("features", tmp_path)


def test_a_step_waits_for_the_device_once(tmp_path: Path) -> None:
    require_ok("sync", tmp_path)


def test_a_run_resumes_from_its_checkpoint_to_the_bit(tmp_path: Path) -> None:
    require_ok("ckpt", tmp_path)


def test_two_devices_compute_what_one_does(tmp_path: Path) -> None:
    if torch.accelerator.device_count() < 2:
        pytest.skip(f"needs two CUDA devices; {torch.accelerator.device_count()} is available")
    require_ok("layouts", tmp_path)
