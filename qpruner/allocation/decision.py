"""From sensitivities and a budget to a plan, and the record of why every item got its bits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import log2
from typing import Literal

from qpruner.allocation.budget import Budget
from qpruner.allocation.items import Granularity, Item
from qpruner.allocation.mutual_information import MutualInformationConfig
from qpruner.allocation.sensitivities import Measure, Sensitivities
from qpruner.allocation.solving import Choice, exact, greedy, total_cost
from qpruner.calibration.text import CalibrationConfig
from qpruner.errors import UserError
from qpruner.plan import CompressionPlan, Precision
from qpruner.pricing import Price
from qpruner.schema import Record

TRIFLE = 1e-6
"""Discount for twice the bits, as a share of the average range of an item's costs; it decides where costs are equal."""

Method = Literal["uniform", "mutual_information", "sensitivity", "marginal"]
Solver = Literal["exact", "greedy"]
Counted = Literal["kl", "loss", "first_order", "mutual information"]
"""What costs measure, in readable form."""


@dataclass(frozen=True)
class DecidingConfig:
    """How bits are decided under a budget.

    Args:
        widths: bits to choose from, among those that `MixedPrecisionQuantization` offers.
        granularity: whether each ``block`` gets a width, or each ``unit`` of a block.
        leave_alone: numbers of layers, from 0, that stay in 16 bits; negative ones count from the last.
        solver: how the bits are chosen: ``exact``, the optimum of the knapsack problem, or ``greedy``, the upgrades of
            QPruner.
        measure: sensitivity that counts: the measured rise of ``loss`` or ``kl``, or the rise of the loss estimated by
            ``first_order``, which only exists for each item alone.
        contexts: number of random assignments of bits to all items in which ``marginal`` measures each item, even and
            at least 2; the work grows with this number.
        mutual_information: how mutual information is estimated.
        calibration: calibration text on which mutual information or sensitivities are measured.

    Raises:
        UserError: no widths, or a repeated one; contexts that do not come in pairs.
    """

    widths: Sequence[int] = (4, 8)
    granularity: Granularity = "block"
    leave_alone: Sequence[int] = ()
    solver: Solver = "exact"
    measure: Measure = "loss"
    contexts: int = 4
    mutual_information: MutualInformationConfig = MutualInformationConfig()
    calibration: CalibrationConfig = CalibrationConfig(num_sequences=64, length=64)

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))  # a list from YAML compares as a tuple
        object.__setattr__(self, "leave_alone", tuple(self.leave_alone))
        if not self.widths or len(set(self.widths)) != len(self.widths):
            raise UserError(f"deciding.widths is {list(self.widths)}; name some widths, each once.")
        if type(self.contexts) is not int or self.contexts < 2 or self.contexts % 2:
            raise UserError(
                f"deciding.contexts is {self.contexts!r}; assignments come in pairs, each with its mirror. Give an "
                f"even number of at least 2."
            )


@dataclass(frozen=True)
class Decision:
    """What was decided for one item.

    Args:
        item: item that was decided on.
        choices: precisions that the item may be held in, fewest bytes first.
        sizes: bytes of the item's weights in each precision.
        costs: cost of each precision to the model, lower is better; for mutual information ``-I log2(bits)``.
        chosen: index of the precision that the item got.
        greedy: index of the precision that the greedy upgrades give the item.
        exact: index of the precision that the optimum gives the item.

    Raises:
        UserError: there are no choices, not a size and a cost for each, or an index is out of range.
    """

    item: Item
    choices: tuple[Precision, ...]
    sizes: tuple[int, ...]
    costs: tuple[float, ...]
    chosen: int
    greedy: int
    exact: int

    def __post_init__(self) -> None:
        count = len(self.choices)
        places = (self.chosen, self.greedy, self.exact)
        if not count == len(self.sizes) == len(self.costs) or not all(0 <= place < count for place in places):
            raise UserError(
                f"{str(self.item).capitalize()} has {count} choices, {len(self.sizes)} sizes and {len(self.costs)} "
                f"costs; they go together, and places {places} count among them from 0."
            )

    @property
    def precision(self) -> Precision:
        return self.choices[self.chosen]


