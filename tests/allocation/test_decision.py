"""What budgets buy: within them to the byte, by each method, and the record of it."""

import copy
import itertools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.families import LAYERS, tiny_model

from qpruner.adapters.lora import LoRAConfig, attach_adapters
from qpruner.allocation.budget import Budget
from qpruner.allocation.decision import Allocation, DecidingConfig, Solver, affordable, decide
from qpruner.allocation.items import Item, items_of
from qpruner.allocation.sensitivities import Rises, Sensitivities
from qpruner.anatomy import architecture_of
from qpruner.errors import UserError
from qpruner.memory import tensor_bytes
from qpruner.plan import DENSE, UNITS, CompressionPlan, Precision
from qpruner.pricing import Price, price_narrowed
from qpruner.pruning.surgery import apply_pruning_
from qpruner.quantization.apply import quantize_

NF4, INT8 = Precision("nf4", 4, 64), Precision("int8", 8)
KEPT = [((0, 2, 3), tuple(range(35))), ((1,), tuple(range(3, 48, 2))), ((0, 1, 2, 3), tuple(range(7)))]
SOLVERS: tuple[Solver, ...] = ("exact", "greedy")
RANK, TARGETS = 2, ("q_proj", "down_proj")


def pruned(family: str = "qwen2", **tables: Precision) -> tuple[Any, CompressionPlan]:
    """A model and its plan, no two layers of which are equal, in float32."""
    model = tiny_model(family)
    plan = CompressionPlan.dense(architecture_of(model.config), None).keeping(KEPT)
    apply_pruning_(model, plan)
    return model, plan.with_precision([dict.fromkeys(UNITS, DENSE)] * LAYERS, **tables)


MODEL, PLAN = pruned()


def price_of(plan: CompressionPlan) -> Price:
    return price_narrowed(MODEL, plan, rank=RANK, targets=TARGETS)


def drawn(items: list[Item], precisions: Any = (NF4, INT8), seed: int = 0) -> Sensitivities:
    """More bits always cost less."""
    draw = random.Random(seed)
    named = tuple(sorted({*precisions} - {DENSE}, key=lambda precision: precision.bits))
    rises = [
        Rises(item, *(tuple(sorted((draw.random() for _ in named), reverse=True)) for _ in range(3))) for item in items
    ]
    return Sensitivities({}, tuple(draw.random() for _ in range(LAYERS)), named, tuple(rises))


def decided(
    budget: Budget,
    method: Any = "sensitivity",
    *,
    precisions: Any = (NF4, INT8),
    plan: CompressionPlan = PLAN,
    found: Sensitivities | None = None,
    **options: Any,
) -> tuple[CompressionPlan, Allocation]:
    config = DecidingConfig(**options)
    items = items_of(LAYERS, config.granularity, config.leave_alone)
    return decide(
        plan,
        items,
        precisions,
        budget,
        method=method,
        config=config,
        sensitivities=None if method == "uniform" else found or drawn(items, precisions),
        dense_size=4,
        price_of=price_of,
    )


def everywhere(precision: Precision) -> CompressionPlan:
    return PLAN.with_precision([dict.fromkeys(UNITS, precision)] * LAYERS)


CHEAPEST, DEAREST = price_of(everywhere(NF4)), price_of(everywhere(INT8))
DENSE_WEIGHTS = LAYERS * 64 * (64 + 2 * 32 + 64 + 3 * 48)  # of a qwen2 with heads of 8 that nothing was pruned of


def budget_of(kind: str, weight_bytes: int) -> Budget:
    """The smallest that leaves so many bytes to the weights of units."""
    return {
        "bytes": lambda: Budget(bytes=CHEAPEST.total - CHEAPEST.unit_weight_bytes + weight_bytes),
        "average_bits": lambda: Budget(average_bits=8 * weight_bytes / CHEAPEST.weights),
        "share": lambda: Budget(share=weight_bytes / (2 * DENSE_WEIGHTS)),
    }[kind]()


KINDS = pytest.mark.parametrize("kind", ["bytes", "average_bits", "share"])
METHODS = pytest.mark.parametrize("method", ["uniform", "mutual_information", "sensitivity"])


