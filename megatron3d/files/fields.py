"""An object of a JSON document by fields, each of the type that its reader expects, or a ValueError that names it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron3d.files.json_text import is_whole_number, kind_of


class Fields:
    """The fields of one object; `place` is where in the document it stands, for messages."""

    def __init__(self, value: Any, place: str) -> None:
        """Take the value that should be an object. Raises: ValueError if it is another kind."""
        if not isinstance(value, Mapping):
            raise ValueError(f"{place} is {kind_of(value)} and must be an object")
        self._values, self._place = value, place

    def get(self, name: str) -> Any:
        """A field of any type. Raises: ValueError if it is missing."""
        if name not in self._values:
            raise ValueError(f"{self._place} has no field {name!r}")
        return self._values[name]

    def integer(self, name: str, *, least: int = 0) -> int:
        """A whole number. Raises: ValueError."""
        value = self.get(name)
        if not is_whole_number(value, least):
            raise self._wrong(name, f"a whole number from {least} up")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers from 0 up. Raises: ValueError."""
        value = self.get(name)
        if not isinstance(value, list) or not all(is_whole_number(one, 0) for one in value):
            raise self._wrong(name, "a list of whole numbers from 0 up")
        return tuple(value)

    def text(self, name: str) -> str:
        """A string. Raises: ValueError."""
        value = self.get(name)
        if not isinstance(value, str):
            raise self._wrong(name, "a string")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings. Raises: ValueError."""
        value = self.get(name)
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise self._wrong(name, "a list of strings")
        return tuple(value)

    def flag(self, name: str) -> bool:
        """True or false. Raises: ValueError."""
        value = self.get(name)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def interval(self, name: str) -> tuple[float, float] | None:
        """Two numbers that rise, or null. Raises: ValueError."""
        value = self.get(name)
        if value is None:
            return None
        is_pair = isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))
        if not is_pair or not value[0] < value[1]:
            raise self._wrong(name, "null or a list of two finite numbers that rise")
        return float(value[0]), float(value[1])

    def entries(self, name: str) -> dict[str, Any]:
        """An object, as plain values by name. Raises: ValueError."""
        value = self.get(name)
        if not isinstance(value, dict):
            raise self._wrong(name, "an object")
        return value

    def objects(self, name: str) -> dict[str, Fields]:
        """An object of objects, by name. Raises: ValueError."""
        return {key: Fields(value, f"{name} {key!r:.100}") for key, value in self.entries(name).items()}

    def rows(self, name: str) -> list[Fields]:
        """A list of objects. Raises: ValueError."""
        value = self.get(name)
        if not isinstance(value, list):
            raise self._wrong(name, "a list of objects")
        return [Fields(one, f"{self._place}, {name} {number}") for number, one in enumerate(value)]

    def _wrong(self, name: str, wanted: str) -> ValueError:
        return ValueError(f"{self._place} has {name} {self._values[name]!r:.40}, which must be {wanted}")


def _is_number(value: Any) -> bool:
    """Whether a value is a number that a double holds."""
    is_one = isinstance(value, int | float) and not isinstance(value, bool)
    return is_one and abs(value) < 1e300  # a comparison that whole numbers of any length stand
