"""Logits, samples and slopes."""

import pytest
import torch

from qpruner.joint.gates import Estimator, Hypernetwork, LayerGates, PlainGates, entropy, opened, sampled

SHAPES = {"groups": (4,), "channels": (12,), "upgrades": (2, 4, 2), "hidden_order": (5,)}
SIZES = {"groups": (2, 2), "channels": (7, 5), "upgrades": (8, 8)}


def test_gates_of_both_kinds_begin_at_nothing_and_have_the_shapes() -> None:
    for gates in (PlainGates(SHAPES), LayerGates(SHAPES, SIZES), Hypernetwork(SHAPES, SIZES, seed=0)):
        shifts = gates(0.0)
        assert {kind: tuple(values.shape) for kind, values in shifts.items()} == SHAPES
        assert all(float(values.detach().abs().max()) == 0 for values in shifts.values())


def test_gates_of_layers_move_all_units_of_a_layer_together() -> None:
    gates = LayerGates(SHAPES, SIZES)
    with torch.no_grad():
        gates.of_layers.shifts["channels"].copy_(torch.tensor([1.0, -2.0]))
        gates.rest.shifts["upgrades"][1, 2, 0] = 3.0
    shifts = gates(0.0)
    assert shifts["channels"].tolist() == [1.0] * 7 + [-2.0] * 5
    assert shifts["groups"].tolist() == [0.0] * 4 and float(shifts["upgrades"][1, 2, 0].detach()) == 3.0


def test_a_hypernetwork_is_that_of_its_seed_and_reaches_other_layers() -> None:
    first, again, other = (Hypernetwork(SHAPES, SIZES, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.inputs, again.inputs) and not torch.equal(first.inputs, other.inputs)
    for head in first.heads.parameters():
        torch.nn.init.normal_(head)
    before = first(0.0)["channels"][7:]
    with torch.no_grad():
        first.inputs[0] += 1  # of the first layer
    assert not torch.equal(first(0.0)["channels"][7:], before)
    assert not torch.equal(first(0.5)["channels"], first(0.0)["channels"])  # another budget


def test_samples_are_open_as_often_as_their_probability_says() -> None:
    logits = {"groups": torch.tensor([-1.0, 0.0, 0.5]).repeat(20_000, 1)}
    noisy = sampled(logits, 0.5, torch.Generator().manual_seed(0))
    shares = (noisy["groups"] > 0).float().mean(0)
    assert torch.allclose(shares, torch.sigmoid(torch.tensor([-2.0, 0.0, 1.0])), atol=0.01)


@pytest.mark.parametrize("center", [0.2, 0.5])
def test_reinmax_has_the_mean_slope_of_a_quadratic_loss(center: float) -> None:
    """Of L(z) = 3 (z - c)^2, for which L(1) - L(0) = 3 (1 - 2 c)."""
    right = float(_p() * (1 - _p()) / TEMPERATURE * 3 * (1 - 2 * center))
    assert _mean_slope("reinmax", center) == pytest.approx(right, abs=0.01)


def test_straight_through_takes_one_end_for_both() -> None:
    """Open and closed cost the same here, and yet it closes gates that are mostly open."""
    assert abs(_mean_slope("reinmax", 0.5)) < 0.01
    assert _mean_slope("straight_through", 0.5) > 0.2


TEMPERATURE, LOGIT = 0.5, 0.3


def _p() -> torch.Tensor:
    return torch.sigmoid(torch.tensor(LOGIT / TEMPERATURE))


def _mean_slope(estimator: Estimator, center: float) -> float:
    logits = torch.full((400_000,), LOGIT, requires_grad=True)
    noisy = sampled({"z": logits}, TEMPERATURE, torch.Generator().manual_seed(0))
    gates = opened({"z": logits}, noisy, TEMPERATURE, estimator)["z"]
    assert set(gates.detach().unique().tolist()) == {0.0, 1.0}
    (slopes,) = torch.autograd.grad((3 * (gates - center) ** 2).sum(), logits)
    return float(slopes.mean())


def test_entropy_is_1_bit_at_the_threshold_and_none_far_from_it() -> None:
    assert entropy({"a": torch.zeros(3), "b": torch.zeros(2, 2)}, 0.4) == pytest.approx(1.0)
    assert entropy({"a": torch.tensor([50.0, -50.0])}, 0.4) == pytest.approx(0.0, abs=1e-6)
    p = torch.tensor(0.8)
    by_hand = -(0.8 * torch.log2(p) + 0.2 * torch.log2(1 - p))
    assert entropy({"a": torch.logit(p)[None] * 0.4}, 0.4) == pytest.approx(float(by_hand), abs=1e-6)
