"""Plain data from a file, as values of the types that the code is written in; anything else is a `UserError`."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

from qpruner.errors import UserError, brief, cut
from qpruner.files import read_json, reading, write_json

T = TypeVar("T")
NAMES: dict[type, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "an object",
}
LARGEST = 2**63 - 1
"""Larger integers are a mistake, or worse: no count in qpruner comes near this."""
NOT_FINITE = ("nan", "inf", "-inf")
"""How numbers that JSON cannot represent are written."""


class Record:
    """A dataclass that a JSON file holds.

    ``remedy`` is what to do about a file that is not as it should be, as a sentence.
    """

    remedy: ClassVar[str]

    def write(self, path: Path) -> None:
        write_json(path, _writable(asdict(self)))  # type: ignore[call-overload]  # a dataclass, as those who inherit

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads what `write` wrote.

        Raises:
            UserError: no such file, or it holds something else.
        """
        return read_as(path, cls, remedy=cls.remedy)


def _writable(value: Any) -> Any:
    """Plain data with `NOT_FINITE` in the place of numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _writable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_writable(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_as(path: Path, hint: type[T], *, remedy: str) -> T:
    """What a JSON file holds, as a value of a type; see `conform`.

    Args:
        path: path of the JSON file.
        hint: type that the content must have.
        remedy: what to do about a file that is not as it should be, as a sentence.

    Raises:
        UserError: there is no such file, it is no JSON, or an entry is missing, unknown, of a wrong type or impossible.
    """
    content = read_json(path, remedy=remedy)
    with reading(path, remedy):
        return conform(content, hint)


def conform(value: Any, hint: Any, place: str = "") -> Any:
    """Plain data as a value of a type, down to the last entry.

    Objects become dataclasses (with exactly their fields) or typed dictionaries (with at least theirs), lists become
    tuples where the type says so, whole numbers and `NOT_FINITE` become floats.

    Args:
        value: value that JSON or a checkpoint gave.
        hint: type that the value must have: a dataclass, a `TypedDict`, ``tuple[X, ...]``, ``list[X]``,
            ``Sequence[X]``, ``dict[K, X]``, a `Literal`, a plain class, ``Any``, or a union of these, of which the
            first that takes the value counts.
        place: where in the file the value stands; empty for the whole.

    Raises:
        UserError: an entry is missing, unknown, of a wrong type or impossible; it is named.
    """
    kind, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if kind in (Union, UnionType):
        return _member(value, inner, place)
    if kind is Literal:
        return value if isinstance(value, str) and value in inner else _refuse(value, " or ".join(inner), place)
    if is_dataclass(hint) or is_typeddict(hint):
        return _record(value, hint, place)
    if kind is dict:
        entries = value if isinstance(value, dict) else _refuse(value, "an object", place)
        key_type, entry_type = inner
        return {
            _key(key, key_type, place): conform(entry, entry_type, _below(place, key)) for key, entry in entries.items()
        }
    if kind in (tuple, list, Sequence):
        entries = value if isinstance(value, list | tuple) else _refuse(value, "a list", place)
        make = list if kind is list else tuple
        return make(conform(entry, inner[0], f"{place}[{number}]") for number, entry in enumerate(entries))
    if hint is float and (value in NOT_FINITE if isinstance(value, str) else _is_whole(value)):
        return float(value)
    if not (_is_whole(value) if hint is int else isinstance(value, hint)):
        _refuse(value, NAMES.get(hint, f"a {hint.__name__}"), place)
    return value


def _member(value: Any, hints: Sequence[Any], place: str) -> Any:
    """The value as the first of some types that takes it; what the last says where none does."""
    if value is None and NoneType in hints:
        return None
    *others, last = (hint for hint in hints if hint is not NoneType)
    for hint in others:
        with suppress(UserError):
            return conform(value, hint, place)
    return conform(value, last, place)


def _is_whole(value: Any) -> bool:
    return type(value) is int and abs(value) <= LARGEST  # True is an int, too


def _record(value: Any, hint: Any, place: str) -> Any:
    """A dataclass, which has its fields and no others, or a typed dictionary, which may have more."""
    content = value if isinstance(value, Mapping) else _refuse(value, "an object", place)
    hints, required = _fields(hint)
    missing = sorted(required - content.keys())
    unknown = sorted(map(str, content.keys() - hints.keys())) if is_dataclass(hint) else []
    if missing or unknown:
        raise UserError(
            f"{_whose(place)} is not as it should be:"
            + (f" {', '.join(missing)} missing." if missing else "")
            + (f" {cut(', '.join(unknown))} unknown." if unknown else "")
        )
    typed = {
        name: conform(content[name], inner, _below(place, name)) for name, inner in hints.items() if name in content
    }
    if not is_dataclass(hint):
        return {**content, **typed}
    try:
        return hint(**typed)  # type: ignore[operator]  # a dataclass, not an instance of one
    except UserError as error:
        raise UserError(f"{place}: {error}" if place else str(error)) from error


@cache
def _fields(hint: Any) -> tuple[dict[str, Any], set[str]]:
    """The types of the entries of a dataclass or typed dictionary, and the names of those that must be there."""
    if is_typeddict(hint):
        return get_type_hints(hint), set(hint.__required_keys__)
    hints = get_type_hints(hint)
    without_default = {
        field.name for field in fields(hint) if field.default is MISSING and field.default_factory is MISSING
    }
    return {field.name: hints[field.name] for field in fields(hint)}, without_default


def _key(key: Any, hint: type, place: str) -> Any:
    if hint is not int:
        return conform(key, hint, place)
    # The keys of JSON are text.
    return (
        int(key)
        if str(key).isascii() and str(key).isdigit() and len(str(key)) < 10
        else _refuse(key, "a number", place)
    )


def _below(place: str, key: Any) -> str:
    return f"{place}.{cut(key, 80)}" if place else cut(key, 80)


def _whose(place: str) -> str:
    return place or "It"


def _refuse(value: Any, expected: str, place: str) -> Any:
    raise UserError(f"{_whose(place)} must be {expected}, not {brief(value)}.")
