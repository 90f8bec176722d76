"""What becomes of Megatron-LM's flags that are no option of ours: a synonym, accepted with a line, or refused by name.

The rule: a flag is *accepted* where nobody counts on its effect, because leaving it out changes neither the trained
weights, nor what is read and saved, nor what protects the run (`megatron_accepted.py`). So an old launch script starts
and says in one line what it lost. A flag of whose feature somebody would be deprived in silence is *refused*, with what
to use instead (`megatron_refused.py`). A *synonym* sets one of our options to a fixed value; it yields to that option's
own flag.

The lists follow the arguments of Megatron-LM from 2019 to 2026. Anything else is an unknown flag (see `cli.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from megatron3d.config.foreign.megatron_accepted import ACCEPTED
from megatron3d.config.foreign.megatron_refused import REFUSED

# Later rows win over earlier ones, as rotary positions do over --no-position-embedding in Megatron-LM.
SYNONYMS: Mapping[str, Mapping[tuple[str, str], Any]] = MappingProxyType(
    {
        "--no-position-embedding": {("model", "position_embedding_type"): "none"},
        "--use-rotary-position-embeddings": {("model", "position_embedding_type"): "rope"},
        "--multi-query-attention": {("model", "group_query_attention"): True, ("model", "num_query_groups"): 1},
        "--erf-gelu": {("model", "activation"): "gelu"},
        "--checkpoint-attention": {("train", "recompute_granularity"): "selective"},
        "--checkpoint-activations": {
            ("train", "recompute_granularity"): "full",
            ("train", "recompute_method"): "uniform",
        },
    }
)

# Values at which a refused flag asks for what is done anyway.
HARMLESS_VALUES: Mapping[str, str] = MappingProxyType(
    {
        "--dataloader-type": "single",
        "--softmax-type": "vanilla",
        "--rope-type": "rope",
        "--rotary-seq-len-interpolation-factor": "1",
        "--cp-comm-type": "p2p",
        "--data-parallel-sharding-strategy": "no_shard",
        "--num-distributed-optimizer-instances": "1",
        "--expert-tensor-parallel-size": "1",
        "--cpu-offloading-num-layers": "0",
        "--vocab-extra-ids": "0",
        "--head-lr-mult": "1.0",
        "--main-grads-dtype": "fp32",
        "--main-params-dtype": "fp32",
        "--muon-tp-mode": "duplicated",
        "--rerun-mode": "disabled",
    }
)


def accepted(flag: str) -> tuple[str, str] | None:
    """(reason, number of values) of a flag that is accepted without effect, the number as in argparse: 0, 1 or *."""
    for row in ACCEPTED:
        for arity, names in (("0", row.switches), ("1", row.valued), ("*", row.lists)):
            if flag in names.split():
                return row.reason, arity
    return None


def refused(flag: str) -> str | None:
    """What to use instead of a flag whose feature is not here, or None if the flag is not such a one."""
    for row in REFUSED:
        if flag in row.flags.split() or any(flag.startswith(prefix) for prefix in row.prefixes.split()):
            return row.instead
    return None
