"""Pictures of accuracies: bars of models by task, and accuracy against bytes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isfinite, nan
from typing import TYPE_CHECKING, Any

from qpruner.records.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#3b6ea5", "#c98f3d", "#5d9b6b", "#b5473b", "#7d6aa8", "#8c6d52", "#c77fa8", "#6f7b87", "#a8a63f", "#4fa3b5")
"""Colours of models; further models start over."""


@dataclass(frozen=True)
class OnTasks:
    """A model and its accuracy on tasks.

    Args:
        name: name of the model.
        num_bytes: bytes of its tensors.
        accuracies: accuracies by task, in [0, 1].
        mean: mean over the tasks; None where it is not to be shown.
    """

    name: str
    num_bytes: int
    accuracies: Mapping[str, Estimate]
    mean: Estimate | None = None


@dataclass(frozen=True)
class Point:
    """A model in the plane of bytes and accuracy.

    Args:
        name: name of the model.
        num_bytes: bytes of its tensors.
        accuracy: accuracy in [0, 1].
    """

    name: str
    num_bytes: int
    accuracy: Estimate


@dataclass(frozen=True)
class Panel:
    """What is drawn for a task.

    Args:
        points: models that compete, without their names.
        named: models with a mark and a name of their own; those that do not compete are not part of any front.
    """

    points: Sequence[Point]
    named: Sequence[Point] = ()


def front_of(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in accuracy at no more bytes, fewest bytes first; of equal ones the first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.num_bytes, -point.accuracy.value)):
        if isfinite(point.accuracy.value) and (not front or point.accuracy.value > front[-1].accuracy.value):
            front.append(point)
    return front


def bars_figure(models: Sequence[OnTasks]) -> "Figure":
    """Bars of accuracy for each task and model with standard errors, their mean, and marks for bytes.

    The bytes have an axis on the right. The layout is that of QPruner's Figure 1.
    """
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(task for model in models for task in model.accuracies))
    groups = [*tasks, "mean"] if any(model.mean for model in models) else tasks
    step, width = len(models) + 1.0, 0.86  # a bar and the gap between groups are both one wide
    figure = Figure(figsize=(min(18.0, max(6.0, 2.4 + 0.17 * step * (len(groups) + 1))), 4.4), layout="constrained")
    axes = figure.subplots()
    memory = axes.twinx()
    for number, model in enumerate(models):
        shown = [model.accuracies.get(task) for task in tasks] + [model.mean] * (len(groups) - len(tasks))
        places = [step * group + number for group, estimate in enumerate(shown) if estimate is not None]
        estimates = [estimate for estimate in shown if estimate is not None]
        axes.bar(
            places,
            [100 * estimate.value for estimate in estimates],
            width,
            yerr=[100 * estimate.error if isfinite(estimate.error) else 0.0 for estimate in estimates],
            error_kw={"elinewidth": 0.9, "capsize": 1.5, "capthick": 0.9, "ecolor": "#333333"},
            color=COLORS[number % len(COLORS)],
            label=model.name,
        )
        memory.plot(
            step * len(groups) + number, model.num_bytes, "D", color=COLORS[number % len(COLORS)], markersize=6,
            markeredgecolor="#333333", markeredgewidth=0.6,
        )  # fmt: skip
    _between(axes, step * len(groups) - 1)
    if len(groups) > len(tasks):
        _between(axes, step * len(tasks) - 1)
    middles = [step * group + (len(models) - 1) / 2 for group in range(len(groups) + 1)]
    axes.set_xticks(middles, [_in_lines(name) for name in (*groups, "bytes")])
    axes.set_xlim(-1, step * (len(groups) + 1) - 1)
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("accuracy (%)")
    axes.set_ylim(0, 100)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    memory.set_ylim(0, 1.15 * max(1, *(model.num_bytes for model in models)))
    memory.set_ylabel("bytes of all tensors (marks)")
    _in_bytes(memory.yaxis)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=min(len(models), 6), fontsize=9)
    return figure


def fronts_figure(panels: Mapping[str, Panel]) -> "Figure":
    """Accuracy against bytes, a panel for each task, in which the points that no other beats are joined.

    The layout is that of QPruner's Figures 3 and 4. The standard error of the accuracies is drawn on the front.
    """
    from matplotlib.figure import Figure

    columns = min(len(panels), 4 if len(panels) > 6 else 3)
    rows = ceil(len(panels) / columns)
    figure = Figure(figsize=(max(5.5, 3.3 * columns), 0.7 + 2.7 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    names = list(dict.fromkeys(point.name for panel in panels.values() for point in panel.named))
    for axes, (task, panel) in zip(grid, panels.items(), strict=False):
        _draw_panel(axes, panel, names)
        axes.set_title(task, fontsize="medium")
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.supxlabel("bytes of all tensors", fontsize="medium")
    figure.supylabel("accuracy (%)", fontsize="medium")
    legend = {label: handle for axes in grid for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        legend.values(), legend.keys(), loc="outside upper center", ncols=min(len(legend), 2 * columns), fontsize=9
    )
    return figure


def _draw_panel(axes: Any, panel: Panel, names: Sequence[str]) -> None:
    """Draws one task; named models keep their colour over all panels."""
    front = front_of(panel.points)
    if not all(point in panel.named for point in panel.points):
        x, y = _coordinates(panel.points)
        axes.plot(x, y, "o", color="#9aa7b5", markersize=4, alpha=0.7, label="tried")
    x, y = _coordinates(front)
    errors = [100 * point.accuracy.error if isfinite(point.accuracy.error) else nan for point in front]
    axes.errorbar(
        x, y, yerr=errors, fmt="o-", color="#b5473b", markersize=4, linewidth=1.3, elinewidth=0.7, capsize=1.5,
        label="front, ± standard error",
    )  # fmt: skip
    for point in panel.named:
        competes = point in panel.points
        axes.plot(
            point.num_bytes, 100 * point.accuracy.value, "o" if competes else "X", markersize=7, linestyle="none",
            color=COLORS[names.index(point.name) % len(COLORS)], markeredgecolor="#333333", markeredgewidth=0.6,
            label=point.name, zorder=4,
        )  # fmt: skip
    axes.margins(0.1)
    axes.locator_params(axis="x", nbins=4)
    _in_bytes(axes.xaxis)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)


def _coordinates(points: Sequence[Point]) -> tuple[list[int], list[float]]:
    return [point.num_bytes for point in points], [100 * point.accuracy.value for point in points]


def _between(axes: Any, place: float) -> None:
    axes.axvline(place, color="gray", linewidth=0.8, linestyle=":")


def _in_bytes(axis: Any) -> None:
    from matplotlib.ticker import EngFormatter

    axis.set_major_formatter(EngFormatter(unit="B"))


def _in_lines(name: str) -> str:
    """A name of several words as one word per line, so that neighbouring labels do not overlap."""
    return name.replace("_", "\n").replace(" ", "\n")
