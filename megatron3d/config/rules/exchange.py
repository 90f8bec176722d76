"""What the kinds of attention over context-parallel ranks that exchange heads ask of heads and ranks."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

from megatron3d.config.sections.model import GivenModel
from megatron3d.config.sections.parallel import ParallelConfig

_CP, _SIZES = "--context-parallel-size", "--hierarchical-context-parallel-sizes"


def exchange_problems(model: GivenModel, parallel: ParallelConfig) -> Iterator[str]:
    """Heads that do not divide among ranks, and sizes that are not those of the ranks."""
    kinds, cp = parallel.cp_comm_type, parallel.context_parallel_size
    given = parallel.hierarchical_context_parallel_sizes
    if given and "a2a+p2p" not in kinds:
        yield f"{_SIZES} {' '.join(given)} is about --cp-comm-type a2a+p2p, which no layer has; leave it out."
    if parallel.cp_gather_again and kinds and "allgather" not in kinds:
        yield (
            f"--cp-gather-again is about --cp-comm-type allgather, and no layer has it with {' '.join(kinds)}; leave "
            "it out."
        )
    wrong = _size_problem(given, cp) if "a2a+p2p" in kinds else None
    if wrong:
        yield wrong
    if cp == 1:
        return
    if "a2a" in kinds:
        yield from _head_problems(model, parallel, cp, f"--cp-comm-type a2a with {_CP} {cp}")
    if "a2a+p2p" in kinds and not wrong:
        yield from _head_problems(model, parallel, int(given[0]), f"{_SIZES} {' '.join(given)}")


def _size_problem(given: tuple[str, ...], cp: int) -> str | None:
    """What is wrong with the two sizes of a2a+p2p. One rank alone needs none, and may have those of more."""
    asks = f"give the ranks that exchange heads and the groups that pass keys round, such as {_SIZES} {_example(cp)}"
    if not given:
        if cp == 1:
            return None
        return f"--cp-comm-type a2a+p2p needs {_SIZES}; {asks}."
    written = f"{_SIZES} {' '.join(given)}"
    if len(given) != 2 or not all(size.isascii() and size.isdigit() and int(size) for size in given):
        return f"{written} is not two whole numbers above 0; {asks}."
    if cp > 1 and int(given[0]) * int(given[1]) != cp:
        return f"{written} makes {int(given[0]) * int(given[1])} ranks and not {_CP} {cp}; {asks}."
    return None


def _example(cp: int) -> str:
    heads = next((size for size in range(2, cp) if cp % size == 0), cp)
    return f"{heads} {cp // heads}"


def _head_problems(model: GivenModel, parallel: ParallelConfig, ranks: int, who: str) -> Iterator[str]:
    """Heads of a tensor-parallel rank that do not divide among the `ranks` that exchange them."""
    heads, groups, tp = model.num_attention_heads, model.num_query_groups, parallel.tensor_model_parallel_size
    if not heads or not groups or heads % tp:
        return
    beside = f" on each of --tensor-model-parallel-size {tp} ranks" if tp > 1 else ""
    each, groups_each = heads // tp, max(1, groups // tp)
    if each % ranks:
        most = gcd(each, ranks)
        yield (
            f"{who} gives whole heads to each of {ranks} ranks, and --num-attention-heads {heads}, which are {each}"
            f"{beside}, do not divide among them; exchange heads among {most} ranks at most, or use --cp-comm-type p2p "
            "or allgather, which do not divide heads."
        )
    elif groups_each % ranks and ranks % groups_each:
        yield (
            f"{who} gives each of {ranks} ranks whole key and value heads or one that others have too, and "
            f"--num-query-groups {groups}, which are {groups_each}{beside}, neither divide among the ranks nor divide "
            "their number; use --cp-comm-type p2p or allgather, or another number of ranks."
        )
