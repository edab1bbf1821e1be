"""The argument parser of the commands that LightningCLI runs."""

import textwrap
from enum import Enum
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from qpruner.errors import UserError, user_error

LONGEST = 400


class CommandParser(LightningArgumentParser):
    """Raises a `UserError` where its parent class would exit the program, and accepts no abbreviations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def add_method_arguments(self, *args: Any, **kwargs: Any) -> list[str]:
        # A group for them would be named after the method, a name that the section of `search` already has.
        return super().add_method_arguments(*args, **{**kwargs, "as_group": False})

    def dump(self, cfg: Namespace, *args: Any, **kwargs: Any) -> str:
        dumped: str = super().dump(plain(cfg), *args, **kwargs)
        return dumped

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # a nested parser, whose caller may try something else
            super().error(message, ex)
        raise user_error(ex) or UserError(textwrap.shorten(message, LONGEST)) from ex


def plain(value: Any) -> Any:
    """A copy of options in which string enumerations, which YAML does not know, are plain text."""
    if isinstance(value, Namespace):
        copy = value.clone()
        vars(copy).update({name: plain(content) for name, content in vars(value).items()})
        return copy
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value.value if isinstance(value, Enum) and isinstance(value, str) else value
