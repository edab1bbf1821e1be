"""Types in plain words."""

from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest

from qpruner.adapters.lora import LoRAConfig
from qpruner.options.words import MOST, in_words, item_type, listed

Colour = Enum("Colour", "red green")


@pytest.mark.parametrize(
    ("option_type", "words"),
    [
        (int, "a whole number"),
        (float | None, "a number or null"),
        (bool, "true or false"),
        (bool | None, "true, false or null"),
        (str | Path, "text or a path"),
        (Literal["a", "b"], "one of a, b"),
        (Literal[16, 32] | Literal["16", "bf16"] | None, "one of 16, 32, bf16 or null"),
        (Colour, "one of red, green"),
        (Sequence[int] | int, "a list of whole numbers or a whole number"),
        (list[Literal["a", "b"]], "a list of items, each of which is one of a, b"),
        (Mapping[str, float], "a mapping to numbers"),
        (Sequence[Mapping[str, int]], "a list of mappings to whole numbers"),
        (LoRAConfig, "a mapping with r, alpha, dropout, target_modules, pooled"),
    ],
)
def test_in_words(option_type: Any, words: str) -> None:
    assert in_words(option_type) == words


def test_many_names_are_cut() -> None:
    assert listed("aab") == "a, b"
    assert listed(range(MOST + 1)) == ", ".join(map(str, range(MOST))) + ", ..."


def test_what_is_a_list() -> None:
    assert item_type(Sequence[int]) is int and item_type(list[str]) is str
    assert [item_type(other) for other in (dict[str, int], tuple[int, str], int | None, str)] == [None] * 4
