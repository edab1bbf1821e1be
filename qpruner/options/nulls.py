"""Nulls where they mean nothing: a name in a YAML file with nothing behind it."""

from typing import Any

from jsonargparse import Namespace

from qpruner.errors import UserError
from qpruner.options.classes import Options, allowed, class_named
from qpruner.options.words import takes_null


def check_nulls(options: Options, given: Any, prefix: str = "") -> None:
    """Finds values that are null where that means nothing, which jsonargparse leaves to whoever gets them.

    Args:
        options: of a parser or a class.
        given: what was parsed for them.
        prefix: of the names, in an error.

    Raises:
        UserError: there is one.
    """
    for name, option_type in options.types.items():
        value = given.get(name)
        if value is None and name not in options.unset and not takes_null(option_type):
            raise UserError(
                f"{prefix}{name} is null; it must be {allowed(option_type)}. Give it a value, or leave it out for its "
                f"default."
            )
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Namespace) and "class_path" in item:
                known = class_named(object, item.class_path)
                if known is not None:
                    check_nulls(Options.of_class(known), item.get("init_args") or {}, f"{prefix}{name}.")