@dataclass(frozen=True)
class Allocation(Record):
    """Which item got which bits under a budget, and why; JSON in ``allocation.json``.

    Args:
        method: method that determined the costs.
        measure: measure of the costs: ``kl``, ``loss``, ``first_order`` or ``mutual information``; None for
            ``uniform``.
        solver: solver whose solution was taken.
        budget: budget in readable form.
        limit: bytes that the budget leaves for the weights in the decoder linears.
        for_items: bytes of this limit that are left for the items.
        total_bytes: bytes of all tensors, adapters included, once the plan is carried out.
        average_bits: bits per weight of the decoder linears, scales included.
        above_dearest: whether the budget is above the dearest plan.
        decisions: what was decided for each item.

    Raises:
        UserError: no decisions.
    """

    remedy = "Restore the file, or run the fit again with --restart."

    method: Method
    measure: Counted | None
    solver: Solver
    budget: str
    limit: int
    for_items: int
    total_bytes: int
    average_bits: float
    above_dearest: bool
    decisions: tuple[Decision, ...]

    def __post_init__(self) -> None:
        if not self.decisions:
            raise UserError("An allocation decides on at least one item.")

    def cost_of(self, solver: Solver) -> float:
        """The sum of costs that a solver reaches."""
        return sum(decision.costs[getattr(decision, solver)] for decision in self.decisions)

    def __str__(self) -> str:
        counts = dict.fromkeys(self.decisions[0].choices, 0)
        for decision in self.decisions:
            counts[decision.precision] += 1
        shares = ", ".join(f"{count} in {precision}" for precision, count in counts.items())
        return (
            f"Bits by {self.method.replace('_', ' ')} under a budget of {self.budget}: of {len(self.decisions)} items "
            f"{shares}; {self.total_bytes:,} bytes in all, {self.average_bits:.2f} bits per weight of the decoder "
            f"linears, scales included."
        )


def decide(
    plan: CompressionPlan,
    items: Sequence[Item],
    precisions: Sequence[Precision],
    budget: Budget,
    *,
    method: Method,
    config: DecidingConfig,
    sensitivities: Sensitivities | None,
    dense_size: int,
    price_of: Callable[[CompressionPlan], Price],
) -> tuple[CompressionPlan, Allocation]:
    """The plan that a budget buys.

    Args:
        plan: plan of the pruned model; items get a precision, its other units, its embedding and its head keep theirs.
        items: items to decide on.
        precisions: precisions to choose from.
        budget: limit on what is stored.
        method: method that determines the costs; ``uniform`` gives all items the same precision.
        config: how to decide.
        sensitivities: sensitivities of the items; None for ``uniform``.
        dense_size: bytes of one dense weight.
        price_of: function that prices a plan of the pruned model.

    Raises:
        UserError: the budget is below the cheapest plan, which is named.
    """
    widths = plan.widths
    order = in_order(plan, items, precisions, dense_size)
    sizes = [tuple(item.num_bytes(widths, precision, dense_size) for precision in order) for item in items]
    limit, cheapest, dearest = affordable(plan, items, precisions, budget, dense_size=dense_size, price_of=price_of)
    left = limit - (cheapest.unit_weight_bytes - sum(size[0] for size in sizes))  # for the items
    if method == "uniform":
        place = max(place for place in range(len(order)) if sum(size[place] for size in sizes) <= left)
        costs, of_greedy, of_exact = [(0.0,) * len(order)] * len(items), *[(place,) * len(items)] * 2
    else:
        assert sensitivities is not None
        by_information = method == "mutual_information"
        costs = sensitivities.costs(items, order, "mutual_information" if by_information else config.measure)
        choices = _choices(sizes, costs, order)
        of_greedy, of_exact = greedy(choices, left), exact(choices, left)
        assert total_cost(choices, of_exact) <= total_cost(choices, of_greedy) + 1e-9
    chosen = of_exact if config.solver == "exact" else of_greedy
    decided = with_choices(plan, items, [order[place] for place in chosen])
    price = price_of(decided)
    counted: dict[Method, Counted | None] = {
        "uniform": None,
        "mutual_information": "mutual information",
        "sensitivity": config.measure,
        "marginal": config.measure,
    }
    decisions = zip(items, sizes, costs, chosen, of_greedy, of_exact, strict=True)
    return decided, Allocation(
        method=method,
        measure=counted[method],
        solver=config.solver,
        budget=str(budget),
        limit=limit,
        for_items=left,
        total_bytes=price.total,
        average_bits=price.average_bits,
        above_dearest=limit > dearest.unit_weight_bytes,
        decisions=tuple(Decision(item, tuple(order), *others) for item, *others in decisions),
    )


