"""The error for input of the user that cannot be used, with the remedy."""

import reprlib
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from itertools import islice


class UserError(ValueError):
    """A mistake in a configuration, a file or a path; the command line prints it without a traceback.

    Its text names the value given, what is allowed, and the remedy.
    """


def user_error(error: BaseException | None) -> UserError | None:
    """The user's mistake behind an error that a library made of it, if there is one."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def check_ranges(options: object, group: str, **ranges: tuple[str, bool]) -> None:
    """Refuses the first option of a group whose value is outside its range.

    Args:
        options: object whose attributes are the values.
        group: name of the group.
        ranges: for each option, its range in words, and whether the value is inside.

    Raises:
        UserError: a value is outside its range.
    """
    for name, (range_in_words, is_inside) in ranges.items():
        if not is_inside:
            raise UserError(f"{group}.{name} is {getattr(options, name)}; it must be {range_in_words}.")


def brief(value: object) -> str:
    """A value as a message can show it: its `repr` with long parts left out, at most 120 characters."""
    shortening = reprlib.Repr()
    shortening.maxstring = shortening.maxother = shortening.maxlong = 80
    return cut(shortening.repr(value), 120)


def cut(text: object, length: int = 300) -> str:
    """A text on one line, with its middle left out if it is too long for a message."""
    line = " ".join(str(text).split())
    return line if len(line) <= length else f"{line[: length // 2 - 2]} ... {line[3 - length // 2 :]}"


def listed(names: Collection[str], most: int = 3) -> str:
    """The first of some names, and how many more there are; ``none`` for none."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return cut(", ".join(islice(names, most)) + more) or "none"


def nearest(word: str, choices: Iterable[str]) -> str:
    """A sentence that offers the choice most like ``word``, in any case, or an empty string when none is like it."""
    by_folded = {choice.casefold(): choice for choice in choices}
    close = get_close_matches(word.casefold(), by_folded, n=1)
    return f" Did you mean {by_folded[close[0]]!r}?" if close else ""
