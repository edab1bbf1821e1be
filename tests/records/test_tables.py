"""Tables as text."""

import math

import pytest

from qpruner.records.tables import markdown_table, mebibytes, number


def test_a_table_is_aligned_and_numbers_stand_right() -> None:
    assert markdown_table(["a", "num"], [["bb", "1"]]) == "| a  | num |\n|----|----:|\n| bb |   1 |"


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert markdown_table(["plan", "x", "y"], [["a", "1,000", "-"], ["uniform", "2", "10"]]).splitlines() == [
        "| plan    |     x |  y |",
        "|---------|------:|---:|",
        "| a       | 1,000 |  - |",
        "| uniform |     2 | 10 |",
    ]


def test_a_table_without_rows_is_its_header() -> None:
    assert markdown_table(["a", "b"], []) == "| a | b |\n|---|--:|"


def test_every_row_has_every_column() -> None:
    with pytest.raises(ValueError, match="shorter"):
        markdown_table(["a", "b"], [["1"]])


def test_what_is_unknown_is_a_dash_and_what_is_not_finite_was_measured() -> None:
    assert [number(value, ".2f") for value in (None, 1.005, math.nan, -math.inf)] == ["-", "1.00", "nan", "-inf"]
    assert [mebibytes(value) for value in (None, 0, 2**31)] == ["-", "0 MiB", "2,048 MiB"]
