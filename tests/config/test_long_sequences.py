"""What makes room for long sequences is refused where it cannot work, with a sentence that says why."""

from __future__ import annotations

import pytest

from megatron3d.config.check import check
from megatron3d.config.cli import parse_args

RUN = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16 "
    "--micro-batch-size 1 --train-iters 1 --lr 1e-3 --mock-data --vocab-size 64"
)
CHUNKS = "--mlp-chunks-for-training 2"
FULL = "--recompute-granularity full"


def problems(flags: str, *, world_size: int = 1) -> list[str]:
    return check(parse_args(f"{RUN} {flags}".split(), program="test", description="test"), world_size)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--loss-chunk-size 0", "--loss-chunk-size 0 is outside its range"),
        (f"{CHUNKS} --num-experts 4", "--num-experts sends tokens to experts instead"),
        (f"{CHUNKS} {FULL} --recompute-reuse-communication", "runs each MLP once more in the backward"),
        ("--offload-activations --offload-dir d", "no layers are recomputed"),
        (f"--offload-activations {FULL} --device cpu", "say where with --offload-dir"),
    ],
)
def test_what_cannot_work_is_refused(flags: str, sentence: str) -> None:
    (found,) = problems(flags)
    assert sentence in found


def test_the_options_go_together() -> None:
    assert problems(f"--loss-chunk-size 4 {CHUNKS} {FULL} --offload-activations --offload-dir d") == []
