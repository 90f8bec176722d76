"""One or two texts as one BERT input: [CLS] A [SEP] or [CLS] A [SEP] B [SEP], cut to a length.

Fine-tuning and serving both come here, so that a served model reads a text as it learned to. Nothing but lists of
integers: a service needs no torch.

Source: Devlin et al. 2018 (arXiv:1810.04805), figure 4; of a pair that is too long the longer text loses its last
tokens, as in the paper's released code.
"""

from __future__ import annotations

from collections.abc import Sequence


def cut(parts: Sequence[Sequence[int]], room: int) -> tuple[Sequence[int], ...]:
    """One or two texts shortened at their ends to `room` tokens in all: of two always the longer one gives, and of
    two that are equally long the second."""
    if sum(map(len, parts)) <= room:
        return tuple(parts)
    if len(parts) == 1:
        return (parts[0][:room],)
    first, second = map(len, parts)
    # Whoever is no longer than half of the room keeps everything; else both end at half, the first with the odd token.
    second_kept = max(room - first, min(second, room // 2))
    return parts[0][: room - second_kept], parts[1][:second_kept]


def with_special_tokens(parts: Sequence[Sequence[int]], *, cls: int, sep: int) -> list[int]:
    """[CLS] before everything and [SEP] behind each text; the first text's share is its length + 2."""
    return [cls, *(id for part in parts for id in (*part, sep))]
