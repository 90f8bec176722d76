"""What a ZeRO stage shards over the data-parallel ranks: four rows, and no other test of the stage number.

Source: Rajbhandari et al. 2020 (ZeRO), section 5.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron3d.errors import ConfigError


@dataclass(frozen=True)
class Policy:
    """Which state each data-parallel rank keeps only its own part of."""

    shard_optimizer: bool
    shard_grads: bool
    shard_params: bool


POLICIES = {
    0: Policy(shard_optimizer=False, shard_grads=False, shard_params=False),
    1: Policy(shard_optimizer=True, shard_grads=False, shard_params=False),
    2: Policy(shard_optimizer=True, shard_grads=True, shard_params=False),
    3: Policy(shard_optimizer=True, shard_grads=True, shard_params=True),
}


def policy_of(zero_stage: int) -> Policy:
    """The policy of a stage.

    Raises:
        ConfigError: there is no such stage.
    """
    if zero_stage not in POLICIES:
        raise ConfigError(f"--zero-stage {zero_stage} is not a stage of ZeRO; use {', '.join(map(str, POLICIES))}")
    return POLICIES[zero_stage]
