"""Products through oneDNN change no result: layouts that compute with it against one process with torch's own library.

Each way by which a weight gradient is made has a row: at once, deferred by a schedule that splits the backward, into
buffers that come and go, and from an input that is gathered again.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from tests.dist.pool import Pool
from tests.parity.compare import check_against_one_process
from tests.parity.runs import Case, batches, brief, parts_of, trace, trace_cases

ONEDNN, SP = "--matmul onednn", "--sequence-parallel"
CASES = [
    brief(Case("gpt2", Layout(), ONEDNN)),
    brief(Case("llama", Layout(tp=2), f"{ONEDNN} {SP} --recompute-granularity full")),
    brief(Case("bert", Layout(dp=2), f"{ONEDNN} --zero-stage 3")),
    brief(Case("gpt2-mixed", Layout(pp=2), f"{ONEDNN} --pipeline-schedule zb-h1")),
    brief(Case("gpt2", Layout(tp=2, pp=2), f"{ONEDNN} {SP}")),
    brief(Case("llama-tied", Layout(tp=2, dp=2), f"{ONEDNN} --zero-stage 2")),
]


@pytest.mark.parity
@pytest.mark.parametrize(("world_size", "batch"), batches(CASES))
def test_products_through_onednn_give_the_training_of_one_process(
    pool: Pool, parity_table: list[str], world_size: int, batch: list[Case]
) -> None:
    by_rank = pool.run(world_size, trace_cases, batch, timeout_s=300)
    for number, case in enumerate(batch):
        check_against_one_process(case, [traces_of_rank[number] for traces_of_rank in by_rank], parity_table)


class _Calls(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("library", ["mkl", "onednn"])
def test_all_products_of_the_layers_go_through_the_library_that_is_chosen(library: str) -> None:
    """Three products of four linear layers in each block and of the output layer; attention multiplies batches."""
    case = Case("gpt2", Layout(), f"--matmul {library} --micro-batch-size 8")
    with _Calls() as counter:
        trace(parts_of(case, make_mesh(Layout())), num_steps=1)
    names = ("aten.mm.default", "aten.mm.out", "aten.addmm.default", "mkldnn._linear_pointwise.default")
    found = [counter.calls[name] for name in names]
    assert sum(found) == 3 * (4 * 4 + 1)
    assert found[-1] == (sum(found) if library == "onednn" else 0)
