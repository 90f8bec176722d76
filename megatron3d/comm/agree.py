"""Whether all ranks decided alike: what each read from files is compared before anything depends on it.

Every rank reads options, tokenizer and data by itself. Where a file system shows two of them different things, they
would build different meshes and wait for each other for ever, or train one model on two kinds of data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import torch.distributed as dist

from megatron3d.errors import Megatron3dError


def require_agreement(values: Mapping[str, str], error: type[Megatron3dError]) -> None:
    """Compare `values` over all ranks of the job, by name. Collective over the default process group, if there is one.

    Digests are compared first; the values themselves travel only where those differ.

    Raises:
        Megatron3dError: `error`, on every rank, with a sentence for each value that differs and the ranks of each.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    digest = hashlib.sha256(json.dumps(sorted(values.items())).encode()).hexdigest()
    if len(set(_gathered(digest))) > 1:
        raise error("\n".join(disagreements(_gathered(dict(values)))))


def _gathered(value: object) -> list:
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def digest_of(value: object) -> str:
    """A digest of plain values (what `json` can write), to be compared by `require_agreement`."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def disagreements(values_by_rank: Sequence[Mapping[str, str]]) -> list[str]:
    """A sentence for each name under which not all ranks have the same value."""
    names = dict.fromkeys(name for values in values_by_rank for name in values)
    sentences = []
    for name in names:
        ranks_of: dict[str, list[int]] = {}
        for rank, values in enumerate(values_by_rank):
            ranks_of.setdefault(values.get(name, "nothing"), []).append(rank)
        if len(ranks_of) > 1:
            found = "; ".join(f"{_ranks(ranks)} {value}" for value, ranks in ranks_of.items())
            sentences.append(
                f"The ranks do not agree on {name}: {found}. Give all of them the same command line and the same files."
            )
    return sentences


def _ranks(ranks: Sequence[int]) -> str:
    """Ranks with "have" or "has", runs of consecutive ones shortened: "ranks 0-2, 5 have"."""
    if len(ranks) == 1:
        return f"rank {ranks[0]} has"
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], rank]
        else:
            runs.append([rank])
    return f"ranks {', '.join('-'.join(map(str, run)) for run in runs)} have"
