import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from qpruner.errors import UserError
from qpruner.plan import DENSE, Leading, Precision

INT8 = Precision("int", 8)
LED = Precision("int", 4, 64, Leading(20, INT8))


@pytest.mark.parametrize("bits", [0, 17, -1, 4.0, "4"])
def test_bits_out_of_range_are_refused(bits: Any) -> None:
    with pytest.raises(UserError, match=f"^A weight has 1 to 16 bits, not {bits!r}.$"):
        Precision("int", bits)


@pytest.mark.parametrize("bits", [1, 16])
def test_bits_at_the_ends_are_allowed(bits: int) -> None:
    assert Precision("int", bits).bits == bits


@pytest.mark.parametrize("group", [0, -128])
def test_a_group_without_weights_is_refused(group: int) -> None:
    with pytest.raises(UserError, match=f"^A group holds at least 1 weight, or a whole row with -1, not {group}.$"):
        Precision("int", 4, group)


def test_a_precision_is_printed_short() -> None:
    precisions = Precision("int", 4, 128), Precision("int", 4, -1), DENSE
    assert [str(precision) for precision in precisions] == ["int 4/128", "int 4/row", "dense 16"]


def test_a_precision_of_two_segments_is_printed_short() -> None:
    assert str(LED) == "20 columns int 8, then int 4/64"


def test_mean_bits_weigh_both_segments_by_their_columns() -> None:
    assert LED.mean_bits(80) == 5  # 20 of 8 and 60 of 4 bits
    assert LED.rest.mean_bits(80) == 4


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Leading(0, DENSE), "at least 1 column, not 0"),
        (lambda: Leading(2.0, LED.rest), "at least 1 column, not 2.0"),  # type: ignore[arg-type]
        (lambda: Leading(2, LED), "at most two segments"),
        (lambda: Leading(2, DENSE), "cannot be dense"),
        (lambda: Leading(2, 8), "has a precision, not 8"),  # type: ignore[arg-type]
        (lambda: replace(DENSE, leading=Leading(2, LED.rest)), "apart from dense ones"),
        (lambda: replace(LED.rest, leading=Leading(2, LED.rest)), "as the rest is, in int 4/64"),
        (lambda: replace(LED, leading=20), "how many columns are held in which precision, not 20"),  # type: ignore[arg-type]
    ],
)
def test_segments_that_cannot_be_are_refused(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        make()


def test_as_many_columns_lead_as_are_left_of_the_leading_ones() -> None:
    assert LED.of_columns([19, 20, 0, 5]) == replace(LED, leading=Leading(3, INT8))
    assert LED.of_columns([19, 0]) == INT8
    assert LED.of_columns([20, 40]) == LED.rest
    assert LED.rest.of_columns([0]) == LED.rest
    # In units of 8 columns the third has 4 of the 20.
    assert LED.of_columns([2, 7], 8) == replace(LED, leading=Leading(4, INT8))
    assert LED.of_columns([0, 1], 8) == INT8


def test_plain_data_reads_back_and_says_leading_only_where_columns_lead() -> None:
    assert INT8.to_data() == {"format": "int", "bits": 8, "group": None}
    assert LED.to_data() == {
        "format": "int",
        "bits": 4,
        "group": 64,
        "leading": {"columns": 20, "precision": INT8.to_data()},
    }
    for precision in (INT8, LED, DENSE):
        assert Precision.of_data(precision.to_data()) == precision
    assert Precision.of_data({"format": "int", "bits": 4, "leading": None}) == Precision("int", 4)
