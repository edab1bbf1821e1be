"""Types of options in plain words, for error messages that say what is allowed."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

PLAIN = {int: "a whole number", float: "a number", str: "text", Path: "a path", NoneType: "null"}
PLURAL = {int: "whole numbers", float: "numbers", str: "words", Path: "paths"}
MOST = 16
"""Largest number of names that a message lists."""


def in_words(option_type: Any) -> str:
    """The values that a type allows: ``a whole number, a list of whole numbers or null``."""
    choices = literal_choices(option_type)
    parts = [f"one of {listed(choices)}"] if choices else []
    for member in members(option_type):
        parts += ["true", "false"] if member is bool else [] if _choices(member) else [_singular(member)]
    *most, last = dict.fromkeys(parts)
    return f"{', '.join(most)} or {last}" if most else last


def listed(names: Iterable[Any]) -> str:
    """Names separated by commas; only the first ones if there are many."""
    distinct = list(dict.fromkeys(map(str, names)))
    return ", ".join(distinct[:MOST]) + (", ..." if len(distinct) > MOST else "")


def members(option_type: Any) -> Iterator[Any]:
    """The types of a union, including those of nested unions; the type itself if it is not a union."""
    if get_origin(option_type) in (Union, UnionType):
        for member in get_args(option_type):
            yield from members(member)
    else:
        yield option_type


def takes_null(option_type: Any) -> bool:
    """Whether null is one of the values of a type."""
    return any(member in (NoneType, Any) for member in members(option_type))


def literal_choices(option_type: Any) -> list[str]:
    """The values that a type lists."""
    return [choice for member in members(option_type) for choice in _choices(member)]


def item_type(option_type: Any) -> Any | None:
    """The type of the items of a list type; None for other types."""
    origin, arguments = get_origin(option_type), get_args(option_type)
    is_list = inspect.isclass(origin) and issubclass(origin, Iterable) and not issubclass(origin, (Mapping, tuple))
    return arguments[0] if is_list and arguments else None


def is_class(option_type: Any) -> bool:
    """Whether values are instances of a class that has options of its own."""
    return (
        inspect.isclass(option_type)
        and get_origin(option_type) is None
        and option_type.__module__ not in ("builtins", "datetime", "pathlib")
        and not issubclass(option_type, Enum)
    )


def _choices(member: Any) -> list[str]:
    if get_origin(member) is Literal:
        return [str(choice) for choice in get_args(member)]
    return [*member.__members__] if inspect.isclass(member) and issubclass(member, Enum) else []


def _singular(member: Any) -> str:
    if member in PLAIN:
        return PLAIN[member]
    if (item := item_type(member)) is not None:
        return f"a list of {_plural(item)}"
    if (value := _mapped_type(member)) is not None:
        return f"a mapping to {_plural(value)}"
    if inspect.isclass(member) and is_dataclass(member):
        return f"a mapping with {listed(field.name for field in fields(member))}"
    return f"a {getattr(member, '__name__', member)}"


def _plural(member: Any) -> str:
    if member in PLURAL:
        return PLURAL[member]
    if (value := _mapped_type(member)) is not None:
        return f"mappings to {_plural(value)}"
    if inspect.isclass(member) and is_dataclass(member):
        return _singular(member).replace("a mapping", "mappings", 1)
    return f"items, each of which is {in_words(member)}"


def _mapped_type(member: Any) -> Any | None:
    """The type of the values of a mapping type; None for other types."""
    origin, arguments = get_origin(member), get_args(member)
    return arguments[1] if inspect.isclass(origin) and issubclass(origin, Mapping) and len(arguments) == 2 else None
