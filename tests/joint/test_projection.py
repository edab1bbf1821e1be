"""Thresholds and plans within a budget."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.families import tiny_model
from support.joint import FOUR, OFFERED, TWO, between, space_of

from qpruner.errors import UserError
from qpruner.joint.price import kept_weights, smooth_bytes
from qpruner.joint.projection import differentiable_bytes, hard, plan_of, plan_within, relative, thresholds_within
from qpruner.joint.space import JointSpace, Logits, acting, unit_bytes
from qpruner.plan import DENSE, UNITS, Leading


def logits_of(space: JointSpace, seed: int = 0) -> Logits:
    generator = torch.Generator().manual_seed(seed)
    return {kind: torch.randn(shape, generator=generator) for kind, shape in space.shapes.items()}


@pytest.mark.parametrize("lifts", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_plans_are_within_any_budget_and_waste_little_of_it(share: float, lifts: bool) -> None:
    space = space_of(tiny_model("llama"), lifts=lifts, multiple=4)
    limit = between(space, share)
    for seed in range(3):
        stored = unit_bytes(plan_within(space, logits_of(space, seed), limit), 4)
        assert stored <= limit
        assert stored >= 0.9 * limit or share == 0.0


def test_thresholds_are_the_lowest_that_fit() -> None:
    space = space_of(tiny_model("llama"))
    gates, limit = acting(logits_of(space)), between(space)
    thresholds = thresholds_within(space, gates, limit)
    highest = {kind: float(torch.as_tensor(threshold).max()) for kind, threshold in thresholds.items()}
    assert len(set(highest.values())) == 1
    assert float(smooth_bytes(space, hard(gates, thresholds))) <= limit
    closed = {kind: values[hard(gates, thresholds)[kind] == 0] for kind, values in gates.items()}
    below = max(float(values.max()) for values in closed.values()) - 1e-5  # one gate more
    lower = {kind: torch.as_tensor(threshold).clamp(max=below) for kind, threshold in thresholds.items()}
    assert float(smooth_bytes(space, hard(gates, lower))) > limit


def test_a_number_of_weights_binds_structure_alone() -> None:
    space = space_of(tiny_model("llama"))
    gates = acting(logits_of(space))
    limit = between(space, 0.6)
    together = hard(gates, thresholds_within(space, gates, limit))
    most = int(0.8 * float(kept_weights(space, together)))
    capped = thresholds_within(replace(space, most_weights=most), gates, limit)
    opened = hard(gates, capped)
    assert 0.95 * most <= float(kept_weights(space, opened)) <= most
    assert float(smooth_bytes(space, opened)) <= limit
    assert capped["upgrades"] < capped["groups"].max() == capped["channels"].max()
    assert opened["upgrades"].sum() > together["upgrades"].sum()  # what structure leaves goes to widths


def test_a_pinned_number_of_weights_is_kept_where_a_bound_would_not_bind() -> None:
    space = space_of(tiny_model("llama"))
    gates, limit = acting(logits_of(space)), between(space, 0.4)
    alone = float(kept_weights(space, hard(gates, thresholds_within(space, gates, limit))))
    most = int(1.3 * alone)
    bound, pinned = (
        float(kept_weights(space, hard(gates, thresholds_within(changed, gates, limit))))
        for changed in (replace(space, most_weights=most), replace(space, most_weights=most, pins_weights=True))
    )
    assert bound == alone
    assert 0.95 * most <= pinned <= most


def test_a_plan_keeps_the_units_of_the_highest_logits_in_legal_numbers() -> None:
    space = space_of(tiny_model("llama"), multiple=8, alone=frozenset({2}))
    gates = {kind: values.double() for kind, values in acting(logits_of(space)).items()}
    plan = plan_of(space, gates, 0.3)
    for number in range(2):
        layer, logits = plan.layers[number], space.by_layer(gates["channels"], "channels")[number]
        assert len(layer.ffn_channels) == max(8, 8 * round(int((logits > 0.3).sum()) / 8))
        assert set(layer.ffn_channels) == set(logits.topk(len(layer.ffn_channels)).indices.tolist())
        of_groups = space.by_layer(gates["groups"], "groups")[number]
        assert (
            set(layer.kv_groups) == {int(place) for place in (of_groups > 0.3).nonzero()} or len(layer.kv_groups) == 1
        )
    assert len(plan.layers[2].kv_groups) == 4 and len(plan.layers[2].ffn_channels) == 48


KEPT_ANYWAY = [
    {"alone": frozenset({0, 2})},
    {"least": ((2, 16),) * 3},
    {"least": ((2, 16),) * 3, "alone": frozenset({0, 2})},
    {"least": ((2, 16),) * 3, "pins_weights": True, "most_weights": 30_000},
]


@pytest.mark.parametrize("changes", KEPT_ANYWAY, ids=["alone", "floor", "both", "pinned"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_what_stays_anyway_is_open_at_any_budget_and_paid_for(share: float, changes: dict[str, Any]) -> None:
    """Hard gates, their bytes and the plan agree, so that no budget is spent twice."""
    space = space_of(tiny_model("llama"), **changes)
    limit = between(space, share)
    for seed in range(3):
        gates = {kind: values.double() for kind, values in acting(logits_of(space, seed)).items()}
        for kind in ("groups", "channels"):  # without bounds, these layers would go first
            for layer in space.alone:
                space.by_layer(gates[kind], kind)[layer].sub_(10)
        thresholds = thresholds_within(space, gates, limit)
        opened = hard(gates, thresholds)
        plan = plan_of(space, relative(gates, thresholds), 0.0)
        assert float(smooth_bytes(space, opened)) <= limit + 1e-6
        assert float(differentiable_bytes(space, opened)) == unit_bytes(plan, 4)
        for kind, fewest in zip(("groups", "channels"), space.fewest, strict=True):
            of_layers = zip(space.by_layer(opened[kind], kind), space.by_layer(gates[kind], kind), strict=True)
            for number, (is_open, logits) in enumerate(of_layers):
                kept = plan.layers[number].kv_groups if kind == "groups" else plan.layers[number].ffn_channels
                assert is_open.nonzero().flatten().tolist() == list(kept)
                assert is_open[logits.topk(fewest[number]).indices].all()
                assert number not in space.alone or is_open.all()
        final = plan_within(space, gates, limit)
        assert unit_bytes(final, 4) <= limit
        assert all(len(layer.kv_groups) >= groups for layer, groups in zip(final.layers, space.fewest[0], strict=True))


def test_lifted_channels_come_first_and_lead() -> None:
    space = space_of(tiny_model("llama"), lifts=True, prunes=False, offered=(TWO, FOUR), multiple=8)
    gates = {
        "upgrades": torch.zeros(3, 4, 1),
        "lifted_groups": torch.tensor([0.0, 0, 1, 0] * 3),
        "lifted_channels": torch.cat([torch.zeros(40), torch.ones(8)] * 3),
        "lifted_hidden": torch.zeros(3, 2, 64),
    }
    gates["lifted_hidden"][0, 0, 48:] = torch.arange(1.0, 17.0)
    plan = plan_of(space, gates, 0.5)
    first, second = plan.layers[:2]
    assert first.kv_groups == (2, 0, 1, 3)
    assert first.ffn_channels == (*range(40, 48), *range(40))
    assert first.precision["o"] == replace(TWO, leading=Leading(32, FOUR))  # two query heads of 16 channels
    assert first.precision["down"] == replace(TWO, leading=Leading(8, FOUR))
    assert first.precision["qkv"] == replace(TWO, leading=Leading(16, FOUR))
    assert first.precision["gate_up"] == second.precision["qkv"] == TWO
    assert plan.hidden is not None and plan.hidden[:16] == tuple(range(63, 47, -1))


def test_what_is_left_goes_to_the_upgrades_of_the_highest_logits() -> None:
    space = space_of(tiny_model("llama"), prunes=False, offered=OFFERED)
    logits = {"upgrades": torch.zeros(3, 4, 2)}
    logits["upgrades"][1, 1] = torch.tensor([0.2, 0.1])
    one = unit_bytes(plan_of(space, logits, 0.15), 4) - space.cheapest  # o of the second layer in 3 bits
    plan = plan_within(space, logits, space.cheapest + one)
    assert plan.layers[1].precision["o"] == OFFERED[1]
    assert sum(layer.precision[unit] == TWO for layer in plan.layers for unit in UNITS) == 11


def test_budgets_outside_the_space_are_refused_with_its_ends() -> None:
    space = space_of(tiny_model("llama"))
    for limit in (space.cheapest - 1, space.dearest + 1):
        with pytest.raises(UserError, match=f"{space.cheapest:,} and the dearest {space.dearest:,}"):
            space.check(limit)
    space.check(space.cheapest)
    with pytest.raises(UserError, match=r"lifts is true, and deciding.widths offers affine-double 2/32 alone"):
        space_of(tiny_model("llama"), offered=(TWO,), lifts=True)


def test_a_budget_below_the_pinned_weights_in_the_fewest_bits_is_refused() -> None:
    """Otherwise the plan would keep fewer weights than were asked for, without a word."""
    space = space_of(tiny_model("llama"), offered=(TWO, FOUR))
    most, least = 49_152, 15_384  # `o` has 8,192 weights and takes 2,048 bytes of codes and 516 of scales and minima
    pinned = replace(space, most_weights=most, pins_weights=True)
    assert pinned.least_pinned == least == most * 2564 // 8192
    pinned.check(least)
    with pytest.raises(UserError, match=f"{most:,} weights that joint.fixed_ratio keeps take at least {least:,}"):
        pinned.check(least - 1)
    replace(pinned, pins_weights=False).check(least - 1)


def test_spaces_that_leave_nothing_to_decide_or_lift_into_dense_weights_are_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(UserError, match="nothing to decide: deciding.widths offers affine-double 2/32 alone"):
        space_of(model, offered=(TWO,), prunes=False)
    with pytest.raises(UserError, match="deciding.widths offers 16 bits.*Leave 16 out of deciding.widths"):
        space_of(model, offered=(TWO, DENSE), lifts=True)
    assert space_of(model, offered=(TWO, DENSE)).shapes["upgrades"] == (3, 4, 1)
