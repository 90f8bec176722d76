"""Names of the corpora of a split in reports: the last part of each prefix, with more of the path where that is not
enough to tell them apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath

from megatron3d.errors import ConfigError


def source_names(prefixes: Sequence[str], given: Sequence[str]) -> tuple[str, ...]:
    """A name for each of the corpora: the `given` ones, or names made of their prefixes, all different.

    Raises: ConfigError if there are other than as many given names as corpora.
    """
    if given and len(given) != len(prefixes):
        raise ConfigError(
            f"--validation-set-names {' '.join(given)} are {len(given)} names for {len(prefixes)} validation corpora "
            f"({' '.join(prefixes)}); give one for each."
        )
    return tuple(given) or _last_parts(prefixes)


def _last_parts(prefixes: Sequence[str]) -> tuple[str, ...]:
    paths = [PurePath(prefix).parts for prefix in prefixes]
    names = list(prefixes)
    for depth in range(max(map(len, paths), default=0), 0, -1):
        short = ["/".join(parts[-depth:]) for parts in paths]
        counts = Counter(short)
        names = [name if counts[name] == 1 else longer for name, longer in zip(short, names, strict=True)]
    repeated: Counter[str] = Counter()
    for place, name in enumerate(names):
        repeated[name] += 1
        if repeated[name] > 1:
            names[place] = f"{name} ({repeated[name]})"
    return tuple(names)