def _choices(
    sizes: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], order: Sequence[Precision]
) -> list[list[Choice]]:
    """The choices of each item, with a small discount for more bits: even if they save no measured cost, they are
    better than bytes left unused.
    """
    trifle = TRIFLE * sum(max(item) - min(item) for item in costs) / len(costs) or 1.0
    return [
        [Choice(size, cost - trifle * log2(precision.bits)) for size, cost, precision in zip(*item, order, strict=True)]
        for item in zip(sizes, costs, strict=True)
    ]


def in_order(
    plan: CompressionPlan, items: Sequence[Item], precisions: Sequence[Precision], dense_size: int
) -> list[Precision]:
    """The precisions, fewest bytes first."""
    return sorted(
        precisions, key=lambda precision: sum(item.num_bytes(plan.widths, precision, dense_size) for item in items)
    )


def affordable(
    plan: CompressionPlan,
    items: Sequence[Item],
    precisions: Sequence[Precision],
    budget: Budget,
    *,
    dense_size: int,
    price_of: Callable[[CompressionPlan], Price],
    least_rank: int | None = None,
) -> tuple[int, Price, Price]:
    """The bytes that a budget leaves for the weights in the decoder linears, and the cheapest and dearest price.

    Args:
        plan: plan of the pruned model, with the precisions of what is not decided on.
        items: items to decide on.
        precisions: precisions to choose from.
        budget: limit on what is stored.
        dense_size: bytes of one dense weight.
        price_of: function that prices a plan of the pruned model.
        least_rank: rank of the adapters in the prices, where it is the lowest of several; None where there is no choice
            of ranks.

    Raises:
        UserError: the budget is below the cheapest plan, which is named.
    """
    order = in_order(plan, items, precisions, dense_size)
    cheapest, dearest = (price_of(with_choices(plan, items, [order[place]] * len(items))) for place in (0, -1))
    limit = budget.limit(cheapest, plan)
    if cheapest.unit_weight_bytes > limit:
        adapters = "" if least_rank is None else f", and adapters of the lowest rank, {least_rank}"
        raise UserError(
            f"The budget is {budget}, and the cheapest plan has {describe_price(cheapest)}: every unit that is not "
            f"left alone in {order[0]}{adapters}. Raise the budget to that, prune more, or leave fewer layers alone."
        )
    return limit, cheapest, dearest


def with_choices(plan: CompressionPlan, items: Sequence[Item], precisions: Sequence[Precision]) -> CompressionPlan:
    """The plan with its items held in these precisions."""
    layers = list(plan.layers)
    for item, precision in zip(items, precisions, strict=True):
        held = dict(layers[item.layer].precision) | dict.fromkeys(item.units, precision)
        layers[item.layer] = replace(layers[item.layer], precision=held)
    return replace(plan, layers=tuple(layers))


def describe_price(price: Price) -> str:
    return (
        f"{price.total:,} bytes in all, {price.unit_weight_bytes:,} of them in the weights of the decoder linears "
        f"({price.average_bits:.2f} bits each, scales included)"
    )
