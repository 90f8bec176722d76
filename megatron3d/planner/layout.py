"""The layout of a resolved run."""

from __future__ import annotations

from megatron3d.comm.layout import Layout
from megatron3d.config.sections.parallel import ParallelConfig


def layout_of(parallel: ParallelConfig, *, query_groups: int | None = None) -> Layout:
    """The degrees of a resolved run as a layout.

    Args:
        parallel: the degrees.
        query_groups: key and value heads of the model; None where nothing is asked about the `kv` axis.

    Raises:
        ConfigError: they do not fit together.
    """
    return Layout(
        tp=parallel.tensor_model_parallel_size,
        pp=parallel.pipeline_model_parallel_size,
        dp=parallel.data_parallel_size,
        cp=parallel.context_parallel_size,
        ep=parallel.expert_model_parallel_size,
        etp=parallel.expert_tensor_parallel_size,
        zero_shard=parallel.zero_shard_size,
        cp_heads=parallel.context_head_ranks,
        kv_copies=1 if query_groups is None else max(1, parallel.tensor_model_parallel_size // query_groups),
    )
