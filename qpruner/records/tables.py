"""Tables that read well as Markdown and as plain text."""

from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    first, *others = widths
    lines = [header, *rows]
    text = ["| " + " | ".join([line[0].ljust(first), *map(str.rjust, line[1:], others)]) + " |" for line in lines]
    text.insert(1, "|" + "|".join(["-" * (first + 2), *("-" * (width + 1) + ":" for width in others)]) + "|")
    return "\n".join(text)
