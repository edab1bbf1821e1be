"""Tables that read well as Markdown and as plain text."""

import math
from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    first, *others = widths
    lines = [header, *rows]
    text = ["| " + " | ".join([line[0].ljust(first), *map(str.rjust, line[1:], others)]) + " |" for line in lines]
    text.insert(1, "|" + "|".join(["-" * (first + 2), *("-" * (width + 1) + ":" for width in others)]) + "|")
    return "\n".join(text)


def number(value: float | None, spec: str) -> str:
    """A number for a table: ``-`` where it is unknown, ``nan`` or ``inf`` where that is what was measured."""
    if value is None:
        return "-"
    return format(value, spec) if math.isfinite(value) else str(value)


def mebibytes(num_bytes: int | None) -> str:
    """A number of bytes for a table; ``-`` where it is unknown."""
    return "-" if num_bytes is None else f"{num_bytes / 2**20:,.0f} MiB"


def percent(accuracy: float | None, error: float | None = None, unit: str = " %") -> str:
    """An accuracy with its standard error, ``62.0 % ± 1.5``.

    The accuracy is ``-`` if unknown, and ``nan`` if that was measured; an error that is unknown or nan is left out.
    """
    if accuracy is None or not math.isfinite(accuracy):
        return "-" if accuracy is None else str(accuracy)
    said = f"{100 * accuracy:.1f}{unit}"
    return said if error is None or not math.isfinite(error) else f"{said} ± {100 * error:.1f}"
