"""An argument parser that answers a misspelt option with the one that was probably meant."""

import re
from collections.abc import Iterator
from typing import Any, NoReturn

from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

from qpruner.errors import nearest

UNKNOWN = re.compile(
    r"unrecognized arguments: --(?P<flag>[\w.\-]+)|[Oo]ption '(?P<option>[\w.]+)' is not accepted|"
    r"Group '(?P<group>[\w.]+)' does not accept option '(?P<member>[\w.]+)'"
)
"""How jsonargparse names an option that it does not know."""


class SuggestingParser(LightningArgumentParser):
    """Adds the nearest known option to the message about an unknown one."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if found := UNKNOWN.search(message):
            group = f"{found['group']}." if found["group"] else ""
            word = group + next(filter(None, (found["flag"], found["option"], found["member"])))
            message = f"Unknown option {word!r}.{nearest(word, self._known(word))}\n{message}"
        super().error(message, ex)

    def _known(self, word: str) -> Iterator[str]:
        """Names that the word may have meant, written in the way that the word is."""
        for action in self._actions:
            yield action.dest
            for choice in getattr(action, "choices", None) or {}:
                if isinstance(parser := getattr(action, "_name_parser_map", {}).get(choice), SuggestingParser):
                    yield from parser._known(word)
        for name in data_options():
            yield from (name, f"data.{name}", f"data.init_args.{name}")


def data_options() -> set[str]:
    """Names of the options of all data modules."""
    from qpruner import datamodules

    names: set[str] = set()
    for class_name in datamodules.__all__:
        parser: Any = ArgumentParser()
        parser.add_class_arguments(getattr(datamodules, class_name))
        names |= {action.dest for action in parser._actions}
    return names
