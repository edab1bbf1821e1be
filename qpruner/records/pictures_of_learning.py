"""A picture of how gates over structure and precision arrived at a plan."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = {
    "kv_groups": ("KV groups kept", 0.0, 1.0),
    "ffn_channels": ("FFN channels kept", 0.0, 1.0),
    "bits": ("bits of a weight", None, None),
}
"""Title and range of each panel."""


def learning_figure(history: Sequence[dict[str, list[float]]], steps: Sequence[int], limit: int) -> "Figure":
    """Three panels of layers over steps, for what each layer keeps and its bits, and below the bytes and the budget.

    Args:
        history: for each of the steps, ``kv_groups`` and ``ffn_channels``, the fraction that each layer keeps,
            ``bits``, the mean over its weights, and ``bytes``, those of all units, a list of one.
        steps: optimizer steps, ascending.
        limit: bytes of the budget.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    grid = figure.add_gridspec(2, len(PANELS), height_ratios=(3, 1))
    last = len(history[0]["bits"]) - 0.5
    for place, (name, (title, low, high)) in enumerate(PANELS.items()):
        axes = figure.add_subplot(grid[0, place])
        values = list(zip(*(entry[name] for entry in history), strict=True))  # [layers][steps]
        image = axes.imshow(
            values, aspect="auto", cmap="viridis", vmin=low, vmax=high, interpolation="nearest",
            extent=(steps[0], max(steps[-1], steps[0] + 1), last, -0.5),
        )  # fmt: skip
        axes.set_title(title)
        axes.set_xlabel("optimizer step")
        if not place:
            axes.set_ylabel("layer")
        figure.colorbar(image, ax=axes)
    below = figure.add_subplot(grid[1, :])
    below.plot(steps, [entry["bytes"][0] for entry in history], label="bytes of the decoder's units", marker=".")
    below.axhline(limit, color="gray", linestyle=":", label="budget")
    below.set_xlabel("optimizer step")
    below.grid(alpha=0.3)
    below.legend()
    return figure