@KINDS
@METHODS
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    extra=st.integers(0, DEAREST.unit_weight_bytes - CHEAPEST.unit_weight_bytes + 9),
    granularity=st.sampled_from(["block", "unit"]),
    solver=st.sampled_from(SOLVERS),
    seed=st.integers(0, 5),
)
def test_a_plan_takes_no_more_than_its_budget(
    kind: str, method: Any, extra: int, granularity: Any, solver: Any, seed: int
) -> None:
    budget = budget_of(kind, CHEAPEST.unit_weight_bytes + extra)
    found = drawn(items_of(LAYERS, granularity, ()), seed=seed)
    plan, allocation = decided(budget, method, found=found, granularity=granularity, solver=solver)
    price = price_of(plan)
    assert allocation.limit == CHEAPEST.unit_weight_bytes + extra
    assert CHEAPEST.unit_weight_bytes <= price.unit_weight_bytes <= allocation.limit
    assert (allocation.total_bytes, allocation.average_bits) == (price.total, price.average_bits)
    assert allocation.above_dearest == (allocation.limit > DEAREST.unit_weight_bytes)
    assert price.unit_weight_bytes == sum(one.sizes[one.chosen] for one in allocation.decisions)
    for one in allocation.decisions:
        assert {plan.layers[one.item.layer].precision[unit] for unit in one.item.units} == {one.precision}
        assert one.chosen == getattr(one, solver)


@KINDS
def test_one_byte_decides(kind: str) -> None:
    """All in eight bits fit exactly; and all in four."""
    plan, allocation = decided(budget_of(kind, DEAREST.unit_weight_bytes), "uniform")
    assert plan == everywhere(INT8) and not allocation.above_dearest
    assert decided(budget_of(kind, DEAREST.unit_weight_bytes + 1), "uniform")[1].above_dearest
    plan, allocation = decided(budget_of(kind, DEAREST.unit_weight_bytes - 1), "uniform")
    assert plan == everywhere(NF4) and not allocation.above_dearest
    assert decided(budget_of(kind, CHEAPEST.unit_weight_bytes))[0] == everywhere(NF4)
    with pytest.raises(UserError, match="The budget is .*, and the cheapest plan has"):
        decided(budget_of(kind, CHEAPEST.unit_weight_bytes - 1))


@pytest.mark.parametrize("tables", [{}, {"embedding": NF4, "head": INT8}], ids=["dense tables", "packed tables"])
@pytest.mark.parametrize("granularity", ["block", "unit"])
def test_its_bytes_are_those_of_the_model_that_it_makes(tables: dict[str, Precision], granularity: Any) -> None:
    plan = replace(PLAN, **tables)
    budget = Budget(bytes=price_of(replace(everywhere(INT8), **tables)).total - 4000)
    found, allocation = decided(budget, plan=plan, granularity=granularity)
    assert {"embedding": found.embedding, "head": found.head} == ({"embedding": DENSE, "head": DENSE} | tables)
    assert {one.precision for one in allocation.decisions} == {NF4, INT8}
    model = copy.deepcopy(MODEL)
    quantize_(model, found, None, device=torch.device("cpu"))
    assert allocation.total_bytes - price_of(found).adapters == tensor_bytes(model)
    lora = LoRAConfig(r=RANK, target_modules=TARGETS)
    assert allocation.total_bytes == tensor_bytes(attach_adapters(model, lora, seed=0)) <= budget.bytes  # type: ignore[operator]


@METHODS
@pytest.mark.parametrize("precisions", [(INT8, NF4), (DENSE, NF4, INT8)])
def test_above_the_dearest_everything_gets_the_most(method: Any, precisions: Any) -> None:
    plan, allocation = decided(Budget(share=50.0), method, precisions=precisions)
    widest = DENSE if DENSE in precisions else INT8
    assert plan == everywhere(widest) and allocation.above_dearest
    assert allocation.decisions[0].choices == tuple(one for one in (NF4, INT8, DENSE) if one in precisions)
    assert f"{LAYERS} in {widest}" in str(allocation)


