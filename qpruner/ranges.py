"""Numbers of units, as a person writes and reads them: ``5 8-9 0-4``."""

import re
from collections.abc import Sequence

from qpruner.errors import UserError, brief

MOST_UNITS = 1_000_000
"""No model has more units of a kind, and a typo must not exhaust memory."""


def format_ranges(numbers: Sequence[int]) -> str:
    """Numbers in their order, those that follow on each other as ranges: ``0-3 5 7-8``, or ``5 8-9 0-4``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def parse_ranges(text: str, *, ascending: bool = False) -> tuple[int, ...]:
    """The numbers that `format_ranges` wrote, in their order.

    Args:
        text: numbers and ranges, with spaces between them.
        ascending: whether each must be above those before it.

    Raises:
        UserError: anything else than numbers and ranges, a number twice, or one out of order.
    """
    numbers: dict[int, None] = {}
    last = -1
    for part in text.split():
        bounds = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        run = range(int(bounds[1]), int(bounds[2] or bounds[1]) + 1) if bounds else range(0)
        if not run or run[-1] > MOST_UNITS or (run[0] <= last if ascending else any(n in numbers for n in run)):
            others = "above those before it" if ascending else "of numbers that do not stand before it"
            raise UserError(f"{brief(part)} in {brief(text)} must be a number or a range such as 4-7, {others}.")
        numbers.update(dict.fromkeys(run))
        last = run[-1]
    return tuple(numbers)
