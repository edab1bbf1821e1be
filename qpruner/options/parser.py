"""The argument parser of the commands that the LightningCLI runs."""

import textwrap
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from qpruner.errors import UserError, user_error

LONGEST = 400


class CommandParser(LightningArgumentParser):
    """Raises a `UserError` where its parent ends the program, and takes no abbreviations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def add_method_arguments(self, *args: Any, **kwargs: Any) -> list[str]:
        # A group for them would have the method's name, which the section of `search` has already.
        return super().add_method_arguments(*args, **{**kwargs, "as_group": False})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # an inner parser, whose caller may try something else
            super().error(message, ex)
        raise user_error(ex) or UserError(textwrap.shorten(message, LONGEST)) from ex
