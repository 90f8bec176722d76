"""The promise of docs/checkpoint.md: its snippet opens a checkpoint without this project."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from megatron3d.checkpoint.save import save_checkpoint
from tests.checkpoint.layouts import SPECS, SmallLayout, full_tensor, merged

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "checkpoint.md"


def test_the_snippet_puts_whole_tensors_together_with_safetensors_and_json_alone(tmp_path: Path) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert "megatron3d" not in snippet
    tensors = merged(SmallLayout(tp=3, dp=2))
    directory = save_checkpoint(tmp_path, 20, tensors, documents={}, keep_last=None, group=None, rank=0, world_size=1)
    scope: dict = {}
    exec(snippet, scope)
    for spec in SPECS:
        name = f"model/{spec.name}"
        assert torch.equal(scope["whole"](directory, name), full_tensor(name, spec.shape))
