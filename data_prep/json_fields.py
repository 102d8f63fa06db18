"""Checks the fields of JSON files that may come from anywhere: each must have the right type and be within its range.

The module `files` opens and parses the files. The callers of `Fields` know which fields a file has.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.errors import InputError, printable, quoted
from data_prep.files import read_json

LARGEST = 10**15  # far above any figure of a run; a float represents every integer up to here exactly
LARGEST_SETTING = 2**63  # above the largest --seed

Setting = str | int | float | bool | None | list[str | int | float | bool | None]


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: object, minimum: int, maximum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= maximum


class Fields:
    """The fields of one JSON object.

    A null field counts as missing. Reading a field of the wrong type or outside its range raises InputError, which
    names the file and the field. For a number outside its range, `number` returns None instead. Strings are made
    printable unless `exact` is set.
    """

    def __init__(self, content: Mapping[str, Any], path: Path, *, parent: str = "") -> None:
        self._content, self.path, self._parent = content, path, parent

    @classmethod
    def read(cls, path: Path) -> "Fields | None":
        """The fields of the JSON object in `path`, or None if there is no such file."""
        content = read_json(path)
        return None if content is None else cls(content, path)

    def __contains__(self, name: str) -> bool:
        return self._content.get(name) is not None

    def names(self) -> list[str]:
        return list(self._content)

    def text(self, name: str, default: str = "", *, exact: bool = False) -> str:
        value = self._content.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self._wrong(name, "a string", value)
        return value if exact else printable(value)

    def texts(self, name: str, *, exact: bool = False) -> tuple[str, ...]:
        values = self._list(name)
        if not all(isinstance(value, str) for value in values):
            raise self._wrong(name, "a list of strings", values)
        return tuple(values) if exact else tuple(map(printable, values))

    def flag(self, name: str, default: bool) -> bool:
        value = self._content.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false", value)
        return value

    def integer(self, name: str, *, minimum: int = 0, maximum: int = LARGEST) -> int | None:
        value = self._content.get(name)
        if value is None:
            return None
        if not _is_integer(value, minimum, maximum):
            raise self._wrong(name, f"a whole number from {minimum} to {maximum}", value)
        return value

    def integers(self, name: str, *, minimum: int = 0, maximum: int = LARGEST) -> tuple[int, ...]:
        values = self._list(name)
        if not all(_is_integer(value, minimum, maximum) for value in values):
            raise self._wrong(name, f"a list of whole numbers from {minimum} to {maximum}", values)
        return tuple(values)

    def number(self, name: str) -> float | None:
        """A finite number. NaN, infinity (Python writes both to JSON) and numbers beyond LARGEST count as missing."""
        value = self._content.get(name)
        if value is None:
            return None
        if not is_number(value):
            raise self._wrong(name, "a number", value)
        return float(value) if -LARGEST <= value <= LARGEST else None

    def numbers(self, name: str) -> tuple[float, ...]:
        values = self._list(name)
        if not all(is_number(value) and -LARGEST <= value <= LARGEST for value in values):
            raise self._wrong(name, f"a list of numbers from {-LARGEST} to {LARGEST}", values)
        return tuple(map(float, values))

    def setting(self, name: str) -> Setting:
        """A string, a number from -LARGEST_SETTING to LARGEST_SETTING, true, false or null, or a list of these."""
        value = self._content.get(name)
        parts = value if isinstance(value, list) else [value]
        for part in parts:
            fits = abs(part) <= LARGEST_SETTING if isinstance(part, int | float) else isinstance(part, str | None)
            if not fits:
                kind = "a string, a number from -2^63 to 2^63, true, false, null or a list of these"
                raise self._wrong(name, kind, value)
        cleaned = [printable(part) if isinstance(part, str) else part for part in parts]
        return cleaned if isinstance(value, list) else cleaned[0]

    def part(self, name: str) -> "Fields":
        """The object in field `name`; an empty one if the field is missing."""
        value = self._content.get(name)
        if value is not None and not isinstance(value, dict):
            raise self._wrong(name, "an object", value)
        return Fields(value or {}, self.path, parent=f"{self._parent}{name}.")

    def _list(self, name: str) -> list[Any]:
        value = self._content.get(name)
        if value is not None and not isinstance(value, list):
            raise self._wrong(name, "a list", value)
        return value or []

    def _wrong(self, name: str, kind: str, value: object) -> InputError:
        field = printable(f"{self._parent}{name}")
        return InputError(f"{self.path}: {field} must be {kind}, got {quoted(value)}")
