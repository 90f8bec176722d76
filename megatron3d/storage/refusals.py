"""What the operating system's refusal to write means for a user: one sentence with file, reason and remedy."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron3d.errors import StorageError

# What helps against an error number, before "or" and the way out that the caller names.
_REMEDIES = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space within the quota",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EROFS: "mount it writable",
    errno.EACCES: "make it writable for this user",
    errno.EPERM: "make it writable for this user",
    errno.EISDIR: "remove the directory of that name",
    errno.EEXIST: "remove the file that stands in the place of a directory",
    errno.ENOTDIR: "remove the file that stands in the place of a directory",
    errno.ENOENT: "make the directory",
}
_OTHERWISE = "look at the file system"


def refusal(action: str, error: OSError, path: Path | str, *, way_out: str, assurance: str = "") -> StorageError:
    """The error for the user, to be raised from `error`.

    Args:
        action: what was tried, such as "write checkpoint file".
        error: what the system said; a file that it names is named too.
        path: the file or directory that the user knows.
        way_out: what the user can do besides mending the file system: "give another --save directory".
        assurance: what is safe nevertheless: "earlier checkpoints are untouched".
    """
    named = f" ({error.filename})" if error.filename and str(error.filename) != str(path) else ""
    parts = [f"could not {action} {path}: {error.strerror or error}{named}"]
    parts += [assurance] * bool(assurance)
    parts.append(f"{_REMEDIES.get(error.errno or 0, _OTHERWISE)} or {way_out}")
    return StorageError("; ".join(parts))


@contextmanager
def storage_errors(action: str, path: Path | str, *, way_out: str, assurance: str = "") -> Iterator[None]:
    """Turn an `OSError` of the block into the sentence of `refusal`.

    Raises:
        StorageError: the block raised an `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise refusal(action, error, path, way_out=way_out, assurance=assurance) from error
