"""Whole training steps on a GPU that is not there; a process of its own, since a device once named stays.

    python -m tests.train.fake_gpu '[["gpt", "triton", "--bf16 --zero-stage 3"], ...]'

The device is that of `tools/bench/fake_gpu.py`. What a step reads back to the host, and what it copies between devices,
is counted within the pipeline's loop over micro-batches and outside of it. Prints one JSON document, an entry for each
case.
"""

from __future__ import annotations

import json
import sys

from tests.planner.measured import config_of
from tools.bench.fake_gpu import FakeGpu

TINY = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --vocab-size 512 --seq-length 32 "
    "--max-position-embeddings 32 --micro-batch-size 1 --global-batch-size 2 --attention-dropout 0"
)


def main() -> None:
    """Run the cases."""
    gpu = FakeGpu()
    print(json.dumps([_outcome(gpu, *case) for case in json.loads(sys.argv[1])]))
    gpu.leave()


def _outcome(gpu: FakeGpu, architecture: str, implementation: str, flags: str) -> dict[str, object]:
    gpu.implementation = implementation
    traffic, parts = gpu.step(config_of(f"{TINY} {flags}", 1, architecture=architecture))
    devices = {one.device.type for unit in parts.engine.units.values() for one in [unit.weights.full]}
    return {
        "inside": [one.what for one in traffic.host if one.is_inside],
        "outside": [one.what for one in traffic.host if not one.is_inside],
        "reads": traffic.reads(),
        "waits": [one.what for one in traffic.host if one.waits],
        "weights_on": sorted(devices),
    }


if __name__ == "__main__":
    main()
