"""Finds values that jsonargparse accepts but nobody can use: meaningless nulls, such as those of a name in a file with
no value after it, and base classes that cannot be instantiated.
"""

from dataclasses import is_dataclass
from typing import Any

from jsonargparse import Namespace

from qpruner.options.classes import Options, class_in, class_named, is_abstract
from qpruner.options.mistakes import no_class, wrong_value
from qpruner.options.words import item_type, members, takes_null


def check_parsed(options: Options, given: Any, prefix: str = "") -> None:
    """Finds values that jsonargparse leaves to the receiver to reject: meaningless nulls and abstract classes.

    Args:
        options: options of a parser or a class.
        given: values that were parsed for the options.
        prefix: prefix of the names in an error message.

    Raises:
        UserError: there is such a value.
    """
    for name, option_type in options.types.items():
        value = given.get(name)
        if value is not None or name not in options.unset:
            _check(option_type, value, prefix + name)


def _check(option_type: Any, value: Any, name: str) -> None:
    """Checks a value and everything inside it: items of a list, options of a class or a dataclass."""
    if value is None and not takes_null(option_type):
        raise wrong_value(option_type, value, name)
    if isinstance(value, list):
        for items in filter(None, map(item_type, members(option_type))):
            for item in value:
                _check(items, item, name)
    elif isinstance(value, Namespace) and "class_path" in value:
        known = class_named(object, value.class_path)
        if known is not None:
            if is_abstract(known):
                raise no_class(class_in(option_type) or known, known.__name__, name)
            check_parsed(Options.of_class(known), value.get("init_args") or {}, f"{name}.")
    elif isinstance(value, Namespace) and (group := class_in(option_type)) and is_dataclass(group):
        check_parsed(Options.of_class(group), value, f"{name}.")
