"""Pictures of a run, for the report and for TensorBoard."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpruner.files import replacing
from qpruner.plan import UNITS, CompressionPlan

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def loss_figure(losses: dict[str, list[tuple[int, float]]], borders: Sequence[int] = ()) -> "Figure":
    """Curves over the optimizer steps, given by name as (step, value); phases meet at the borders."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for tag, curve in losses.items():
        if curve:
            axes.plot(*zip(*curve, strict=True), label=tag, marker="o" if len(curve) < 20 else None, markersize=3)
    axes.set_ylabel("loss (nats per token)")
    axes.legend()
    _draw_steps(axes, borders)
    return figure


def ratio_figure(ratio: list[tuple[int, float]], borders: Sequence[int] = ()) -> "Figure":
    """The fraction of all parameters that is pruned, over the optimizer steps, given as (step, value)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    steps, values = zip(*[(0, 0.0), *ratio], strict=True)
    axes.step(steps, values, where="post", marker="o", markersize=3)
    axes.set_ylabel("pruned, of all parameters")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    _draw_steps(axes, borders)
    return figure


def _draw_steps(axes: Any, borders: Sequence[int]) -> None:
    """The axis of optimizer steps, with a line where a phase begins."""
    axes.set_xlabel("optimizer step")
    axes.grid(alpha=0.3)
    for border in borders:
        axes.axvline(border, color="gray", linestyle=":")


def plan_figure(plan: CompressionPlan) -> "Figure":
    """What each layer keeps, layers downwards: its share of KV groups and FFN channels, and the bits of its units."""
    from matplotlib.figure import Figure

    dense, widths = plan.architecture, plan.widths
    layers = range(dense.num_layers)
    figure = Figure(figsize=(10 if plan.quantized else 8, 1.4 + 0.26 * len(layers)), layout="constrained")
    panels = figure.subplots(1, 3 if plan.quantized else 2, sharey=True)
    for axes, title, kept, of in zip(
        panels,
        ("KV groups", "FFN channels"),
        (widths.kv_groups, widths.ffn_channels),
        (dense.kv_groups, dense.ffn_channels),
        strict=False,
    ):
        axes.barh(layers, [1.0] * len(layers), color="#e4e4e4")
        bars = axes.barh(layers, [k / n for k, n in zip(kept, of, strict=True)], color="#3b6ea5")
        labels = [f"{k} of {n}" for k, n in zip(kept, of, strict=True)]
        axes.bar_label(bars, labels, label_type="center", color="white", fontsize=8)
        axes.set_xlim(0, 1)
        axes.set_xlabel("share kept")
        axes.set_title(title)
    if plan.quantized:
        _draw_bits(panels[2], plan)
    panels[0].set_yticks(layers)
    panels[0].set_ylim(len(layers) - 0.5, -0.5)  # shared by all
    figure.supylabel("layer", fontsize="medium")
    return figure


def _draw_bits(axes: Any, plan: CompressionPlan) -> None:
    """The mean bits of every unit over its columns, units across."""
    bits = [
        [layer.precision[unit].mean_bits(columns) for unit, columns in plan.columns(number).items()]
        for number, layer in enumerate(plan.layers)
    ]
    axes.imshow(bits, aspect="auto", cmap="YlOrBr", vmin=0, vmax=20)
    for row, layer in enumerate(bits):
        for column, value in enumerate(layer):
            axes.text(column, row, f"{value:.3g}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(UNITS)), UNITS)
    hidden = plan.architecture.hidden_size
    axes.set_xlabel(f"embedding {plan.embedding.mean_bits(hidden):.3g}, head {plan.head.mean_bits(hidden):.3g}")
    axes.set_title("bits")


def save_figure(figure: "Figure", path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
