"""Pictures of a search, read back."""

import pytest
from support.figures import cells, curves, tick_labels
from support.search_results import NARROWED, RESULTS, TRIALS

from qpruner.records.pictures_of_search import front_figure, trials_figure


def test_the_picture_of_trials_shows_losses_the_best_so_far_and_the_bits_of_items() -> None:
    above, below = trials_figure(RESULTS).axes
    losses, best = curves(above).values()
    assert losses == list(enumerate([2.0, 2.5, 2.5, 2.1, 2.5, 2.6, 1.5]))
    assert best == list(enumerate([2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.5]))
    assert cells(below) == [[4] * 7, [8] * 7]
    assert tick_labels(below.yaxis) == ["layer 0", "layer 1"]
    assert tick_labels(below.xaxis) == ["1", "2", "4", "5", "6", "7", "8"]  # the third failed


def test_the_picture_of_the_front_shows_all_trials_the_front_and_what_nobody_searched_for() -> None:
    (axes,) = front_figure(RESULTS).axes
    trials, *named = curves(axes).values()
    assert trials == [(one.num_bytes, one.loss) for one in TRIALS]
    assert named == [[(400, 2.5), (500, 2.0), (700, 1.5)], [(1400, 2.0)]]
    assert list(curves(axes))[1:] == ["front", "uniform"]


def test_the_picture_of_trials_shows_what_parts_keep() -> None:
    axes = trials_figure(NARROWED).axes[2]
    assert tick_labels(axes.yaxis) == list(NARROWED.parts)
    shares = cells(axes)
    assert [row[0] for row in shares] == pytest.approx([0.5, 1, 7 / 48]) and len(shares[0]) == len(TRIALS)


def test_multiply_adds_are_the_colour_of_trials_and_the_front_has_rings() -> None:
    axes, bar = front_figure(NARROWED).axes
    (dots,) = axes.collections
    assert dots.get_offsets().tolist() == [[one.num_bytes, one.loss] for one in TRIALS]  # type: ignore[union-attr]
    assert dots.get_array().tolist() == [57e3, 56e3, 55e3, 54e3, 53e3, 52e3, 51e3]  # type: ignore[union-attr]
    assert bar.get_ylabel() == "multiply-adds for a token"
    rings, *named = axes.lines
    assert curves(axes)["front"] == [(400, 2.5), (400, 2.6), (500, 2.0), (600, 2.1), (700, 1.5)]
    assert (rings.get_linestyle(), rings.get_fillstyle()) == ("None", "none")
    assert [str(line.get_label()) for line in named] == ["uniform"]
