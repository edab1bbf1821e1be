"""The one error that means: what the user gave cannot be used, and this is what to do about it."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake in a configuration, a file or a path; the command line prints it without a traceback.

    Its text names the value given, what is allowed, and the remedy.
    """


def user_error(error: BaseException | None) -> UserError | None:
    """The user's mistake behind an error that a library made of it, if there is one."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def nearest(word: str, choices: Iterable[str]) -> str:
    """A sentence that offers the choice most like ``word``, in any case, or an empty string when none is like it."""
    by_folded = {choice.casefold(): choice for choice in choices}
    close = get_close_matches(word.casefold(), by_folded, n=1)
    return f" Did you mean {by_folded[close[0]]!r}?" if close else ""
