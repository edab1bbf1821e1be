"""Adapters by what outputs lack: against the optimum, LoftQ, and numbers by hand."""

import pytest
import torch
from support.grids import correlated
from torch import Tensor

from qpruner.adapters.calibrated import CalibratedStart, calibrated_start, root
from qpruner.adapters.loftq import loftq
from qpruner.errors import UserError

DAMPING = 0.01


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(weight: Tensor, quantized: Tensor, hessian: Tensor, **changes) -> CalibratedStart:  # type: ignore[no-untyped-def]
    options = {"name": "layer", "rank": 4, "scale": 1.0, "damping": DAMPING, "seed": 0} | changes
    return calibrated_start(weight, quantized, hessian, **options)


def output_error(residual: Tensor, hessian: Tensor) -> float:
    """The square of what outputs lack, with the damping that the start is chosen by."""
    hessian = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian))
    return float(((residual.double() @ hessian) * residual).sum())


@pytest.fixture(scope="module")
def layer() -> tuple[Tensor, Tensor, Tensor]:
    """A weight, its rounded values and the Hessian of its inputs."""
    weight, inputs = noise(24, 40), correlated(300, 40)
    return weight, weight.round(), inputs.T @ inputs


def test_by_hand() -> None:
    """Of the errors 0.4 and 0.3 the second counts more: its input is twice as large. L = diag(1, 2) up to a factor."""
    weight = torch.diag(torch.tensor([2.4, 1.3]))
    start = run(weight, weight.round(), torch.diag(torch.tensor([1.0, 4.0])), rank=1, scale=2.0, damping=1e-9)
    assert torch.allclose(2 * start.lora_B @ start.lora_A, torch.diag(torch.tensor([0.0, 0.3])), atol=1e-5)
    assert start.lora_A.abs().flatten().tolist() == pytest.approx([0, 3**-0.5], abs=1e-5)
    assert start.quantization_error == pytest.approx(((0.16 + 0.36) / (2.4**2 + 2.6**2)) ** 0.5, rel=1e-5)
    assert start.error == pytest.approx((0.16 / (2.4**2 + 2.6**2)) ** 0.5, rel=1e-5)


def test_leaves_the_tail_of_the_svd_at_the_outputs(layer: tuple[Tensor, Tensor, Tensor]) -> None:
    """Any root of H shows Eckart and Young's bound; here the symmetric one."""
    weight, quantized, hessian = layer
    start = run(weight, quantized, hessian)
    whole = (hessian + DAMPING * hessian.diagonal().mean() * torch.eye(40)).double()
    squares, vectors = torch.linalg.eigh(whole)
    values = torch.linalg.svdvals((weight - quantized).double() @ (vectors * squares.sqrt()) @ vectors.T)
    left = output_error(weight - quantized - start.lora_B @ start.lora_A, hessian)
    assert left == pytest.approx(float(values[4:].square().sum()), rel=1e-4)
    assert start.error**2 * output_error(weight, hessian) == pytest.approx(left, rel=1e-4)
    assert start.quantization_error**2 * output_error(weight, hessian) == pytest.approx(
        float(values.square().sum()), rel=1e-4
    )


def test_no_step_downhill_leads_lower(layer: tuple[Tensor, Tensor, Tensor]) -> None:
    """At the start the gradient of the error is zero, and from another start descent ends no lower."""
    weight, quantized, hessian = layer
    residual, lower = (weight - quantized).double(), root(hessian, DAMPING, name="layer")
    start = run(weight, quantized, hessian, scale=2.0)

    def lost(a: Tensor, b: Tensor) -> Tensor:
        return ((residual - 2.0 * b @ a) @ lower).square().sum()

    a, b = start.lora_A.double().requires_grad_(), start.lora_B.double().requires_grad_()
    lost_at_start = lost(a, b)
    slopes = torch.autograd.grad(lost_at_start, [a, b])
    best = float(lost_at_start.detach())
    assert all(float(slope.norm()) < 1e-3 * best for slope in slopes)
    a, b = noise(4, 40, seed=1).double().requires_grad_(), noise(24, 4, seed=2).double().requires_grad_()
    descent = torch.optim.LBFGS([a, b], lr=0.5, max_iter=500)

    def closure() -> Tensor:
        descent.zero_grad()
        value = lost(a, b)
        value.backward()
        return value

    descent.step(closure)
    assert best * (1 - 1e-5) <= float(lost(a, b).detach()) <= best * 1.05


