"""Pictures of a search: the plan of each trial, and what the trials cost and achieve."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from qpruner.records.search import SearchResults


def trials_figure(results: "SearchResults") -> "Figure":
    """The bits of every trial, items downwards, with its loss above and anything else that was searched below."""
    from matplotlib.figure import Figure

    trials = results.trials
    panels: list[tuple[Sequence[str], list[Sequence[float]], dict[str, Any], str]] = [
        (
            results.items,
            [[results.bits[choice] for choice in trial.choices] for trial in trials],
            {"cmap": "YlOrBr", "vmin": 0, "vmax": 20},
            f"more of {', '.join(map(str, results.bits))} bits",
        ),
        (
            results.parts,
            [[kept / whole for kept, whole in zip(trial.units, results.units, strict=True)] for trial in trials],
            {"cmap": "YlGn", "vmin": 0, "vmax": 1},
            "more units kept",
        ),
        (
            [f"layer {layer}" for layer in results.ranked],
            [trial.ranks for trial in trials],
            {"cmap": "PuBu", "vmin": 0},
            "a higher rank of the adapters",
        ),
    ]
    panels = [panel for panel in panels if panel[0]]
    rows = sum(len(names) for names, *_ in panels)
    figure = Figure(figsize=(max(6, 1.5 + 0.3 * len(trials)), 3 + 0.25 * rows), layout="constrained")
    heights = [1, *(max(1, len(names) / 8) for names, *_ in panels)]
    above, *others = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    numbers = range(len(trials))
    losses = [trial.loss for trial in trials]
    above.plot(numbers, losses, "o-", markersize=3)
    above.step(numbers, [min(losses[: end + 1]) for end in numbers], where="post", color="#c98f3d", label="best so far")
    above.set_ylabel("validation loss")
    above.legend()
    for axes, (names, values, colours, dark) in zip(others, panels, strict=True):
        axes.imshow(list(zip(*values, strict=True)), aspect="auto", **colours)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.set_xticks(numbers, [trial.name.removeprefix("trial ") for trial in trials], fontsize=7)
        axes.set_xlabel(f"trial; dark is {dark}")
    return figure


def front_figure(results: "SearchResults") -> "Figure":
    """Loss against bytes of all trials, with the front; multiply-adds, where trials differ in them, are the colour.

    A front over three quantities is not a line in the plane of two of them: its trials are marked by rings.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    front = sorted(
        (trial for trial in results.trials if trial.name in results.front), key=lambda trial: trial.num_bytes
    )
    (sizes, losses), of_front = (
        ([trial.num_bytes for trial in trials], [trial.loss for trial in trials]) for trials in (results.trials, front)
    )
    if results.trades_time:
        counts = [float(trial.multiply_adds or 0) for trial in results.trials]
        shown = axes.scatter(sizes, losses, c=counts, cmap="viridis", zorder=2)
        figure.colorbar(shown, ax=axes, label="multiply-adds for a token")
        axes.plot(*of_front, "o", color="#b5473b", fillstyle="none", markersize=11, label="front")
    else:
        axes.plot(sizes, losses, "o", color="#9aa7b5")
        axes.plot(*of_front, "o-", color="#b5473b", label="front")
    for variant in results.variants:
        if not variant.name.startswith("trial"):
            axes.plot(variant.num_bytes, variant.losses[0], "x", label=variant.name)
    axes.set_xlabel("bytes of all tensors")
    axes.set_ylabel("validation loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
