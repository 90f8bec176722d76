"""The numbers among `torchrun`'s variables: parsed, and compared with each other, before anyone relies on them.

Started by hand or by a cluster's own launcher, a process can have any of them wrong; a wrong rank would hang the job
at its first collective.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from megatron3d.errors import ConfigError

# Variable -> its value where it is not set (LOCAL_WORLD_SIZE: that of WORLD_SIZE), and the least it may be.
_VARIABLES: Mapping[str, tuple[int | None, int]] = MappingProxyType(
    {
        "RANK": (0, 0),
        "WORLD_SIZE": (1, 1),
        "LOCAL_RANK": (0, 0),
        "LOCAL_WORLD_SIZE": (None, 1),
        "TORCHELASTIC_RESTART_COUNT": (0, 0),
    }
)
_MOST = 2**31 - 1
_HIGHEST_PORT = 65535
_REMEDY = "start with torchrun, which sets them, or unset them for a single process"


def parse_launch_variables(env: Mapping[str, str]) -> dict[str, int]:
    """The numbers of the launcher by variable.

    Args:
        env: the environment.

    Raises:
        ConfigError: one is no number in its range, or they contradict each other; with all problems.
    """
    problems: list[str] = []
    found: dict[str, int] = {}
    for name, (default, least) in _VARIABLES.items():
        default = found["WORLD_SIZE"] if default is None else default
        found[name] = _number(env, name, default, (least, _MOST), problems)
    if found["WORLD_SIZE"] > 1:
        _number(env, "MASTER_PORT", 1, (1, _HIGHEST_PORT), problems)
    problems += [] if problems else _contradictions(found)
    if problems:
        raise ConfigError(f"the launcher's environment variables cannot be used: {'; '.join(problems)}; {_REMEDY}")
    return found


def _number(env: Mapping[str, str], name: str, default: int, limits: tuple[int, int], problems: list[str]) -> int:
    """The number of a variable; where it is none, the default, and a problem more."""
    text = env.get(name)
    if text is None:
        return default
    least, most = limits
    # Not int() alone, which also takes 1_0 and digits of other scripts, of any length.
    if not (text.isascii() and text.isdecimal() and len(text) <= len(str(_MOST)) and least <= int(text) <= most):
        problems.append(f"{name}={text:.40} is not a whole number from {least} to {most}")
        return default
    return int(text)


def _contradictions(found: Mapping[str, int]) -> Iterator[str]:
    rank, world = found["RANK"], found["WORLD_SIZE"]
    local_rank, local_world = found["LOCAL_RANK"], found["LOCAL_WORLD_SIZE"]
    if rank >= world:
        yield f"RANK={rank} is not below WORLD_SIZE={world}"
    if local_rank >= local_world:
        yield f"LOCAL_RANK={local_rank} is not below LOCAL_WORLD_SIZE={local_world}"
    if local_world > world:
        yield f"LOCAL_WORLD_SIZE={local_world} is more than WORLD_SIZE={world}"
