"""What a person reads of an allocation, by hand."""

from dataclasses import replace
from typing import Any

import pytest

from qpruner.allocation.decision import Allocation, Decision
from qpruner.allocation.items import Item
from qpruner.allocation.sensitivities import Marginals, Rises, Sensitivities
from qpruner.plan import DENSE, UNITS, Precision
from qpruner.records.allocation_report import allocation_figure, describe, sensitivities_table, sentence

NF4, INT8 = Precision("nf4", 4, 64), Precision("int8", 8)


def decision(item: Item, costs: tuple[float, ...], chosen: int, **changes: Any) -> Decision:
    """Widths of 1,000, 2,000 and 4,000 bytes, as many as there are costs."""
    choices, sizes = (NF4, INT8, DENSE)[: len(costs)], (1000, 2000, 4000)[: len(costs)]
    return Decision(**{**vars(Decision(item, choices, sizes, costs, chosen, chosen, chosen)), **changes})


def allocation(measure: str | None, *decisions: Decision, **changes: Any) -> Allocation:
    method: Any = {None: "uniform", "mutual information": "mutual_information"}.get(measure, "sensitivity")
    made = Allocation(method, measure, "exact", "6 bits per weight", 5000, 4000, 9000, 5.678, False, decisions)
    return replace(made, **changes)


def sentences(made: Allocation) -> list[str]:
    return [sentence(made, decision) for decision in made.decisions]


def test_mutual_information() -> None:
    made = allocation(
        "mutual information",
        decision(Item(0, UNITS), (-1.0, -1.5), 0),
        decision(Item(1, UNITS), (-2.5, -3.75), 1),
        decision(Item(2, ("o",)), (-0.0, -0.0), 0),
    )
    assert sentences(made) == [
        "Layer 0 got nf4 4/64: its mutual information with the prediction is 0.5 nats; int8 8 would save 0.5 for 1,000 "
        "bytes; by what bits save it per byte it is number 2 of 3.",
        "Layer 1 got int8 8: its mutual information with the prediction is 1.25 nats; nf4 4/64 would cost 1.25 more; "
        "by what bits save it per byte it is number 1 of 3.",
        "Layer 2 o got nf4 4/64: its mutual information with the prediction is 0 nats; more save nothing; by what bits "
        "save it per byte it is number 3 of 3.",
    ]


def test_sensitivity() -> None:
    made = allocation(
        "kl",
        decision(Item(0, ("qkv",)), (0.3, 0.3, 0.0), 0),  # eight bits seem to save nothing, sixteen do
        decision(Item(0, ("o",)), (0.5, 0.125, 0.0), 1),
        decision(Item(1, UNITS), (0.75, 0.25, 0.0), 2),
    )
    assert sentences(made) == [
        "Layer 0 qkv got nf4 4/64: dense 16 would save 0.3 for 3,000 bytes; by what bits save it per byte it is number "
        "3 of 3.",
        "Layer 0 o got int8 8: nf4 4/64 would cost 0.375 more; dense 16 would save 0.125 for 2,000 bytes; by what bits "
        "save it per byte it is number 2 of 3.",
        "Layer 1 got dense 16: nf4 4/64 would cost 0.75 more; by what bits save it per byte it is number 1 of 3.",
    ]


def test_uniform() -> None:
    narrow, wide = (allocation(None, decision(Item(1, UNITS), (0.0, 0.0), place)) for place in (0, 1))
    assert sentences(narrow) == ["Layer 1 got nf4 4/64, as all do: int8 8 for all would be above the budget."]
    assert sentences(wide) == ["Layer 1 got int8 8, as all do."]
    assert "Counted" not in "\n".join(describe(narrow, None))


def test_an_only_choice_needs_no_reason() -> None:
    assert sentences(allocation("loss", decision(Item(4, UNITS), (0.5,), 0))) == [
        "Layer 4 got nf4 4/64, the only choice."
    ]


