"""What the pictures of tasks show, read back from their axes."""

from math import nan

import pytest
from support.figures import curves, tick_labels

from qpruner.records.pictures_of_tasks import OnTasks, Panel, Point, bars_figure, front_of, fronts_figure
from qpruner.records.statistics import Estimate

MODELS = [
    OnTasks("dense", 400, {"boolq": Estimate(0.6, 0.03), "arc_easy": Estimate(0.5, 0.02)}, Estimate(0.55, 0.018)),
    OnTasks("pruned", 300, {"arc_easy": Estimate(0.4, nan)}),
]


def point(name: str, num_bytes: int, accuracy: float) -> Point:
    return Point(name, num_bytes, Estimate(accuracy, 0.03))


POINTS = [
    point("a", 5, 0.6),
    point("b", 4, 0.5),
    point("c", 4, 0.5),  # equal to the one before
    point("d", 6, 0.6),  # more bytes for the same
    point("e", 7, nan),
    point("f", 8, 0.7),
    point("g", 4, 0.4),  # less for the same bytes
]


def test_bars_are_accuracies_in_percent_with_their_errors_and_marks_are_bytes() -> None:
    axes, memory = bars_figure(MODELS).axes
    bars = {(round(bar.get_x() + bar.get_width() / 2), round(bar.get_height(), 6)) for bar in axes.patches}  # type: ignore[attr-defined]
    # Groups of two and a gap: boolq from 0, arc_easy from 3, the mean from 6, bytes from 9.
    assert bars == {(0, 60.0), (3, 50.0), (6, 55.0), (4, 40.0)}
    spans = [path.vertices[:, 1].tolist() for lines in axes.collections for path in lines.get_paths()]  # type: ignore[attr-defined]
    assert spans == [pytest.approx(span) for span in ([57, 63], [48, 52], [53.2, 56.8], [40, 40])]
    assert list(curves(memory).values()) == [[(9, 400)], [(10, 300)]]
    assert tick_labels(axes.xaxis) == ["boolq", "arc\neasy", "mean", "bytes"]
    assert memory.get_ylim()[0] == 0 and memory.yaxis.get_major_formatter()(4e6, None) == "4 MB"


def test_without_a_mean_there_is_no_group_of_it() -> None:
    axes, _ = bars_figure(MODELS[1:]).axes
    assert tick_labels(axes.xaxis) == ["arc\neasy", "bytes"]


def test_a_legend_names_all_models_once() -> None:
    (legend,) = bars_figure(MODELS).legends
    assert [text.get_text() for text in legend.get_texts()] == ["dense", "pruned"]
    panels = {task: Panel(POINTS, [point("uniform", 5, 0.4)]) for task in ("boolq", "piqa")}
    (legend,) = fronts_figure(panels).legends
    assert [text.get_text() for text in legend.get_texts()] == ["tried", "uniform", "front, ± standard error"]


def test_the_front_is_what_no_other_beats() -> None:
    assert [each.name for each in front_of(POINTS)] == ["b", "a", "f"]
    assert front_of([]) == [] and front_of(POINTS[3:4]) == POINTS[3:4]


def test_a_panel_shows_all_points_the_front_and_those_with_names() -> None:
    uniform = point("uniform", 5, 0.75)  # in no front: it was not searched for
    figure = fronts_figure(
        {"boolq": Panel(POINTS[:4], [uniform]), "piqa": Panel(POINTS[:1]), "none": Panel(POINTS[4:5])}
    )
    boolq, piqa, none = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["boolq", "piqa", "none"]
    assert len(none.lines[1].get_xydata()) == 0  # what is nan is in no front
    assert piqa.lines[1].get_xydata().tolist() == [[5, 60]]  # type: ignore[union-attr]
    tried, front, named = (boolq.lines[number] for number in (0, 1, -1))
    assert tried.get_xydata().tolist() == [[5, 60], [4, 50], [4, 50], [6, 60]]  # type: ignore[union-attr]
    assert front.get_xydata().tolist() == [[4, 50], [5, 60]]  # type: ignore[union-attr]
    assert named.get_xydata().tolist() == [[5, 75]] and named.get_label() == "uniform"  # type: ignore[union-attr]
    assert named.get_marker() == "X"


def test_models_that_compete_keep_their_colour_and_are_not_drawn_twice() -> None:
    figure = fronts_figure({"boolq": Panel(POINTS[:2], POINTS[:2]), "piqa": Panel(POINTS[1:2], POINTS[1:2])})
    boolq, piqa = figure.axes
    by_name = [{line.get_label(): line.get_color() for line in axes.lines} for axes in (boolq, piqa)]
    assert by_name[0]["b"] == by_name[1]["b"] != by_name[0]["a"]
    assert "tried" not in by_name[0] and {line.get_marker() for line in boolq.lines if line.get_label() == "a"} == {"o"}
