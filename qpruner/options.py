"""An argument parser that answers a misspelt option with the one that was probably meant."""

import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NoReturn

from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

from qpruner import callbacks, datamodules
from qpruner.errors import UserError, nearest, user_error

UNKNOWN_OPTION = re.compile(
    r"unrecognized arguments: --(?P<flag>[\w.\-]+)"
    r"|(?:Group '(?P<group>[\w.]+)'|Subcommand '\w+') does not accept option '(?P<member>[\w.]+)'"
    r"|[Oo]ption '(?P<option>[\w.]+)' is not accepted"
)
INVALID_CHOICE = re.compile(
    r'Parser key "(?P<key>[\w.]+)":\s+Expected a typing\.Literal\[(?P<choices>[^\]]*)\]\. Got value: (?P<given>\S*)'
)
UNKNOWN_CLASS = re.compile(r"Expected a dot import path string: (?P<name>\w+)$", re.MULTILINE)
"""How jsonargparse names what it does not know."""


class SuggestingParser(LightningArgumentParser):
    """Ends with a `UserError` that says in a line what was wrong, and names the option or class nearest to it."""

    def add_method_arguments(self, *args: Any, **kwargs: Any) -> list[str]:
        # A group for them would have the method's name, which the section of `search` has already.
        return super().add_method_arguments(*args, **{**kwargs, "as_group": False})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # an inner parser, whose caller may try something else
            super().error(message, ex)
        if known := user_error(ex):
            raise known
        hint = f"\n`{self.prog.replace(' [options]', '')} --help` explains every option."
        if found := INVALID_CHOICE.search(message):
            choices = re.findall(r"'([^']*)'", found["choices"])
            allowed = f"; it is one of {', '.join(choices)}."
            message = f"{found['key']} is {found['given']!r}{allowed}{nearest(found['given'], choices)}"
        elif found := UNKNOWN_OPTION.search(message):
            group = f"{found['group']}." if found["group"] else ""
            word = group + next(filter(None, (found["flag"], found["member"], found["option"])))
            message = f"There is no option {word!r}.{nearest(word, known_options(self))}"
        elif found := UNKNOWN_CLASS.search(message):
            message = f"There is no class {found['name']!r}.{nearest(found['name'], class_names())}"
        raise UserError(message + hint) from ex


def known_options(parser: ArgumentParser) -> Iterator[str]:
    """Names of all options, those of the data modules and callbacks in each way that they can be written."""
    for action in parser._actions:
        yield action.dest
        for command in getattr(action, "_name_parser_map", {}).values():
            yield from known_options(command)
    for prefix, classes in (("data", datamodules), ("trainer.callbacks", callbacks)):
        for name in class_options(classes):
            yield from (name, f"{prefix}.{name}", f"{prefix}.init_args.{name}")


def class_names() -> list[str]:
    return [*datamodules.__all__, *callbacks.__all__]


def class_options(package: ModuleType) -> set[str]:
    """Names of the options of all classes that a package offers."""
    names: set[str] = set()
    for class_name in package.__all__:
        parser: Any = ArgumentParser()
        parser.add_class_arguments(getattr(package, class_name))
        names |= {action.dest for action in parser._actions}
    return names