def test_less_at_the_outputs_than_loftq_and_more_of_the_weight(layer: tuple[Tensor, Tensor, Tensor]) -> None:
    weight, quantized, hessian = layer
    start = run(weight, quantized, hessian)
    other = loftq(weight, torch.round, lambda q: q, name="layer", rank=4, scale=1.0, num_iterations=1, seed=0)
    ours, theirs = (weight - quantized - x.lora_B @ x.lora_A for x in (start, other))
    assert output_error(ours, hessian) < 0.8 * output_error(theirs, hessian)
    assert ours.norm() > theirs.norm()


def test_is_loftq_where_inputs_are_alike() -> None:
    weight = noise(24, 40)
    start = run(weight, weight.round(), 7 * torch.eye(40), scale=2.0)
    other = loftq(weight, torch.round, lambda q: q, name="layer", rank=4, scale=2.0, num_iterations=1, seed=0)
    assert torch.allclose(start.lora_B @ start.lora_A, other.lora_B @ other.lora_A, atol=1e-5)
    assert torch.allclose(start.lora_A.norm(dim=1), other.lora_A.norm(dim=1), rtol=1e-5)
    assert torch.allclose(start.lora_B.norm(dim=0), other.lora_B.norm(dim=0), rtol=1e-4)


def test_the_scale_changes_the_factors_and_not_the_start(layer: tuple[Tensor, Tensor, Tensor]) -> None:
    one, four = (run(*layer, scale=scale) for scale in (1.0, 4.0))
    assert torch.allclose(one.lora_B @ one.lora_A, 4 * four.lora_B @ four.lora_A, atol=1e-5)
    assert torch.allclose(one.lora_A, four.lora_A, atol=1e-6)
    assert one.error == pytest.approx(four.error)


def test_rows_of_a_have_the_norm_that_they_have_in_plain_lora(layer: tuple[Tensor, Tensor, Tensor]) -> None:
    assert torch.allclose(run(*layer).lora_A.norm(dim=1), torch.tensor(3**-0.5), rtol=1e-5)


def test_nothing_to_correct_starts_as_plain_lora(layer: tuple[Tensor, Tensor, Tensor]) -> None:
    weight, _, hessian = layer
    start = run(weight, weight, hessian)
    assert not start.lora_B.any() and start.lora_A.norm(dim=1).min() > 0.3
    assert start.error == start.quantization_error == 0


def test_inputs_that_are_all_zero_count_alike() -> None:
    weight = noise(24, 40)
    start, alike = (run(weight, weight.round(), hessian) for hessian in (torch.zeros(40, 40), torch.eye(40)))
    assert torch.equal(start.lora_B @ start.lora_A, alike.lora_B @ alike.lora_A)


def test_the_root_is_lower_triangular_and_that_of_the_damped_hessian(layer: tuple[Tensor, Tensor, Tensor]) -> None:
    hessian = layer[2]
    lower = root(hessian, DAMPING, name="layer")
    whole = (hessian / hessian.diagonal().mean() + DAMPING * torch.eye(40)).double()
    assert torch.equal(lower, lower.tril())
    assert torch.allclose(lower @ lower.T, whole, rtol=1e-5, atol=1e-6)


def test_bad_input(layer: tuple[Tensor, Tensor, Tensor]) -> None:
    weight, quantized, hessian = layer
    with pytest.raises(UserError, match="rank 25 is too high for layer"):
        run(weight, quantized, hessian, rank=25)
    with pytest.raises(UserError, match="What reaches layer from the calibration text is not finite"):
        run(weight, quantized, hessian * float("nan"))
    with pytest.raises(UserError, match="weight of layer holds values that are not finite"):
        run(weight / 0, quantized, hessian)
    with pytest.raises(UserError, match=r"Hessian of layer is not positive, although damping \(0.01\)"):
        run(weight, quantized, torch.diag(torch.tensor([1.0] * 39 + [-1.0])))
