"""Whatever the `tokenizers` library raises for a file or a text, as one sentence for the user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron3d.errors import DataError


@contextmanager
def as_data_error(what: str, remedy: str) -> Iterator[None]:
    """Turn an error of the library inside the block into a DataError: "WHAT (REASON); REMEDY".

    The library raises bare `Exception`s, and for some damage its Rust code panics, which arrives as an exception
    beside `Exception` whose type has a name but no module to import it from.

    Raises: DataError.
    """
    try:
        yield
    except DataError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{what} ({error}); {remedy}") from error
