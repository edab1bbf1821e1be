"""The arguments of a run as plain data, to which its folder is bound."""

from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from enum import Enum
from inspect import signature
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from qpruner.callbacks import Compression
from qpruner.datamodules.base import TokenDataModule
from qpruner.files import hash_json

LONGEST = 200
"""Largest number of characters of a data module's option that is shown as it is."""


def plain(value: Any) -> Any:
    """A value in a form that YAML can hold; an object as its class and its arguments, as on the command line."""
    match value:
        case None | bool() | int() | float() | str():
            return value.value if isinstance(value, Enum) else value
        case Path():
            return str(value)
        case Mapping():
            return {str(key): plain(content) for key, content in value.items()}
        case Sequence() | set() | frozenset():
            return [plain(item) for item in value]
        case Logger():  # it changes no result, and to read its properties may start what it logs to
            return {"class_path": plain(type(value))}
        case type():
            return f"{value.__module__}.{value.__qualname__}"
        case _ if is_dataclass(value) and not isinstance(value, type):
            return plain(vars(value))
        case _:
            return {"class_path": plain(type(value)), "init_args": plain(_options_of(value))}


def _options_of(value: Any) -> dict[str, Any]:
    """The options that an object was made with, as far as it exposes them."""
    if isinstance(value, Compression):
        return value.options
    if isinstance(value, TokenDataModule):
        rows = {name: _short(option) for name, option in value.options().items()}
        return {"rows": rows, "max_length": value.max_length, "loader": value.loader, "seed": value.seed}
    return {
        name: getattr(value, name)
        for name in _parameters(type(value))
        if isinstance(getattr(value, name, None), str | int | float | Path | Sequence | Mapping)
    }


def _short(option: Any) -> Any:
    """An option, or its hash if it is longer than a person would read."""
    return option if len(str(option)) <= LONGEST else {"sha256": hash_json(option)}


def _parameters(of: type) -> list[str]:
    try:
        return [*signature(of).parameters]
    except ValueError:  # implemented in C, such as a timedelta
        return [name for name in vars(of) if not name.startswith("_")]