def test_bytes_that_save_nothing_are_spent_on_bits_all_the_same() -> None:
    """On layers that tell nothing about the prediction, but last."""
    found = Sensitivities({}, mutual_information=(0.0, 0.3, 0.0))
    for solver in SOLVERS:
        plan, allocation = decided(Budget(share=50.0), "mutual_information", found=found, solver=solver)
        assert [set(layer.precision.values()) for layer in plan.layers] == [{INT8}] * 3
        assert allocation.above_dearest
        one_short = Budget(bytes=allocation.total_bytes - 1)
        plan, _ = decided(one_short, "mutual_information", found=found, solver=solver)
        assert set(plan.layers[1].precision.values()) == {INT8}
        assert sorted(len(set(layer.precision.values()) & {NF4}) for layer in plan.layers) == [0, 0, 1]


@pytest.mark.parametrize("method", ["mutual_information", "sensitivity"])
@pytest.mark.parametrize("seed", range(4))
def test_exact_costs_the_least_of_all_plans_within_the_budget(method: Any, seed: int) -> None:
    items = items_of(LAYERS, "block", ())
    found = drawn(items, (NF4, INT8, DENSE), seed)
    budget = budget_of("bytes", random.Random(seed).randint(CHEAPEST.unit_weight_bytes, 3 * DEAREST.unit_weight_bytes))
    _, allocation = decided(budget, method, precisions=(NF4, INT8, DENSE), found=found)
    options = [list(zip(one.sizes, one.costs, strict=True)) for one in allocation.decisions]
    least = min(
        sum(cost for _, cost in chosen)
        for chosen in itertools.product(*options)
        if sum(size for size, _ in chosen) <= allocation.limit
    )
    assert allocation.cost_of("exact") == pytest.approx(least, abs=1e-9)
    assert allocation.cost_of("exact") <= allocation.cost_of("greedy") + 1e-9
    assert allocation.measure == {"mutual_information": "mutual information"}.get(method, "loss")


def test_greedy_and_exact_differ_and_the_one_asked_for_is_taken() -> None:
    """Greedy takes what saves most per byte, a small layer; then the large one, which saves more, fits no longer."""
    sizes = [[item.num_bytes(PLAN.widths, one, 4) for one in (NF4, INT8)] for item in items_of(LAYERS, "block", ())]
    added = [size[1] - size[0] for size in sizes]
    small, large = sorted(range(LAYERS), key=lambda layer: added[layer])[::2]
    gains = {small: (added[small] / added[large] + 1) / 2, large: 1.0}
    found = Sensitivities({}, tuple(gains.get(layer, 0.0) for layer in range(LAYERS)))
    budget = budget_of("bytes", CHEAPEST.unit_weight_bytes + added[large])
    taken = {}
    for solver in SOLVERS:
        plan, allocation = decided(budget, "mutual_information", found=found, solver=solver)
        taken[solver] = [layer for layer in range(LAYERS) if plan.layers[layer].precision["o"] == INT8]
        assert allocation.solver == solver
        less = replace(budget, bytes=budget.bytes - 1)  # type: ignore[operator]
        plan, _ = decided(less, "mutual_information", found=found, solver=solver)
        assert [layer for layer in range(LAYERS) if plan.layers[layer].precision["o"] == INT8] == [small]
    assert taken == {"exact": [large], "greedy": [small]}
    assert allocation.cost_of("exact") < allocation.cost_of("greedy")


