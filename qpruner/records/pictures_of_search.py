"""Pictures of a search: what each trial has, and what the trials cost and bring."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from qpruner.records.search import SearchResults


def trials_figure(results: "SearchResults") -> "Figure":
    """The bits of every trial, items downwards, with its loss above."""
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(max(6, 1.5 + 0.3 * len(results.trials)), 3 + 0.25 * (len(results.items) + len(results.parts))),
        layout="constrained",
    )
    heights = [1, max(1, len(results.items) / 8), *([max(1, len(results.parts) / 8)] if results.parts else [])]
    above, below, *others = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    numbers = range(len(results.trials))
    losses = [trial.loss for trial in results.trials]
    above.plot(numbers, losses, "o-", markersize=3)
    above.step(numbers, [min(losses[: end + 1]) for end in numbers], where="post", color="#c98f3d", label="best so far")
    above.set_ylabel("validation loss")
    above.legend()
    bits = [[results.bits[choice] for choice in trial.choices] for trial in results.trials]
    below.imshow(list(zip(*bits, strict=True)), aspect="auto", cmap="YlOrBr", vmin=0, vmax=20)
    below.set_yticks(range(len(results.items)), results.items, fontsize=7)
    below.set_xticks(numbers, [trial.name.removeprefix("trial ") for trial in results.trials], fontsize=7)
    below.set_xlabel(f"trial; dark is more of {', '.join(map(str, results.bits))} bits")
    for axes in others:
        shares = [
            [kept / whole for kept, whole in zip(trial.units, results.units, strict=True)] for trial in results.trials
        ]
        axes.imshow(list(zip(*shares, strict=True)), aspect="auto", cmap="YlGn", vmin=0, vmax=1)
        axes.set_yticks(range(len(results.parts)), results.parts, fontsize=7)
        axes.set_xlabel("trial; dark is more units kept")
    return figure


def front_figure(results: "SearchResults") -> "Figure":
    """Loss over bytes of all trials, with the front; where they differ in multiply-adds, these are the colour.

    A front over three quantities is no line in the plane of two: its trials have rings.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    front = sorted((trial for trial in results.trials if trial.name in results.front), key=lambda one: one.num_bytes)
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
