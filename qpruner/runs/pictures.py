"""Pictures of a run, for the report and for TensorBoard."""

from pathlib import Path
from typing import TYPE_CHECKING

from qpruner.files import replacing
from qpruner.plan import CompressionPlan

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def loss_figure(losses: dict[str, list[tuple[int, float]]]) -> "Figure":
    """Curves over the optimizer steps, each given by its name and its (step, value)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for tag, curve in losses.items():
        if curve:
            axes.plot(*zip(*curve, strict=True), label=tag, marker="o" if len(curve) < 20 else None, markersize=3)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def plan_figure(plan: CompressionPlan) -> "Figure":
    """Which share of its KV groups and of its FFN channels each layer keeps; layers downwards."""
    from matplotlib.figure import Figure

    dense, widths = plan.architecture, plan.widths
    layers = range(dense.num_layers)
    figure = Figure(figsize=(8, 1.4 + 0.26 * len(layers)), layout="constrained")
    for axes, title, kept, of in zip(
        figure.subplots(1, 2, sharey=True),
        ("KV groups", "FFN channels"),
        (widths.kv_groups, widths.ffn_channels),
        (dense.kv_groups, dense.ffn_channels),
        strict=True,
    ):
        axes.barh(layers, [1.0] * len(layers), color="#e4e4e4")
        bars = axes.barh(layers, [k / n for k, n in zip(kept, of, strict=True)], color="#3b6ea5")
        labels = [f"{k} of {n}" for k, n in zip(kept, of, strict=True)]
        axes.bar_label(bars, labels, label_type="center", color="white", fontsize=8)
        axes.set_xlim(0, 1)
        axes.set_xlabel("share kept")
        axes.set_title(title)
        axes.set_yticks(layers)
    axes.invert_yaxis()  # shared by both
    figure.supylabel("layer", fontsize="medium")
    return figure


def save_figure(figure: "Figure", path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