@pytest.mark.parametrize(
    ("measure", "said"),
    [
        ("kl", "rise of KL to the model without quantization, nats per token"),
        ("loss", "rise of loss, nats per token"),
        ("first_order", "rise of loss by first order, nats per token"),
    ],
)
def test_the_section_compares_greedy_and_optimum(measure: str, said: str) -> None:
    made = allocation(
        measure,
        decision(Item(0, UNITS), (0.5, 0.125), 0, greedy=1),
        decision(Item(1, UNITS), (0.75, 0.25), 1, greedy=0),
        decision(Item(2, UNITS), (0.25, 0.125), 1),
    )
    text = describe(made, None)
    assert text[0] == "## Who got which bits" and text[2] == str(made)
    assert (
        f"Counted was {said}, found alone for each item. The exact solution was taken. Sum of costs, lower is better: "
        f"greedy upgrades 1, optimum 0.875; they differ in 2 of 3 items."
    ) in text
    assert text[-3:] == [f"- {one}" for one in sentences(made)]
    assert not any("dearest" in line for line in text)
    assert any("above the dearest plan" in line for line in describe(replace(made, above_dearest=True), None))


@pytest.mark.parametrize("measure", [None, "kl", "mutual information"])
def test_the_figure_has_a_bar_for_each_gain_and_each_width(measure: str | None) -> None:
    made = allocation(measure, decision(Item(0, UNITS), (0.5, 0.125), 0), decision(Item(1, ("o",)), (0.75, 0.25), 1))
    left, right = allocation_figure(made).axes
    assert [bar.get_width() for bar in left.patches] == [0.375, 0.5]
    assert [bar.get_width() for bar in right.patches] == [4, 8]
    assert [label.get_text() for label in left.get_yticklabels()] == ["layer 0", "layer 1 o"]
    assert [text.get_text() for text in right.texts] == ["nf4 4/64", "int8 8"]
    assert left.get_title() == {
        None: "uniform",
        "kl": "rise of KL to the model without quantization, nats per token",
        "mutual information": "mutual information x log2(bits), nats",
    }[measure]  # fmt: skip
    assert right.get_title() == "5.68 bits per weight, 9,000 bytes"


def test_the_table_shows_what_was_found() -> None:
    information = sensitivities_table(Sensitivities({}, mutual_information=(0.25, 1.5)))
    assert [line.split("|")[1:3] for line in information.splitlines()[2:]] == [
        [" layer 0 ", "                    0.2500 "],
        [" layer 1 ", "                    1.5000 "],
    ]
    rises = (Rises(Item(1, ("o",)), kl=(0.5, 0.25), loss=(0.125, -0.5), first_order=(2.0, 1.0)),)
    table = sensitivities_table(Sensitivities({}, precisions=(NF4, INT8), rises=rises)).splitlines()
    assert [cell.strip() for cell in table[0].split("|")[2:-1]] == [
        "loss in nf4 4/64", "KL in nf4 4/64", "first order in nf4 4/64",
        "loss in int8 8", "KL in int8 8", "first order in int8 8",
    ]  # fmt: skip
    assert [cell.strip() for cell in table[2].split("|")[1:-1]] == [
        "layer 1 o", "0.125", "0.5", "2", "-0.5", "0.25", "1"
    ]  # fmt: skip
    found = Sensitivities({}, precisions=(NF4, INT8), rises=rises)
    assert table[2] in "\n".join(describe(allocation("loss", decision(Item(4, UNITS), (0.5,), 0)), found))


def test_rises_among_others_are_shown_with_their_errors() -> None:
    marginals = (Marginals(Item(0, UNITS), (0.5, 0.0), (0.25, 0.0), (0.0625, 0.0), (0.03125, 0.0)),)
    found = Sensitivities({}, precisions=(NF4, INT8), marginals=marginals)
    table = sensitivities_table(found).splitlines()
    assert [cell.strip() for cell in table[0].split("|")[1:-1]] == [
        "rise among others, nats per token", "loss in nf4 4/64", "KL in nf4 4/64", "loss in int8 8", "KL in int8 8"
    ]  # fmt: skip
    assert [cell.strip() for cell in table[2].split("|")[1:-1]] == [
        "layer 0", "0.25 ± 0.03", "0.5 ± 0.06", "0 ± 0", "0 ± 0"
    ]  # fmt: skip
    made = allocation("kl", decision(Item(0, UNITS), (0.5, 0.0), 1), method="marginal")
    described = "\n".join(describe(made, found))
    assert table[2] in described and "nats per token, found for each item among others of random bits." in described
