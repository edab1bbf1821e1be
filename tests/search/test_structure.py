"""Structures of points, by hand: nearest legal numbers of units, and what is lowered where something does not fit."""

import numpy as np
import pytest

from qpruner.allocation.solving import Choice
from qpruner.search.space import SearchSpace
from qpruner.search.structure import SWAY, Booleans, Integers, Part, Structure


def parts(starts: tuple[int, int] = (2, 4)) -> tuple[Part, Part]:
    """Two to four groups, and 40 to 80 channels in tens; a group costs 10 multiply-adds, a channel 1."""
    groups, channels = (2, 3, 4), (40, 50, 60, 70, 80)
    return (
        Part(0, "kv_groups", groups, (20, 30, 40), (-8, -4, 0), (2.0, 1.0, 0.0), starts[0]),
        Part(0, "ffn_channels", channels, channels, (0,) * 5, (0.8, 0.6, 0.4, 0.2, 0.0), starts[1]),
    )


def structure(starts: tuple[int, int] = (2, 4), most: int | None = None) -> Structure:
    """With one item, whose two choices lose 10 and 20 bytes with each group, and 1 and 2 with ten channels."""
    of_groups = np.array([[-20, -40], [-10, -20], [0, 0]])
    of_channels = np.array([[-4, -8], [-3, -6], [-2, -4], [-1, -2], [0, 0]])
    return Structure(parts(starts), [[(0, of_groups), (1, of_channels)]], 0.5, most)


def anything(structures: Integers) -> Booleans:
    return np.ones(len(structures), dtype=bool)


def test_the_origin_is_the_start_and_a_coordinate_moves_a_share() -> None:
    step = 1 / (SWAY * 0.5)  # of coordinates, for all units
    points = np.array(
        [[0, 0, 0], [0, -0.25 * step, 0], [0, 0, -0.25 * step], [-0.25 * step, 0, 0], [0, 0, -0.18 * step], [9, 9, 9]]
    )
    assert structure().decode(points, anything).tolist() == [[2, 4], [1, 4], [2, 2], [1, 2], [2, 3], [2, 4]]
    assert structure((1, 2)).decode(points, anything).tolist() == [[1, 2], [0, 2], [1, 0], [0, 0], [1, 1], [2, 4]]
    for place in np.ndindex(3, 5):
        middle = structure((1, 2))
        assert middle.decode(middle.encode(np.array(place))[None], anything).tolist() == [list(place)]


def test_shares_are_lowered_alike_until_what_is_asked_fits() -> None:
    points = np.array([[0.0, 0, 0], [0, -2, 0]])
    # 40 + 80 multiply-adds. A sixteenth less of both makes 70 channels, an eighth 3 groups, three sixteenths 60.
    for most, expected in ((120, [2, 4]), (110, [2, 3]), (109, [1, 3]), (99, [1, 2]), (60, [0, 0])):
        found = structure(most=most).decode(points, anything)
        assert found[0].tolist() == expected, most
        assert (structure().multiply_adds(found) <= most).all()
    few = structure().decode(points, lambda tried: tried.sum(1) <= 3)
    assert (few.sum(1) <= 3).all() and few.sum(1).max() == 3


def test_bytes_costs_and_features_are_sums_over_parts() -> None:
    structures = np.array([[2, 4], [0, 3], [1, 0]])
    found = structure()
    assert found.change(0, structures).tolist() == [[0, 0], [-21, -42], [-14, -28]]
    assert found.rest(structures).tolist() == [0, -8, -4]
    assert found.multiply_adds(structures).tolist() == [120, 90, 70]
    assert found.costs(structures) == pytest.approx([0, 2.2, 1.8])
    assert found.features(structures).tolist() == [[1, 1], [0, 0.75], [0.5, 0]]
    assert found.counts((0, 3)) == [2, 70]


def test_what_units_leave_buys_bits() -> None:
    space = SearchSpace([[Choice(60, 2.0), Choice(120, 0.0)]], [(4, 8)], 80, structure=structure())
    assert space.smallest == 60 - 20 - 4 - 8 and space.dimension == 4
    wide, narrow = space.decode(np.array([[0.0, 0, 0, 0], [-9, 0, 0, 0]])).tolist()
    assert wide == [2, 4, 0] and narrow == [0, 0, 1]
    plans = np.array([wide, narrow])
    assert space.sizes(plans).tolist() == [60, 120 - 40 - 8 - 8]
    assert space.costs(plans) == pytest.approx([2.0, 2.8])
    assert space.costs(np.array([[0, 4, 0]])) == pytest.approx([2.0 + 2.0 * 40 / 60])
    assert space.features(plans).tolist() == [[1, 1, 0], [0, 0, 1]]
    tight = SearchSpace([[Choice(60, 2.0), Choice(120, 0.0)]], [(4, 8)], 45, structure=structure())
    assert tight.decode(np.zeros((1, 4))).tolist() == [[1, 3, 0]]  # 60 - 10 - 1, and 4 less besides
    assert tight.origin() == [1, 3, 0]
