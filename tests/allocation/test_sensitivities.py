"""The costs that follow from what was found, by hand, and their file."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qpruner.allocation.items import Item
from qpruner.allocation.sensitivities import Marginals, Rises, Sensitivities
from qpruner.errors import UserError
from qpruner.plan import DENSE, UNITS, Precision

NF4, INT8 = Precision("nf4", 4, 64), Precision("int8", 8)
FIRST, SECOND = Item(0, UNITS), Item(1, ("qkv", "o"))
FOUND = Sensitivities(
    {"seed": 3, "widths": [4, 8]},
    precisions=(INT8, NF4),
    rises=(
        Rises(FIRST, kl=(0.01, 0.25), loss=(-0.02, -0.01), first_order=(0.5, 0.125)),
        Rises(SECOND, kl=(0.5, 0.25), loss=(0.25, -0.5), first_order=(0.0, 0.75)),
    ),
)
INFORMATION = Sensitivities({}, mutual_information=(0.5, 0.0, 2.0))

AMONG = Sensitivities(
    {},
    precisions=(NF4, INT8, DENSE),
    marginals=(
        Marginals(FIRST, (0.75, 0.5, 0.0), (0.25, 0.5, 0.0), (0.1, 0.2, 0.0), (0.3, 0.4, 0.0)),
        Marginals(SECOND, (-0.25, 0.5, 0.0), (1.0, -0.5, 0.0), (0.1, 0.2, 0.0), (0.3, 0.4, 0.0)),
    ),
)


def test_mutual_information_counts_with_the_logarithm_of_the_bits() -> None:
    items = [Item(2, UNITS), Item(0, ("o",)), Item(0, ("down",)), Item(1, UNITS)]
    costs = INFORMATION.costs(items, (NF4, INT8, DENSE), "mutual_information")
    assert costs == [(-4.0, -6.0, -8.0), (-1.0, -1.5, -2.0), (-1.0, -1.5, -2.0), (0.0, 0.0, 0.0)]
    assert costs[0][0] - costs[0][1] == 2.0 * math.log2(8 / 4)  # QPruner's gain of the upgrade
    assert INFORMATION.costs([Item(2, UNITS)], (INT8,), "mutual_information") == [(-6.0,)]


@pytest.mark.parametrize(
    ("measure", "order", "expected"),
    [
        ("kl", (NF4, INT8), [(0.25, 0.01), (0.5, 0.5)]),
        ("kl", (NF4, INT8, DENSE), [(0.25, 0.01, 0.0), (0.5, 0.5, 0.0)]),
        ("kl", (NF4, DENSE), [(0.25, 0.0), (0.25, 0.0)]),
        ("kl", (INT8, NF4), [(0.25, 0.25), (0.5, 0.25)]),  # what the order calls wider
        ("loss", (NF4, INT8), [(-0.01, -0.02), (0.25, 0.25)]),
        ("loss", (NF4, INT8, DENSE), [(0.0, 0.0, 0.0), (0.25, 0.25, 0.0)]),
        ("first_order", (NF4, INT8), [(0.5, 0.5), (0.75, 0.0)]),
        ("first_order", (NF4,), [(0.125,), (0.75,)]),
    ],
)
def test_rises_count_at_least_as_much_as_those_of_more_bits(measure: Any, order: Any, expected: Any) -> None:
    assert FOUND.costs([FIRST, SECOND], order, measure) == expected
    assert FOUND.costs([SECOND, FIRST], order, measure) == expected[::-1]


@pytest.mark.parametrize(
    ("measure", "expected"),
    [("kl", [(0.75, 0.5, 0.0), (0.5, 0.5, 0.0)]), ("loss", [(0.5, 0.5, 0.0), (1.0, 0.0, 0.0)])],
)
def test_rises_among_others_count_like_those_alone(measure: Any, expected: Any) -> None:
    assert AMONG.costs([FIRST, SECOND], (NF4, INT8, DENSE), measure) == expected


def test_rises_of_other_precisions_are_refused() -> None:
    with pytest.raises(UserError, match="The rises of layer 0 are not those in 2 precisions"):
        replace(AMONG, precisions=(NF4, INT8))
    with pytest.raises(UserError, match="neither mutual information nor a rise"):
        Sensitivities({})


@pytest.mark.parametrize("found", [FOUND, INFORMATION, AMONG], ids=["rises", "mutual information", "marginals"])
def test_a_file_gives_back_what_was_written(tmp_path: Path, found: Sensitivities) -> None:
    found.write(tmp_path / "sensitivities.json")
    assert Sensitivities.read(tmp_path / "sensitivities.json") == found
