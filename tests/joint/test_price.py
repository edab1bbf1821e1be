"""The bytes of gates against those of plans, and their slopes against differences."""

import pytest
import torch
from support.families import tiny_model
from support.joint import FOUR, TWO, gates_of, space_of

from qpruner.anatomy import unit_shapes
from qpruner.joint.price import bits_of_layers, kept_weights, smooth_bytes
from qpruner.joint.projection import differentiable_bytes, plan_of
from qpruner.joint.space import unit_bytes
from qpruner.plan import DENSE, UNITS
from qpruner.pricing import price

KINDS = ({}, {"lifts": True}, {"prunes": False, "lifts": True}, {"offered": (FOUR,)}, {"offered": (TWO, FOUR, DENSE)})


@pytest.mark.parametrize("changes", KINDS)
@pytest.mark.parametrize("family", ["llama", "phi3", "olmo2", "gpt2"])
def test_hard_gates_cost_what_the_folder_of_their_plan_holds(family: str, changes: dict[str, object]) -> None:
    model = tiny_model(family)
    space = space_of(model, **changes)
    for seed in range(3):
        gates = gates_of(space, seed)
        plan = plan_of(space, gates, 0.5)
        stored = price(tiny_model(family), plan).unit_weight_bytes
        assert unit_bytes(plan, 4) == stored
        assert float(differentiable_bytes(space, gates)) == stored


def test_the_slope_of_a_gate_is_what_it_adds() -> None:
    space = space_of(tiny_model("llama"), lifts=True)
    gates = {kind: values.double().requires_grad_() for kind, values in gates_of(space).items()}
    slopes = torch.autograd.grad(differentiable_bytes(space, gates), [*gates.values()])
    for (kind, values), slope in zip(gates.items(), slopes, strict=True):
        for place in (0, values.numel() // 2, values.numel() - 1):
            ends = []
            for end in (0.0, 1.0):
                moved = values.detach().clone()
                moved.view(-1)[place] = end
                ends.append(float(smooth_bytes(space, {**gates, kind: moved}).detach()))
            assert float(slope.reshape(-1)[place]) == pytest.approx(ends[1] - ends[0], abs=1e-6), kind


def test_weights_and_bits_are_counted_by_hand() -> None:
    space = space_of(tiny_model("llama"))  # 4 groups of 2 queries with heads of 16, 48 channels, width 64
    gates = {
        "groups": torch.tensor([1.0, 0, 0, 0] * 3),
        "channels": torch.cat([torch.ones(10), torch.zeros(38)] * 3),
        "upgrades": torch.zeros(3, 4, 2),
    }
    gates["upgrades"][1, 3] = torch.tensor([1.0, 1.0])  # down of the second layer: 4 bits
    of_layer = {"qkv": 64 * (32 + 16 + 16), "o": 64 * 32, "gate_up": 2 * 64 * 10, "down": 64 * 10}
    assert float(kept_weights(space, gates)) == 3 * sum(of_layer.values())
    more = 2 * of_layer["down"] / sum(of_layer.values())
    assert bits_of_layers(space, gates).tolist() == pytest.approx([2.0, 2 + more, 2.0])


def test_a_later_upgrade_counts_for_nothing_without_those_before() -> None:
    space = space_of(tiny_model("llama"), prunes=False)
    closed, late = torch.zeros(3, 4, 2), torch.zeros(3, 4, 2)
    late[:, :, 1] = 1.0
    assert float(smooth_bytes(space, {"upgrades": late})) == float(smooth_bytes(space, {"upgrades": closed}))
    shapes = unit_shapes(space.widths, 0)
    weights = 3 * sum(rows * columns for unit in UNITS for rows, columns in shapes[unit])
    assert float(kept_weights(space, {"upgrades": late})) == weights
