"""Makes Markdown of what in docstrings is none: an extension of griffe, which reads them for the documents."""

import re
from typing import Any

import griffe

HOOKS = re.compile(r"^(\w+(?:, \w+)*)\n((?: {4}\S.*\n?)+)", re.MULTILINE)
"""Hooks of a callback, each with what happens in it, as a docstring lays them out below each other."""


def to_markdown(text: str) -> str:
    """A docstring with its hooks as a list of definitions, and with ``::`` before code as in plain text."""
    text = re.sub(r"^::\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"(?<=\S)::$", ":", text, flags=re.MULTILINE)

    def definition(match: re.Match[str]) -> str:
        told = " ".join(line.strip() for line in match[2].splitlines())
        names = ", ".join(f"`{name}`" for name in match[1].split(", "))
        return f"{names}\n:   {told}\n\n"

    return HOOKS.sub(definition, text)


class DocstringMarkup(griffe.Extension):
    """Rewrites each docstring before its sections are read."""

    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
