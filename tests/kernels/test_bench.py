"""The benchmark command, on CPU, with sizes that take no time."""

from __future__ import annotations

import pytest
import torch
from megatron3d_kernels import bench

SMALL = ["--rows", "4", "--hidden", "8", "--ffn", "6", "--heads", "2", "--vocabulary", "10", "--repeats", "1"]


def test_bench_on_cpu_says_that_triton_is_not_used_and_times_the_references(capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(["--device", "cpu", "--dtype", "float32", *SMALL])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "cpu, float32, median of 1; default: reference"
    assert lines[1].startswith("Triton is not used here: ")
    timed = {line.split("  ")[0]: float(line.split()[-1]) for line in lines[3:]}
    assert len(timed) == 11
    assert min(timed.values()) > 0


def test_bench_refuses_heads_that_do_not_divide(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--hidden", "10", "--heads", "4"])
    assert "--heads 4 does not divide --hidden 10" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is available")
def test_bench_on_cuda_gives_a_ratio_per_line(capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(["--device", "cuda", *SMALL])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 13
    assert all(line.endswith("x") for line in lines[2:])
