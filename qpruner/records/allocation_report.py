"""An allocation in readable form: a picture, the figures, and why each layer got its bits."""

from math import log2
from typing import TYPE_CHECKING

from qpruner.allocation.decision import Allocation, Decision
from qpruner.allocation.sensitivities import Sensitivities
from qpruner.records.folder import RunFolder
from qpruner.records.tables import markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def allocation_section(folder: RunFolder) -> list[str]:
    """The allocation in the folder of a run, as lines of Markdown."""
    sensitivities = Sensitivities.read(folder.sensitivities) if folder.sensitivities.exists() else None
    return describe(Allocation.read(folder.allocation), sensitivities)


def describe(allocation: Allocation, sensitivities: Sensitivities | None) -> list[str]:
    """The decision, greedy against exact, a sentence for each item, and the measurements; lines of Markdown."""
    lines = ["## Who got which bits", "", str(allocation)]
    if allocation.above_dearest:
        lines += ["", "The budget is above the dearest plan, which was taken."]
    if allocation.measure is not None:
        reached = {name: allocation.cost_of(name) for name in ("greedy", "exact")}
        differing = sum(decision.greedy != decision.exact for decision in allocation.decisions)
        lines += [
            "",
            f"Counted was {_counted(allocation)}, found {_among(allocation)}. The {allocation.solver} solution was "
            f"taken. Sum of costs, lower is better: greedy upgrades {reached['greedy']:.6g}, optimum "
            f"{reached['exact']:.6g}; they differ in {differing} of {len(allocation.decisions)} items.",
        ]
    lines += ["", *(f"- {sentence(allocation, decision)}" for decision in allocation.decisions)]
    if sensitivities is not None:
        lines += ["", sensitivities_table(sensitivities)]
    return lines


def sensitivities_table(sensitivities: Sensitivities) -> str:
    """The measurements: mutual information of each layer, or the rises of each item in each precision."""
    if sensitivities.mutual_information is not None:
        rows = [[f"layer {number}", f"{nats:.4f}"] for number, nats in enumerate(sensitivities.mutual_information)]
        return markdown_table(["", "mutual information (nats)"], rows)
    if sensitivities.marginals is not None:
        header = [f"{name} in {precision}" for precision in sensitivities.precisions for name in ("loss", "KL")]
        rows = [
            [
                str(rises.item),
                *(
                    f"{value[place]:.3g} ± {error[place]:.1g}"
                    for place in range(len(rises.kl))
                    for value, error in ((rises.loss, rises.loss_error), (rises.kl, rises.kl_error))
                ),
            ]
            for rises in sensitivities.marginals
        ]
        return markdown_table(["rise among others, nats per token", *header], rows)
    assert sensitivities.rises is not None
    measures = {"loss": "loss", "kl": "KL", "first_order": "first order"}
    header = [f"{name} in {precision}" for precision in sensitivities.precisions for name in measures.values()]
    rows = [
        [
            str(rises.item),
            *(f"{getattr(rises, name)[place]:.3g}" for place in range(len(rises.kl)) for name in measures),
        ]
        for rises in sensitivities.rises
    ]
    return markdown_table(["rise, nats per token", *header], rows)


def sentence(allocation: Allocation, decision: Decision) -> str:
    """Why an item got its bits."""
    chosen, choices, costs, sizes = decision.chosen, decision.choices, decision.costs, decision.sizes
    got = f"{str(decision.item).capitalize()} got {decision.precision}"
    if allocation.measure is None:
        wider = choices[chosen + 1 :]
        return f"{got}, as all do" + (f": {wider[0]} for all would be above the budget." if wider else ".")
    better = [place for place in range(chosen + 1, len(choices)) if costs[place] < costs[chosen]]
    reasons = []
    if allocation.measure == "mutual information":
        information = -costs[0] / log2(choices[0].bits)
        reasons.append(f"its mutual information with the prediction is {information:.4g} nats")
    if chosen > 0:
        reasons.append(f"{choices[0]} would cost {costs[0] - costs[chosen]:.3g} more")
    if better:
        saving, added = costs[chosen] - costs[better[0]], sizes[better[0]] - sizes[chosen]
        reasons.append(f"{choices[better[0]]} would save {saving:.3g} for {added:,} bytes")
    elif chosen + 1 < len(choices):
        reasons.append("more save nothing")
    if len(choices) > 1:
        reasons.append(
            f"by what bits save it per byte it is number {_place(allocation, decision)} of {len(allocation.decisions)}"
        )
    return f"{got}: {'; '.join(reasons)}." if reasons else f"{got}, the only choice."


def allocation_figure(allocation: Allocation) -> "Figure":
    """The gain of the widest over the narrowest choice of each item, and what the item got; items downwards."""
    from matplotlib.figure import Figure

    items = range(len(allocation.decisions))
    figure = Figure(figsize=(9, 1.6 + 0.26 * len(items)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    gains = [decision.costs[0] - decision.costs[-1] for decision in allocation.decisions]
    left.barh(items, gains, color="#3b6ea5")
    left.set_xlabel("gain of the widest over the narrowest")
    left.set_title(_counted(allocation) if allocation.measure else "uniform")
    bits = [decision.precision.bits for decision in allocation.decisions]
    right.bar_label(
        right.barh(items, bits, color="#c98f3d"), [str(decision.precision) for decision in allocation.decisions]
    )
    right.set_xlim(0, 1.35 * max(bits))
    right.set_xlabel("bits")
    right.set_title(f"{allocation.average_bits:.2f} bits per weight, {allocation.total_bytes:,} bytes")
    left.set_yticks(items, [str(decision.item) for decision in allocation.decisions], fontsize=8)
    left.set_ylim(len(items) - 0.5, -0.5)  # shared by both
    return figure


def _place(allocation: Allocation, decision: Decision) -> int:
    """Rank of an item, from 1, by the cost that its widest choice saves over the narrowest, per byte."""
    gain = _gain_per_byte(decision)
    return 1 + sum(_gain_per_byte(other) > gain for other in allocation.decisions)


def _gain_per_byte(decision: Decision) -> float:
    added = decision.sizes[-1] - decision.sizes[0]
    return (decision.costs[0] - decision.costs[-1]) / added if added else 0.0


def _among(allocation: Allocation) -> str:
    """In which context an item's cost was measured."""
    return "for each item among others of random bits" if allocation.method == "marginal" else "alone for each item"


def _counted(allocation: Allocation) -> str:
    names = {
        "kl": "rise of KL to the model without quantization, nats per token",
        "loss": "rise of loss, nats per token",
        "first_order": "rise of loss by first order, nats per token",
        "mutual information": "mutual information x log2(bits), nats",
    }
    return names[allocation.measure] if allocation.measure else ""
