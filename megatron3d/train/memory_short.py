"""Out of memory, as a sentence: how much was asked for, and which options make a run smaller.

torch has one class for GPUs, plain RuntimeErrors for the host and for libraries on the GPU, and Python and numpy have
their own; what they have in common is read from their texts, so that nothing here needs torch.
"""

from __future__ import annotations

import errno
import re

from megatron3d.errors import MemoryShortError

_ON_DEVICE = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC")
_ON_HOST = ("can't allocate memory", "Cannot allocate memory", "not enough memory")
_AMOUNT = re.compile(r"[Tt]ried to allocate ([\d.]+ \w+)|Unable to allocate ([\d.]+ \w+)")
_CAPACITY = re.compile(r"total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free")


def memory_short(error: BaseException) -> MemoryShortError | None:
    """The sentence for an error that means that memory ran out, with the notes of the error; None for any other."""
    text = str(error)
    on_device = isinstance(error, RuntimeError) and any(sign in text for sign in _ON_DEVICE)
    on_host = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    on_host = on_host or (isinstance(error, RuntimeError) and any(sign in text for sign in _ON_HOST))
    if not on_device and not on_host:
        return None
    found = MemoryShortError(
        f"{'the GPU' if on_device else 'this machine'} is out of memory{_amount(text)}. tools/estimate.py with the "
        "same options says what each rank holds; a smaller --micro-batch-size, --recompute-granularity full, a higher "
        "--zero-stage, more tensor or pipeline parallelism, or --offload-optimizer make it less"
    )
    for note in getattr(error, "__notes__", []):
        found.add_note(note)
    return found


def _amount(text: str) -> str:
    """What was asked for and what there is, as far as the text shows."""
    asked, has = _AMOUNT.search(text), _CAPACITY.search(text)
    size = _readable(asked[1] or asked[2]) if asked else None
    wanted = f": {size} more were asked for at once" if size else ""
    return f"{wanted}; of {has[1]} it has {has[2]} free" if has else wanted


def _readable(amount: str) -> str:
    """A size in a unit for people; torch's allocator of the host counts bytes."""
    number, unit = amount.split()
    return f"{int(number) / 2**30:.2f} GiB" if unit == "bytes" else amount