@pytest.mark.parametrize("measure", ["kl", "loss", "first_order"])
def test_the_measure_asked_for_counts(measure: Any) -> None:
    """Each of the three has another layer to save; the budget is for the largest."""
    items = items_of(LAYERS, "block", ())
    matters = {"kl": 0, "loss": 1, "first_order": 2}
    rises = tuple(
        Rises(item, **{name: (float(item.layer == layer), 0.0) for name, layer in matters.items()}) for item in items
    )
    budget = budget_of("bytes", (CHEAPEST.unit_weight_bytes + DEAREST.unit_weight_bytes) // 2)
    plan, allocation = decided(budget, found=Sensitivities({}, precisions=(NF4, INT8), rises=rises), measure=measure)
    assert [layer.precision["o"] == INT8 for layer in plan.layers] == [layer == matters[measure] for layer in range(3)]
    assert allocation.measure == measure


@METHODS
@pytest.mark.parametrize("granularity", ["block", "unit"])
def test_layers_left_alone_stay_dense_and_count(method: Any, granularity: Any) -> None:
    alone = everywhere(NF4).with_precision([dict.fromkeys(UNITS, one) for one in (NF4, DENSE, INT8)])
    budget = budget_of("bytes", price_of(alone).unit_weight_bytes)
    plan, allocation = decided(budget, method, granularity=granularity, leave_alone=[1])
    assert set(plan.layers[1].precision.values()) == {DENSE}
    assert not {DENSE} & {one for layer in (0, 2) for one in plan.layers[layer].precision.values()}
    assert {one.item.layer for one in allocation.decisions} == {0, 2}
    assert price_of(plan).unit_weight_bytes <= allocation.limit
    with pytest.raises(UserError, match="leave fewer layers alone"):
        decided(budget_of("bytes", CHEAPEST.unit_weight_bytes + 9), method, leave_alone=[-2])


def test_units_get_widths_of_their_own_and_what_is_fused_one() -> None:
    budget = budget_of("bytes", (CHEAPEST.unit_weight_bytes + DEAREST.unit_weight_bytes) // 2)
    plan, allocation = decided(budget, granularity="unit")
    assert len(allocation.decisions) == LAYERS * len(UNITS)
    assert any(len(set(layer.precision.values())) > 1 for layer in plan.layers)
    model = copy.deepcopy(MODEL)
    quantize_(model, plan, None, device=torch.device("cpu"))
    for layer in model.model.layers:
        for fused in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            owner = layer.self_attn if "q_proj" in fused else layer.mlp
            assert len({getattr(owner, name).precision for name in fused}) == 1


def test_the_cheapest_plan_is_named_with_its_price() -> None:
    with pytest.raises(UserError) as caught:
        decided(Budget(average_bits=4.0))
    assert str(caught.value) == (
        f"The budget is 4 bits per weight, and the cheapest plan has {CHEAPEST.total:,} bytes in all, "
        f"{CHEAPEST.unit_weight_bytes:,} of them in the weights of the decoder linears "
        f"({CHEAPEST.average_bits:.2f} bits each, scales included): every unit that is not left alone in nf4 4/64. "
        f"Raise the budget to that, prune more, or leave fewer layers alone."
    )
    limit, *prices = affordable(
        PLAN, items_of(LAYERS, "block", ()), [INT8, NF4], Budget(average_bits=7), dense_size=4, price_of=price_of
    )
    assert prices == [CHEAPEST, DEAREST] and limit == 7 * CHEAPEST.weights // 8


@pytest.mark.parametrize("method", ["uniform", "sensitivity"])
def test_an_allocation_comes_back_from_its_file(tmp_path: Path, method: Any) -> None:
    _, allocation = decided(Budget(average_bits=6.5), method, granularity="unit")
    allocation.write(tmp_path / "allocation.json")
    assert Allocation.read(tmp_path / "allocation.json") == allocation


def test_it_says_who_got_what() -> None:
    plan, allocation = decided(budget_of("bytes", (CHEAPEST.unit_weight_bytes + DEAREST.unit_weight_bytes) // 2))
    wide = sum(layer.precision["o"] == INT8 for layer in plan.layers)
    assert str(allocation) == (
        f"Bits by sensitivity under a budget of {allocation.budget}: of 3 items {3 - wide} in nf4 4/64, {wide} in int8 "
        f"8; {price_of(plan).total:,} bytes in all, {price_of(plan).average_bits:.2f} bits per weight of the decoder "
        f"linears, scales included."
    )


@pytest.mark.parametrize("widths", [(), (4, 4), (4, 8, 4)])
def test_no_widths_or_one_twice_are_refused(widths: Any) -> None:
    with pytest.raises(UserError, match=r"deciding.widths is .*; name some widths, each once"):
        DecidingConfig(widths=widths)
    assert DecidingConfig(widths=[8, 4], leave_alone=[0]) == DecidingConfig(widths=(8, 4), leave_alone=(0,))
