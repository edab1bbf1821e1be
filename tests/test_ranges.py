import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpruner.errors import UserError
from qpruner.ranges import format_ranges, parse_ranges


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((0, 1, 2, 5), "0-2 5"),
        ((3,), "3"),
        ((0, 2, 4), "0 2 4"),
        ((0, 1), "0-1"),
        ((1, 2, 10, 11, 12), "1-2 10-12"),
        ((), ""),
        ((5, 8, 9, 0, 1, 2, 3, 4), "5 8-9 0-4"),
        ((3, 2, 1), "3 2 1"),
    ],
)
def test_ranges_by_hand(numbers: tuple[int, ...], text: str) -> None:
    assert format_ranges(numbers) == text
    assert parse_ranges(text) == numbers


@given(st.sets(st.integers(0, 60)))
def test_ascending_ranges_read_back(numbers: set[int]) -> None:
    assert parse_ranges(format_ranges(sorted(numbers)), ascending=True) == tuple(sorted(numbers))


@given(st.lists(st.integers(0, 60), unique=True))
def test_ranges_in_any_order_read_back(numbers: list[int]) -> None:
    assert parse_ranges(format_ranges(numbers)) == tuple(numbers)


def test_ranges_that_touch_are_read() -> None:
    assert parse_ranges("0-1 2-2 3") == parse_ranges("0-1 2-2 3", ascending=True) == (0, 1, 2, 3)
    assert parse_ranges("5 2") == (5, 2)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("3-1", "3-1"),
        ("0 0", "0"),
        ("0-4 4", "4"),
        ("5 2", "2"),
        ("0,1", "0,1"),
        ("-1", "-1"),
        ("1-", "1-"),
        ("a", "a"),
        ("1.5", "1.5"),
    ],
)
def test_anything_but_ascending_ranges_is_refused(text: str, part: str) -> None:
    message = f"{part!r} in {text!r} must be a number or a range such as 4-7, above those before it."
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        parse_ranges(text, ascending=True)


@pytest.mark.parametrize(
    ("text", "part"), [("3-1", "3-1"), ("0 0", "0"), ("4 0-4", "0-4"), ("0-9 7-8", "7-8"), ("a", "a")]
)
def test_a_number_twice_in_an_order_is_refused(text: str, part: str) -> None:
    others = "of numbers that do not stand before it"
    message = f"{part!r} in {text!r} must be a number or a range such as 4-7, {others}."
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        parse_ranges(text)
