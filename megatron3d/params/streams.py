"""Named random streams: every random number belongs to a stream whose seed is a pure function of what it is for.

No generator has a state that lives across steps, so nothing random needs saving, a recomputed forward draws what the
first one drew, and no layout shifts another's numbers.
"""

from __future__ import annotations

import hashlib


def stream_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream named by `names`, independent for different names.

    Source: the first eight bytes of BLAKE2b (RFC 7693) of the words, so nearby seeds give unrelated streams.
    """
    words = "\x1f".join(str(name) for name in (seed, *names))
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "little") >> 1
