"""What a figure shows, read back from it."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes


def curves(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """The points of each line, by its label."""
    lines = {str(line.get_label()): np.column_stack(line.get_data()).tolist() for line in axes.lines}
    return {label: [(x, y) for x, y in points] for label, points in lines.items()}


def widths(axes: Axes) -> list[float]:
    """Of its bars, from the top."""
    return [bar.get_width() for bar in axes.patches]  # type: ignore[attr-defined]


def cells(axes: Axes) -> Any:
    """The numbers of its image, row by row."""
    (image,) = axes.images
    return np.asarray(image.get_array()).tolist()


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def tick_labels(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]
